"""Rank scored completions within their prompts, and judge the scores by what is known.

FILE is what `trl_ext score` wrote. Where rows have labels, it is told how often a right completion
scores higher than a wrong one, and how often the best of n is right, beside a majority of answers
and chance. Where they have first errors, a threshold on the step rewards is tuned on --validation,
or on every other prompt, and judged on the rest. --against compares with another scoring of the
same completions.

examples:
  trl_ext rank scored.jsonl --output ranked.jsonl
  trl_ext rank scored.jsonl --n 1,4,16 --json numbers.json
  trl_ext rank processbench.jsonl --validation tuning.jsonl --by prefix_score
  trl_ext rank scored.jsonl --against other.jsonl
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from trl_ext.gibbs_prm.scored_file import ScoredRow

_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.usage = "%(prog)s FILE [options]"
    parser.add_argument("file", metavar="FILE", help=".jsonl or .parquet of trl_ext score")
    parser.add_argument("--output", metavar="FILE", help=".jsonl, the completions by rank")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--n", type=_counts, metavar="N,N,...", help="best of how many (default: 1, 2, 4, ...)"
    )
    parser.add_argument("--against", metavar="FILE", help="another scoring of the same completions")
    parser.add_argument("--validation", metavar="FILE", help="scored rows to tune the threshold on")
    parser.add_argument(
        "--by",
        choices=("step_reward", "prefix_score"),
        default="step_reward",
        help="what a wrong step is told by (default: step_reward)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")


def run(args: argparse.Namespace) -> int:
    """Read, rank, judge."""
    from trl_ext.cli.generate_output import check_file
    from trl_ext.cli.json_file import check_json_file, write_json_file
    from trl_ext.cli.score_output import check_apart

    for read in ("file", "against", "validation"):
        written = {"--output": args.output, "--json": args.json}
        check_apart(
            {read.upper() if read == "file" else f"--{read}": getattr(args, read), **written}
        )
    check_file(args.output, "--output", args.force, ".jsonl")
    if args.json is not None:
        check_json_file(args.json)
    from rich.console import Console

    console = Console(highlight=False)
    rows = _read(args.file)
    prompts = _by_prompt(rows)
    ranked = [_ranked(group) for group in prompts.values()]
    if args.output is not None:
        _write(Path(args.output), ranked)
    _print_ranks(console, ranked)
    found = {
        "separation": _separation(console, rows),
        "best_of_n": _best_of_n(console, args, prompts),
        "first_error": _first_error(console, args, rows),
        "agreement": _agreement(console, args, rows),
    }
    if args.json is not None:
        write_json_file(
            {key: value for key, value in found.items() if value is not None}, args.json
        )
    return 0


def _counts(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers from 1, as in 1,4,16, got {text!r}"
        )
    return sorted(set(found))


def _read(name: str) -> "list[ScoredRow]":
    from trl_ext.gibbs_prm.scored_file import read_scored

    return list(read_scored(name))


def _by_prompt(rows: "list[ScoredRow]") -> "dict[str, list[ScoredRow]]":
    """Completions of one prompt, also where they are in several rows of the input."""
    groups: dict[str, list[ScoredRow]] = {}
    for row in rows:
        groups.setdefault(repr(row.scores.prompt), []).append(row)
    return groups


def _ranked(group: "list[ScoredRow]") -> "list[tuple[float, ScoredRow]]":
    # Without the differences of all pairs, which thousands of completions of a prompt are too many
    # for.
    import torch

    from trl_ext.functional import mean_ranks

    betas = sorted({row.scores.beta for row in group})
    if len(betas) > 1:
        raise DataError(
            f"The prompt {_brief(group[0].scores.prompt, 24)!r} has completions that were scored "
            f"with beta {betas[0]:g} and {betas[1]:g}: their scores do not "
            "compare. Score all completions with one beta."
        )
    scores = torch.tensor([row.scores.score for row in group], dtype=torch.float64)
    ranks = mean_ranks(-scores).tolist()
    return [(ranks[index], group[index]) for index in (-scores).argsort(stable=True).tolist()]


def _write(path: Path, ranked: "list[list[tuple[float, ScoredRow]]]") -> None:
    from trl_ext.cli.generate_output import not_written
    from trl_ext.gibbs_prm.scored_file import line_of

    new = path.with_name(path.name + ".partial.new")
    try:
        with new.open("w", encoding="utf-8") as file:
            for group in ranked:
                for rank, row in group:
                    # The rank that it had in an earlier file of ranks gives way.
                    file.write(line_of({"rank": rank} | row.record() | {"rank": rank}))
        new.replace(path)
    except OSError as error:
        raise not_written("--output", str(path), error) from error


def _print_ranks(console: "Console", ranked: "list[list[tuple[float, ScoredRow]]]") -> None:
    from rich.table import Table
    from rich.text import Text

    several = [group for group in ranked if len(group) > 1]
    total = sum(map(len, ranked))
    console.print(f"{total} completions of {len(ranked)} prompts")
    if not several:
        return
    table = Table("prompt", "best score", "best completion", "worst score", "worst completion")
    for group in several[:_SHOWN]:
        (_, best), (_, worst) = group[0], group[-1]
        table.add_row(
            Text(_brief(best.scores.prompt, -24)),
            f"{best.scores.score:+.3f}",
            Text(_brief(best.scores.completion, 24)),
            f"{worst.scores.score:+.3f}",
            Text(_brief(worst.scores.completion, 24)),
        )
    console.print(table)


def _brief(said: Any, size: int) -> str:
    """The beginning of a text on one line, or its end for a negative size."""
    text = said if isinstance(said, str) else "\n".join(str(m.get("content")) for m in said)
    line = " ".join(text.split())
    if len(line) <= abs(size):
        return line
    return line[: size - 1] + "…" if size > 0 else "…" + line[size + 1 :]


def _correct(row: "ScoredRow") -> bool:
    return row.label is not None and row.label >= 1


def _separation(console: "Console", rows: "list[ScoredRow]") -> dict[str, Any] | None:
    from trl_ext.gibbs_prm.separating import separation

    labelled = [row for row in rows if row.label is not None]
    if not labelled:
        return None
    try:
        found = separation(
            [row.scores.score for row in labelled],
            [_correct(row) for row in labelled],
            [repr(row.scores.prompt) for row in labelled],
        )
    except DataError as error:
        console.print(f"labels: {error}", markup=False)
        return None
    console.print(
        f"a right completion scores higher than a wrong one of its prompt in "
        f"{found.probability:.1%} of pairs{_interval(found.interval)}; {found.num_pairs} pairs of "
        f"{found.num_prompts} prompts"
    )
    return vars(found)


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" (95%: {interval[0]:.1%} to {interval[1]:.1%})"


def _best_of_n(
    console: "Console", args: argparse.Namespace, prompts: "dict[str, list[ScoredRow]]"
) -> list[dict[str, Any]] | None:
    from dataclasses import asdict

    from trl_ext.gibbs_prm.curves import accuracy_curve

    groups = [g for g in prompts.values() if all(row.label is not None for row in g)]
    fewest = min(map(len, groups), default=0)
    if fewest < 2:
        if args.n is not None:
            raise ConfigError(
                "--n: the best of n needs labels and several completions of each prompt, and "
                f"{args.file} has {'no labels' if not groups else 'prompts with one completion'}."
            )
        return None
    ns = args.n or [2**k for k in range(fewest.bit_length())]
    if max(ns) > fewest:
        raise ConfigError(
            f"--n: {max(ns)} is more than the {fewest} completions that a prompt has."
        )
    widest = max(map(len, groups))

    def table(of: Any, empty: Any) -> list[list[Any]]:
        return [[of(row) for row in g] + [empty] * (widest - len(g)) for g in groups]

    curve = accuracy_curve(
        table(lambda row: row.scores.score, float("nan")),
        table(_correct, False),
        table(lambda row: row.answer, None),
        table(lambda row: len(row.scores.tokens), 0),
        ns,
        beta=groups[0][0].scores.beta,
    )
    has_answers = any(row.answer is not None for g in groups for row in g)
    _print_curve(console, curve, len(groups), has_answers)
    return [asdict(row) for row in curve]


def _print_curve(console: "Console", curve: Any, prompts: int, has_answers: bool) -> None:
    from rich.table import Table

    ways = {"best of n": "best", "chance": "random", "any right": "pass_at_n"}
    if has_answers:
        voting = {"majority": "majority", "weighted": "weighted_majority"}
        ways = {"best of n": "best", **voting, "chance": "random", "any right": "pass_at_n"}
    table = Table(
        "n", "tokens", *ways, title=f"right answers of {prompts} prompts in % (95% interval)"
    )
    for row in curve:
        cells = [_percent(getattr(row, name)) for name in ways.values()]
        table.add_row(str(row.n), f"{row.tokens:.0f}", *cells)
    console.print(table)
    if has_answers:
        gain = curve[-1].best_minus_majority
        console.print(f"best of {curve[-1].n} minus majority: {_percent(gain)} points")


def _percent(estimate: Any) -> str:
    if estimate.interval is None:
        return f"{100 * estimate.mean:.1f}"
    low, high = (100 * end for end in estimate.interval)
    return f"{100 * estimate.mean:.1f} ({low:.0f} to {high:.0f})"


def _first_error(
    console: "Console", args: argparse.Namespace, rows: "list[ScoredRow]"
) -> dict[str, Any] | None:
    from trl_ext.gibbs_prm.first_error import f1, predict, step_values, tune

    known = [row for row in rows if row.first_error is not None and row.scores.steps]
    if not known:
        if args.validation is not None:
            raise ConfigError(f"--validation: {args.file} has no first errors to be judged by.")
        return None
    if args.validation is not None:
        tuning = [r for r in _read(args.validation) if r.first_error is not None and r.scores.steps]
        judged, where = known, args.validation
        if not tuning:
            raise ConfigError(f"--validation {where}: it has no first errors to tune by.")
    else:
        tuning, judged, where = known[::2], known[1::2], "every other solution"

    def values(of: "list[ScoredRow]") -> list[list[float]]:
        return step_values([row.scores for row in of], args.by)

    try:
        threshold = tune(values(tuning), [_label(row) for row in tuning])
    except DataError as error:
        console.print(f"first errors: {error}", markup=False)
        return None
    predicted = predict(values(judged), threshold.threshold)
    found = f1(predicted, [_label(row) for row in judged])
    console.print(
        f"first errors: F1 {found.f1:.1%} on {len(judged)} solutions (of the wrong ones "
        f"{found.accuracy_error:.1%} found, of the right ones {found.accuracy_correct:.1%} left "
        f"alone); a step is wrong where its {args.by} is below {threshold.threshold:.4g}, tuned on "
        f"{where} to {threshold.f1:.1%}",
        markup=False,
    )
    return {"threshold": threshold.threshold, "tuned": threshold.f1, **vars(found)}


def _label(row: "ScoredRow") -> int:
    """The first error as a step of those scored: some of the file's may have become one."""
    merged, label = row.scores.merged_into, row.first_error
    assert label is not None
    return merged[label] if label >= 0 and merged else label


def _agreement(
    console: "Console", args: argparse.Namespace, rows: "list[ScoredRow]"
) -> dict[str, Any] | None:
    from trl_ext.gibbs_prm.ranking import agreement

    if args.against is None:
        return None
    others = {(row.row, row.sample): row for row in _read(args.against)}
    missing = [row for row in rows if (row.row, row.sample) not in others]
    if missing:
        raise DataError(
            f"--against {args.against}: it has no completion {missing[0].sample} of row "
            f"{missing[0].row}. Score the same file twice."
        )
    found = agreement(
        [row.scores for row in rows], [others[row.row, row.sample].scores for row in rows]
    )
    console.print(
        f"agreement with {args.against}: Kendall's tau-b {found.kendall_tau_b:.3f}"
        f"{_plain(found.kendall_interval)}, Spearman's rho {found.spearman:.3f}"
        f"{_plain(found.spearman_interval)}; {found.num_prompts} prompts, {found.num_pairs} pairs",
        markup=False,
    )
    return vars(found)


def _plain(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" (95%: {interval[0]:.3f} to {interval[1]:.3f})"
