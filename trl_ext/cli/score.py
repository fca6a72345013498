"""Score every prefix of completions with a trained policy: a process reward of each step.

The score of a prefix is β·log π(prefix)/π_ref(prefix): how much more exponentiated reward the
reference would collect behind it than from the prompt. POLICY is the output_dir of a run, whose
recipe tells β and the reference, or any model or adapter (then give --beta, and for a whole model
--reference).

FILE has `prompt` and `completion` (or `completions`) a row, texts or chat messages, and may have
`steps`, `label`, `answer` and `id`; or it is a file of ProcessBench or PRM800K. The scored rows go
to --output; after a kill the same command goes on where it was.

examples:
  trl_ext score outputs/quickstart --prompt "3 + 4 =" --completion " 8"
  trl_ext score outputs/quickstart answers.jsonl --output scored.jsonl --html scored.html
  trl_ext score ./tuned math.parquet --reference ./base --beta 0.1 --steps sentence \\
    --output scored.parquet
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.cli.numbers import count, positive
from trl_ext.errors import ConfigError

if TYPE_CHECKING:
    from trl_ext.gibbs_prm.files import Row
    from trl_ext.gibbs_prm.scored_row import ScoredRow
    from trl_ext.gibbs_prm.scorer import GibbsScorer

DTYPES = ("float32", "bfloat16", "float16", "auto")
GIVEN, REGEX = "given", "regex:"
# Of a page that a browser still scrolls smoothly; and rows shown in the terminal as they are.
PAGE_ROWS, SHOWN_ROWS = 1000, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.usage = "%(prog)s POLICY [FILE] [--output FILE] [options]"
    parser.add_argument(
        "policy", metavar="POLICY", help="a run's output_dir, a model or an adapter"
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help=".jsonl, .json, .parquet or .csv")
    text = parser.add_argument_group("one completion, in place of FILE")
    text.add_argument("--prompt", metavar="TEXT")
    text.add_argument("--completion", metavar="TEXT", action="append", help="repeatable")
    models = parser.add_argument_group("models")
    models.add_argument(
        "--reference",
        metavar="MODEL",
        help="default: what the run began with; of an adapter, the model without it",
    )
    models.add_argument("--tokenizer", metavar="MODEL", help="default: the policy's")
    models.add_argument("--beta", type=positive, metavar="B", help="default: that of the run")
    models.add_argument(
        "--temperature", type=positive, metavar="T", help="of the logits; default: that of the run"
    )
    models.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="default: float32")
    models.add_argument("--device", help="default: cuda if there is one, else cpu")
    models.add_argument(
        "--max-tokens", type=count, default=4096, metavar="N", help="of a batch (default: 4096)"
    )
    steps = parser.add_argument_group("steps")
    steps.add_argument(
        "--steps",
        metavar="HOW",
        help="newline, sentence, paragraph, token, turn, whole, regex:PATTERN (a step "
        "ends behind each match), or given: the file's own (default: given where there are some, "
        "else newline)",
    )
    steps.add_argument(
        "--append-eos", action="store_true", help="score the end of each text as well"
    )
    output = parser.add_argument_group("input and output")
    output.add_argument(
        "--format",
        default="auto",
        choices=("auto", "plain", "processbench", "prm800k"),
        help="of FILE (default: told by its keys)",
    )
    output.add_argument("--output", metavar="FILE", help=".jsonl or .parquet")
    output.add_argument("--html", metavar="FILE", help="a page with coloured tokens")
    output.add_argument("--force", action="store_true", help="replace files that exist")


def run(args: argparse.Namespace) -> int:
    """Check everything that needs no model; score; write."""
    steps = _steps(args.steps)
    _check_files(args)
    _check_rows(args, steps)
    from trl_ext.cli.generate_experts import check_device, quiet_loading

    quiet_loading()
    from trl_ext.gibbs_prm.scorer import GibbsScorer

    check_device(args.device)
    scorer = GibbsScorer(
        args.policy,
        args.reference,
        args.tokenizer,
        args.beta,
        temperature=args.temperature,
        dtype=args.dtype,
        device=args.device,
        max_tokens=args.max_tokens,
    )
    _introduce(scorer)
    _end(args, _scored(args, scorer, steps), scorer)
    return 0


def _steps(given: str | None) -> Any:
    if given is None or given == GIVEN:
        return given
    from trl_ext.gibbs_prm.steps import check_steps

    steps: Any = given
    if given.startswith(REGEX):
        steps = {"regex": given.removeprefix(REGEX)}
    check_steps(steps)
    return steps


def _check_files(args: argparse.Namespace) -> None:
    is_text = args.prompt is not None or args.completion is not None
    if is_text and (args.prompt is None or args.completion is None):
        raise ConfigError("score: --prompt and --completion go together. Give both.")
    if is_text == (args.file is not None):
        raise ConfigError(
            "score: give FILE, or --prompt TEXT and --completion TEXT"
            + ("; not both." if is_text else ".")
        )
    from trl_ext.cli.generate_output import check_file
    from trl_ext.cli.score_output import check_all, check_apart
    from trl_ext.gibbs_prm.scored_file import check_output

    output = None if args.output is None else Path(args.output)
    partial = None if output is None else f"{output}.partial"
    check_apart(
        {
            "FILE": args.file,
            "--output": output,
            "--html": args.html,
            "what is under way": partial,
        }
    )
    check_all(
        lambda: output and check_output(output, args.force),
        lambda: check_file(args.html, "--html", args.force),
    )


def _check_rows(args: argparse.Namespace, steps: Any) -> None:
    """A mistake in the first rows costs no loading of models."""
    from trl_ext.gibbs_prm.files import read_rows
    from trl_ext.gibbs_prm.rows_to_score import check_first

    rows = _rows(args)
    rows = rows if isinstance(rows, list) else read_rows(rows, format=args.format)
    check_first(rows, steps, is_written=args.output is not None)


def _rows(args: argparse.Namespace) -> "str | list[Row]":
    from trl_ext.gibbs_prm.files import Row

    return [Row(args.prompt, args.completion)] if args.file is None else args.file


def _scored(
    args: argparse.Namespace, scorer: "GibbsScorer", steps: Any
) -> "list[ScoredRow] | None":
    """The scored rows; None where they are in --output."""
    from trl_ext.cli.score_output import Progress
    from trl_ext.gibbs_prm.files import read_rows
    from trl_ext.gibbs_prm.streaming import score_rows
    from trl_ext.gibbs_prm.to_file import score_to_file

    options: dict[str, Any] = {"append_eos": args.append_eos}
    rows, progress, scored = _rows(args), Progress(), []
    with progress:
        if args.output is None:
            rows = rows if isinstance(rows, list) else read_rows(rows, format=args.format)
            for part in score_rows(scorer, rows, steps, **options):
                scored += part
                progress(part, len(scored))
            return scored
        options |= {"format": args.format, "force": args.force, "watch": progress}
        try:
            score_to_file(scorer, rows, args.output, steps, **options)
        except KeyboardInterrupt:
            print(
                f"{progress.done} completions are kept in {args.output}.partial; the same command "
                "goes on there.",
                file=sys.stderr,
            )
            raise
    return None


def _introduce(scorer: "GibbsScorer") -> None:
    for name, what in scorer.names.items():
        print(f"{name}: {what}")
    print(f"beta: {scorer.beta:g}, temperature: {scorer.temperature:g}")
    for note in scorer.notes:
        print(f"note: {note}")


def _end(args: argparse.Namespace, scored: "list[ScoredRow] | None", scorer: "GibbsScorer") -> None:
    """Tables of a few completions, a summary of many, the page, and the next command."""
    from trl_ext.cli.score_output import (
        HOW_TO_READ,
        StoredRows,
        page,
        print_summary,
        print_tables,
    )

    rows = scored if scored is not None else StoredRows(Path(args.output))
    if scored is not None and len(scored) <= SHOWN_ROWS:
        print_tables(scored)
    else:
        print_summary(rows)
    print(HOW_TO_READ)
    if args.html is not None:
        page(rows, Path(args.html), scorer, args.file, PAGE_ROWS)
    if args.output is not None:
        print(f"{args.output}: written. Ranks, best of n, first errors: trl_ext rank {args.output}")
