"""Imports go downward only, and only the adapters (trl_*adapter.py) name TRL's private members.

Both are read off the syntax tree, so that an import inside a function counts as well.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import trl_ext

PACKAGE = Path(trl_ext.__file__).parent

ALGORITHMS = ("rwr", "grpo", "reinforce", "ppo", "trpo", "poe", "gibbs_prm", "reward_model")

# Lowest first. A module imports from lower floors and from its own package, nothing else; two names
# on one floor do not import each other. `report` is below `launch`, which ends a run by printing.
FLOORS = (
    ("functional",),
    ("errors", "kl_rules", "watch_options"),
    ("registry", "options"),
    ("kl_penalty",),
    ("oracle",),
    ("kl_table",),
    ("tasks", "metrics"),
    ("bundled",),
    ("rewards",),
    ("vocabulary_kl", "packing"),
    ("models",),
    ("policy_config", "rollout"),
    ("kl_term", "watch"),
    ("trl_adapter", "trl_sft_adapter", "trl_reward_adapter"),
    ALGORITHMS,
    ("oracle_check",),
    ("recipe",),
    ("plan",),
    ("environment",),
    ("doctor",),
    ("record",),
    ("smaller",),
    ("resume",),
    ("report",),
    ("callbacks",),
    ("build",),
    ("launch",),
    ("collect",),
    ("iterate",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# The floors that stay light: what they may import besides the standard library.
THIRD_PARTY = {"functional": {"torch"}, "errors": set(), "kl_rules": set(), "registry": set()}

ADAPTERS = ("trl_ext.trl_adapter", "trl_ext.trl_sft_adapter", "trl_ext.trl_reward_adapter")


def import_violations(module: str, source: str) -> list[str]:
    """One line for each import in `source` that the floors forbid.

    `module` is the dotted name; a package's own file is called `trl_ext.rwr.__init__`.
    """
    here = module.split(".")[1]
    if here == "__init__":  # trl_ext itself: the public names, above every algorithm
        return []
    if here not in FLOOR_OF:
        return [f"{module}: {here!r} has no floor; list it in FLOORS"]
    found = []
    for line, target in _imports(module, ast.parse(source)):
        top, _, rest = target.partition(".")
        there = rest.partition(".")[0]
        if top != "trl_ext":
            allowed = THIRD_PARTY.get(here)
            if allowed is not None and top not in allowed | sys.stdlib_module_names:
                found.append(f"{module}:{line}: {here} must not import {top}")
        elif there == "__version__" or there == here:
            continue
        elif there not in FLOOR_OF:
            found.append(
                f"{module}:{line}: {there!r} has no floor; import a name from the module that "
                "defines it, and list a new module in FLOORS"
            )
        elif FLOOR_OF[there] >= FLOOR_OF[here]:
            found.append(f"{module}:{line}: {here} must not import {there}, which is not below it")
    return list(dict.fromkeys(found))


def _imports(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted target of each import; `from a import b` is `a.b`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                parents = module.split(".")[:-level] if level else []
                base = ".".join([*parents, *([origin] if origin else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name("import_module"),
                args=[ast.Constant(value), *_],
            ):
                yield node.lineno, str(value)


def private_violations(module: str, source: str, private: frozenset[str]) -> list[str]:
    """One line for each method definition or attribute in `source` whose name is in `private`."""
    if module.startswith(ADAPTERS):
        return []
    return [
        f"{module}:{line}: only an adapter, such as {ADAPTERS[0]}, names TRL's {name}"
        for line, name in _members(ast.parse(source))
        if name in private
    ]


def _members(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each method defined, attribute named, and `getattr(x, "name")`."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(body=body):
                yield from (
                    (item.lineno, item.name)
                    for item in body
                    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
                )
            case ast.Attribute(attr=name):
                yield node.lineno, name
            case ast.Call(
                func=ast.Name("getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(name), *_]
            ):
                yield node.lineno, str(name)


@cache
def trl_private_names() -> frozenset[str]:
    """Underscore members of the trainers that adapters build on, read off their source."""
    names = {
        name
        for distribution, path, class_name in [
            ("trl", "trainer/grpo_trainer.py", "GRPOTrainer"),
            ("trl", "trainer/reward_trainer.py", "RewardTrainer"),
            ("trl", "trainer/sft_trainer.py", "SFTTrainer"),
            ("trl", "trainer/base_trainer.py", "_BaseTrainer"),
            ("transformers", "trainer.py", "Trainer"),
        ]
        for name in _own_members(_source_folder(distribution) / path, class_name)
    }
    return frozenset(n for n in names if n.startswith("_") and not n.startswith("__"))


def _source_folder(distribution: str) -> Path:
    spec = importlib.util.find_spec(distribution)
    assert spec and spec.origin
    return Path(spec.origin).parent


def _own_members(path: Path, class_name: str) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    [owner] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name]
    for node in ast.walk(owner):
        match node:
            case ast.FunctionDef(name=name):
                yield name
            case ast.Attribute(value=ast.Name("self"), attr=name, ctx=ast.Store()):
                yield name


def _modules() -> list[tuple[str, str]]:
    return [
        (".".join(("trl_ext", *path.relative_to(PACKAGE).with_suffix("").parts)), path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def test_imports_go_downward():
    found = [line for module, source in _modules() for line in import_violations(module, source)]
    assert not found, "\n".join(found)


def test_only_the_adapters_name_trl_privates():
    private = trl_private_names()
    found = [line for name, text in _modules() for line in private_violations(name, text, private)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("trl_ext.functional.kl", "import trl_ext.errors", "functional must not import errors"),
        ("trl_ext.functional.kl", "import numpy as np", "functional must not import numpy"),
        ("trl_ext.errors", "from torch import nn", "errors must not import torch"),
        ("trl_ext.rwr.trainer", "from trl_ext.grpo import X", "rwr must not import grpo"),
        ("trl_ext.rwr.trainer", "from trl_ext import grpo", "rwr must not import grpo"),
        ("trl_ext.rwr.__init__", "from ..recipe import X", "rwr must not import recipe"),
        ("trl_ext.rwr.trainer", "from .. import recipe", "rwr must not import recipe"),
        ("trl_ext.plan", "def f():\n    import trl_ext.cli", "plan must not import cli"),
        ("trl_ext.report", "import_module('trl_ext.cli')", "report must not import cli"),
        ("trl_ext.report", "importlib.import_module('trl_ext.cli')", "report must not import cli"),
        ("trl_ext.launch", "from trl_ext import RWRTrainer", "from the module that defines it"),
        ("trl_ext.novel", "", "'novel' has no floor"),
        ("trl_ext.launch", "from trl_ext.report import x\nfrom trl_ext import __version__", ""),
        ("trl_ext.rwr.trainer", "from trl_ext.rwr.config import X\nfrom .config import X", ""),
        ("trl_ext.functional.kl", "import math\nfrom torch import Tensor", ""),
        ("trl_ext.__init__", "from trl_ext.rwr import RWRTrainer", ""),
    ],
)
def test_import_violations(module, source, says):
    assert _matches(import_violations(module, source), says)


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("trl_ext.rwr.trainer", "self._compute_loss(x)", "TRL's _compute_loss"),
        ("trl_ext.rwr.trainer", "class A:\n    def _compute_loss(self): ...", ":2: only"),
        ("trl_ext.launch", "getattr(trainer, '_metrics')", "TRL's _metrics"),
        ("trl_ext.launch", "def _compute_loss(): ...", ""),
        ("trl_ext.launch", "self._own_helper()", ""),
        ("trl_ext.rwr.offline", "self._prepare_dataset(x)", "TRL's _prepare_dataset"),
        *((adapter, "self._compute_loss(x)", "") for adapter in ADAPTERS),
    ],
)
def test_private_violations(module, source, says):
    assert _matches(private_violations(module, source, trl_private_names()), says)


def _matches(violations: list[str], says: str) -> bool:
    return len(violations) == 1 and says in violations[0] if says else not violations


def test_trl_private_names_are_found():
    known = {"_compute_loss", "_calculate_rewards", "_metrics", "_save", "_prepare_dataset"}
    assert known <= trl_private_names()
