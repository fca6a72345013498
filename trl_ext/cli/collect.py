"""Sample completions of a recipe's prompts, score them, and write them.

The model, the prompts, the rewards and the sampling settings are the recipe's; nothing is trained.
A kill loses no more than one batch: the same command goes on, and ends with the same file.

examples:
  trl_ext collect rwr/quickstart
  trl_ext collect my.yaml --output pairs.jsonl --as preferences num_generations=16
  trl_ext collect my.yaml --split test --limit 100 model_name_or_path=outputs/quickstart
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trl_ext.cli.ending import sigterm_interrupts
from trl_ext.cli.launcher import launch_command, wants_processes
from trl_ext.cli.numbers import count
from trl_ext.recipe import read_recipe
from trl_ext.recipe.secrets import hide_secrets

if TYPE_CHECKING:
    from trl_ext.recipe import Recipe

# What a file is called if nobody says: by what it holds.
NAMES = {"completions": "collected", "preferences": "preferences", "rankings": "rankings"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments; everything else is an override."""
    parser.usage = "%(prog)s RECIPE [--output FILE] [options] [key=value ...]"
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=".jsonl or .parquet (default: collected.jsonl beside the recipe's output_dir)",
    )
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--limit", type=count, metavar="N", help="the first N prompts only")
    parser.add_argument(
        "--as",
        dest="form",
        choices=tuple(NAMES),
        default="completions",
        help="a row a completion; the best and the worst of each prompt; or all with their scores",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the file, and what is under way of it"
    )


def run(args: argparse.Namespace) -> int:
    """Collect here, or replace this process by a launcher that runs this command several times."""
    recipe = read_recipe(args.recipe, args.overrides)
    if (launcher := to_launch(recipe, ["collect", *_arguments(args)])) is not None:
        os.execv(launcher[0], launcher)
    quieten()
    from trl_ext.collect import collect
    from trl_ext.record import is_first_process

    output = _output(args, recipe)
    with sigterm_interrupts():
        summary, written = collect(
            recipe, output, split=args.split, limit=args.limit, form=args.form, force=args.force
        )
    if is_first_process():
        print(summary.table(f"{written:,} {args.form}"))
        print(f"{output}: written.", flush=True)
    end_processes()
    return 0


def to_launch(recipe: "Recipe", command: list[str]) -> list[str] | None:
    """Set what must be set before torch is imported; the launcher's command line, or None: here."""
    os.environ.update(recipe.env)
    if not wants_processes(recipe.launcher) or "LOCAL_RANK" in os.environ:
        return None
    launcher = launch_command(recipe, command)
    print("Launching:", " ".join(hide_secrets(launcher)), file=sys.stderr, flush=True)
    return launcher


def quieten() -> None:
    """Before the imports that say something."""
    from trl_ext.cli.generate_experts import quiet_loading

    quiet_loading()
    from trl_ext.launch import silence_what_no_user_can_mend

    silence_what_no_user_can_mend()


def end_processes() -> None:
    """Disconnect from the other processes, if there are any."""
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()


def _output(args: argparse.Namespace, recipe: "Recipe") -> Path:
    if args.output is not None:
        return Path(args.output).expanduser()
    beside = Path(recipe.values["output_dir"]).expanduser().parent
    beside.mkdir(parents=True, exist_ok=True)
    return beside / f"{NAMES[args.form]}.jsonl"


def _arguments(args: argparse.Namespace) -> list[str]:
    """This command line again, for the processes that are launched."""
    given = {"--output": args.output, "--split": args.split, "--limit": args.limit}
    named = [f"{key}={value}" for key, value in given.items() if value is not None]
    force = ["--force"] if args.force else []
    return [args.recipe, *named, f"--as={args.form}", *force, *args.overrides]
