"""Train the trainers side by side where the optimum is known exactly.

The same table of logits, reward, beta and number of sampled completions for each: how near it comes
to the Gibbs policy, and after how many completions. Your own too: it has the settings of the
built-in trainer that it derives from, and its own defaults where it derives from none. The exit
code is 1 if, at the default --steps and --beta, a built-in trainer does not come near.

How soon a policy is near is no ranking of algorithms: all have the same learning rate, with which
Adam moves a logit about as far in each gradient step, and some take more steps a rollout.

examples:
  trl_ext oracle-check
  trl_ext oracle-check --seeds 3 --json check.json
  trl_ext oracle-check --trainer ppo --trainer my_package.trainer:MyTrainer
"""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from trl_ext.cli.json_file import check_json_file, write_json_file

if TYPE_CHECKING:
    from trl_ext.oracle_check import Measured, Problem, Result

STEPS, BETA = 300, 1.0

_COLUMNS = (
    "policy",
    "KL(π‖π*)",
    "E[r]",
    "objective",
    "completions",
    "gradient steps",
    "completions until near",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument(
        "--trainer",
        action="append",
        metavar="NAME",
        help="train this one; may be repeated (default: grpo, reinforce, ppo and rwr)",
    )
    parser.add_argument(
        "--seeds", type=_count, default=1, metavar="N", help="train with N seeds each (default: 1)"
    )
    parser.add_argument(
        "--steps",
        type=_count,
        default=STEPS,
        metavar="N",
        help=f"rollouts, whatever gradient steps are taken on each (default: {STEPS})",
    )
    parser.add_argument(
        "--beta", type=_positive, default=BETA, help=f"coefficient of the KL (default: {BETA})"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 where a built-in trainer fails the check."""
    if args.json:
        check_json_file(Path(args.json))
    # Said at import of a kernel that nothing here uses; it reads as if the installation had failed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from trl_ext.oracle_check import SETTINGS, Problem, check, record

    problem, names = Problem(args.beta), list(dict.fromkeys(args.trainer or SETTINGS))
    results = check(problem, names, seeds=args.seeds, rollouts=args.steps, say=_say)
    draw = _markdown if args.markdown else _plain
    print(f"{_legend(args)}\n\n{draw(_rows(problem, results))}")
    if args.json:
        write_json_file(record(problem, results), Path(args.json))
    if (args.steps, args.beta) != (STEPS, BETA):
        return 0
    failures = [line for result in results if result.trainer in SETTINGS for line in _far(result)]
    print("".join(f"\nNot near: {line}" for line in failures), file=sys.stderr, end="")
    return 1 if failures else 0


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, got {text!r}")
    return number


def _say(line: str) -> None:
    """Show what goes on, to a person only."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def _far(result: "Result") -> list[str]:
    from trl_ext.oracle_check import CLOSE

    return [
        f"{result.trainer}, seed {run.seed}: KL(π‖π*) is {run.kl:.5f} at the end, and must be "
        f"below {CLOSE:g}."
        for run in result.runs
        if not run.converged
    ]


def _legend(args: argparse.Namespace) -> str:
    from trl_ext.oracle_check import CLOSE, COMPLETIONS, EVERY

    spread = "" if args.seeds == 1 else f"\nMean of {args.seeds} seeds (least to most)."
    return (
        f"β = {args.beta:g}. Each trainer samples {args.steps} rollouts of {COMPLETIONS} "
        "completions; what is said of its policy π\nis exact, by enumeration. π_ref is the policy "
        "before training, π* ∝ π_ref·exp(r/β), the objective is\nE[r] − β·KL(π‖π_ref). Near is "
        f"KL(π‖π*) < {CLOSE:g} nats, looked at every {EVERY} rollouts.{spread}"
    )


_COUNTS = ("completions", "gradient_steps")


def _rows(problem: "Problem", results: Sequence["Result"]) -> list[list[str]]:
    known = (("π*", problem.target), ("π_ref", problem.ref_logps))
    rows = [
        [name, *_exact([problem.measured(logps)]), *["–"] * (len(_COLUMNS) - 4)]
        for name, logps in known
    ]
    for result in results:
        runs = result.runs
        near = [run.completions_until_close for run in runs]
        counts = [_spread([getattr(run, c) for run in runs], "{:.0f}".format) for c in _COUNTS]
        rows.append([result.trainer, *_exact(runs), *counts, _until_near(near)])
    return rows


def _exact(of: Sequence["Measured"]) -> list[str]:
    return [
        _spread([one.kl for one in of], _two_digits),
        _spread([one.reward for one in of], "{:.4f}".format),
        _spread([one.objective for one in of], "{:.4f}".format),
    ]


def _two_digits(value: float) -> str:
    """Of a KL; what summing up leaves of one that is 0 counts as 0."""
    return "0" if abs(value) < 1e-12 else f"{value:.2g}"


def _until_near(counts: Sequence[int | None]) -> str:
    arrived = [count for count in counts if count is not None]
    if not arrived:
        return "never"
    spread = _spread(arrived, "{:.0f}".format)
    missing = len(counts) - len(arrived)
    return f"{spread}, never in {missing} of {len(counts)}" if missing else spread


def _spread(values: Sequence[float], write: Callable[[float], str]) -> str:
    """The mean, and the least and the most if they are written differently."""
    least, mean, most = write(min(values)), write(fmean(values)), write(max(values))
    return mean if least == most else f"{mean} ({least} to {most})"


def _plain(rows: Sequence[Sequence[str]]) -> str:
    table = [_COLUMNS, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    table = [_COLUMNS, ["---", *["---:"] * (len(_COLUMNS) - 1)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)
