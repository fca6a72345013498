"""Print the map equation -> functions -> tests; fail where a done equation lacks one of them.

A function claims an equation in its docstring ("Equation E3", "Equations E3, E5",
"Equations E1-E3"); a test proves one with `@pytest.mark.equation("E3")`, on itself, on its class or
as `pytestmark`. The source is parsed, not imported.
"""

import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

TITLES = {
    "E1": "objective: expected reward minus β KL to the reference",
    "E2": "objective per sample; maximum-entropy form",
    "E3": "optimum: the Gibbs policy",
    "E4": "log form of the optimum; implicit reward",
    "E5": "why it is the optimum: β log Z − β KL(π‖π*)",
    "E6": "the loss is KL(π‖π*) − log Z",
    "E7": "forward projection onto the Gibbs policy",
    "E8": "plug-in weights softmax(r/β) on samples",
    "E9": "invariance to a shift of the reward",
    "E10": "limits: supervised fine-tuning, best of n",
    "E11": "optimism under a stochastic reward",
    "E12": "supervised fine-tuning as reinforcement learning",
    "E13": "chain rule of an expert; naive Bayes",
    "E14": "per-token product",
    "E15": "objective of the per-token product",
    "E16": "reward of the per-token product",
    "E17": "weighted product with a reward model",
    "E18": "the weighted product as training",
    "E19": "the Gibbs policy as a product",
    "E20": "generalised product: weights that depend on the context",
    "E21": "local against global normalisation",
    "E22": "process reward of complete sequences",
    "E23": "process reward of prefixes",
    "E24": "ranking of prefixes is free of Z",
    "E25": "Monte-Carlo process reward",
    "E26": "KL: definition and decomposition",
    "E27": "KL per step over the vocabulary; Rao-Blackwellised estimate",
    "E28": "sampled KL: k1, k2, k3",
    "E29": "gradients of KL estimates",
    "E30": "KL as reward",
    "E31": "trajectory probability",
    "E32": "REINFORCE",
    "E33": "reward-to-go",
    "E34": "baseline",
    "E35": "optimal baseline",
    "E36": "discount",
    "E37": "surrogate loss",
    "E38": "off-policy gradient",
    "E39": "Q, V and the advantage",
    "E40": "one-step advantage",
    "E41": "critic targets",
    "E42": "GAE",
    "E43": "performance difference",
    "E44": "importance-sampled surrogate",
    "E45": "PPO-clip",
    "E46": "PPO-penalty",
    "E47": "TRPO",
    "E48": "GRPO",
    "E49": "Bradley-Terry",
    "E50": "pairwise loss",
    "E51": "K-wise loss",
    "E52": "gambler's ruin",
    "E53": "simple random walk",
    "E54": "absorbing chain",
    "E55": "returns to a state",
    "E56": "branching process",
    "E57": "continuous time",
}

# An issue that implements equations adds them here when it is done.
DONE = frozenset([f"E{i}" for i in (*range(1, 47), *range(48, 53), 54, 56)])

_CLAIM = re.compile(r"\b[Ee]quations?\s+(E\d+(?:(?:\s*[,–-]\s*|\s*,?\s+and\s+)E\d+)*)")
_RANGE = re.compile(r"E(\d+)(?:\s*[–-]\s*E(\d+))?")

Places = dict[str, list[str]]
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def claimed_ids(docstring: str) -> list[str]:
    """The ids that a docstring claims, in order: "Equations E1-E3, E5" gives E1, E2, E3, E5."""
    ids = []
    for claim in _CLAIM.findall(docstring):
        for first, last in _RANGE.findall(claim):
            ids += [f"E{i}" for i in range(int(first), int(last or first) + 1)]
    return list(dict.fromkeys(ids))


def find_functions(root: Path) -> Places:
    """Id -> "file:line name" of each function, method or class below `root` that claims it."""
    places: Places = defaultdict(list)
    for path, name, node in _definitions(root, "*.py"):
        if isinstance(node, ast.Module):
            continue
        for equation in claimed_ids(ast.get_docstring(node) or ""):
            places[equation].append(f"{path}:{node.lineno} {name}")
    return places


def find_tests(root: Path) -> Places:
    """Id -> "file::test" of each test, test class or test module below `root` marked with it."""
    places: Places = defaultdict(list)
    for path, name, node in _definitions(root, "test_*.py"):
        for equation in _marked_ids(node):
            places[equation].append(f"{path}::{name}" if name else str(path))
    return places


def table(functions: Places, tests: Places) -> Iterator[str]:
    """The lines of the map: each equation, the code that claims it, the tests that prove it."""
    for equation, title in TITLES.items():
        yield f"{equation:4} {title}{'' if equation in DONE else '  (later)'}"
        yield from (f"     code {place}" for place in functions.get(equation, []))
        yield from (f"     test {place}" for place in tests.get(equation, []))


def problems(functions: Places, tests: Places, done: Iterable[str] = DONE) -> list[str]:
    """What is missing or unknown, one line each; empty if all is well."""
    found = [
        f"{equation} ({TITLES[equation]}) has no {what}"
        for equation in sorted(done, key=_number)
        for what, places in [
            (f"function whose docstring says 'Equation {equation}'", functions),
            (f"test marked @pytest.mark.equation('{equation}')", tests),
        ]
        if not places.get(equation)
    ]
    for equation in sorted({*functions, *tests} - {*TITLES}):
        where = functions.get(equation, []) + tests.get(equation, [])
        found.append(f"{equation} is not an equation of this project: {', '.join(where)}")
    return found


def _definitions(root: Path, pattern: str) -> Iterator[tuple[Path, str, Definition]]:
    """Each module (named ""), class and function below `root`, with its dotted name."""
    for path in sorted(root.rglob(pattern)):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        yield path, "", tree
        yield from ((path, name, node) for name, node in _nested(tree, ""))


def _nested(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + child.name, child
            yield from _nested(child, f"{prefix}{child.name}.")
        else:
            yield from _nested(child, prefix)


def _marked_ids(node: Definition) -> list[str]:
    marks: list[ast.AST] = list(getattr(node, "decorator_list", []))
    for statement in node.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "pytestmark":
            marks.append(statement.value)
    return [
        str(argument.value if isinstance(argument, ast.Constant) else ast.unparse(argument))
        for mark in marks
        for call in ast.walk(mark)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.equation"
        for argument in call.args
    ]


def _number(equation: str) -> int:
    return int(equation[1:])


def main(arguments: list[str] | None = None) -> int:
    """Print the map and the problems; 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(), help="the repository")
    parser.add_argument("--quiet", action="store_true", help="print the problems only")
    options = parser.parse_args(arguments)
    functions = find_functions(options.root / "trl_ext")
    tests = find_tests(options.root / "tests")
    if not options.quiet:
        print(*table(functions, tests), sep="\n")
    found = problems(functions, tests)
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
