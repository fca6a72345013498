"""Rank scored completions within their prompts, and judge the scores by what is known.

FILE is what `trl_ext score` wrote. Where rows have labels, it is told how often a right completion
scores higher than a wrong one, and how often the best of n is right, beside a majority of answers
and chance. Where they have first errors, a threshold on the step rewards is tuned on --validation,
or on every other solution, and judged on the rest. --against compares with another scoring of the
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

from trl_ext.cli.rank_truth import (
    of_another,
    of_draws,
    of_first_errors,
    of_labels,
    rows_in,
    warn_of_few,
)
from trl_ext.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from trl_ext.gibbs_prm.scored_row import ScoredRow

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
    from trl_ext.cli.score_output import check_all, check_apart

    for read in ("file", "against", "validation"):
        written = {"--output": args.output, "--json": args.json}
        check_apart(
            {read.upper() if read == "file" else f"--{read}": getattr(args, read), **written}
        )
    check_all(
        lambda: check_file(args.output, "--output", args.force, ".jsonl"),
        lambda: args.json and check_json_file(args.json),
    )
    from rich.console import Console

    console = Console(highlight=False)
    rows = rows_in(args.file)
    prompts = _by_prompt(rows)
    ranked = [_ranked(group) for group in prompts.values()]
    if args.output is not None:
        _write(Path(args.output), ranked)
    _print_ranks(console, ranked)
    found = {
        "separation": of_labels(console, rows),
        "best_of_n": of_draws(console, args, prompts),
        "first_error": of_first_errors(console, args, rows),
        "agreement": of_another(console, args, rows),
    }
    warn_of_few(console, found, prompts)
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
    from trl_ext.gibbs_prm.row_values import line_of

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
    shown = min(_SHOWN, len(several))
    title = f"{shown} of {len(several)} prompts with several completions"
    table = Table(
        "prompt", "best score", "best completion", "worst score", "worst completion", title=title
    )
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
