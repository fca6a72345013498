"""Grade every KL penalty exactly, your own too.

Bias and standard deviation of its value and of its gradient, on- and off-policy, and how far from
the optimum training with it ends, by enumeration on a language small enough for that.

examples:
  trl_ext kl-table
  trl_ext kl-table --quick --json table.json
  trl_ext kl-table --method my_module:my_estimate --placement reward
"""

import argparse
import sys
from pathlib import Path

from trl_ext.cli.json_file import check_json_file, write_json_file

QUICK_STEPS, STEPS = 300, 1500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument(
        "--method",
        metavar="MODULE:FUNCTION",
        help="grade your own too: (logps, ref_logps) -> one number a token, all (B, T)",
    )
    parser.add_argument(
        "--placement",
        choices=("loss", "reward"),
        default="loss",
        help="where your own goes (default: loss)",
    )
    parser.add_argument("--quick", action="store_true", help="train less for the last column")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 where a claim of unbiasedness is contradicted."""
    from trl_ext.kl_table import OTHERS, OURS, graded, markdown

    if args.json:
        check_json_file(Path(args.json))
    methods = [*OURS, *OTHERS, *_own(args)]
    rows = graded(methods, steps=QUICK_STEPS if args.quick else STEPS)
    note = f" Here it trained for {QUICK_STEPS} steps only, short of rest." if args.quick else ""
    print(markdown(rows, note))
    if args.json:
        write_json_file([row.record() for row in rows], Path(args.json))
    contradictions = [line for row in rows for line in row.contradictions]
    print("".join(f"\nContradicted: {line}" for line in contradictions), file=sys.stderr, end="")
    return 1 if contradictions else 0


def _own(args: argparse.Namespace) -> list:
    if args.method is None:
        return []
    from trl_ext.kl_table import Bench, user_method
    from trl_ext.registry import KL_ESTIMATORS

    method = user_method(args.method, KL_ESTIMATORS.load(args.method), args.placement)
    Bench().grade(method)  # a mistake in it shows now, not after the others are graded
    return [method]
