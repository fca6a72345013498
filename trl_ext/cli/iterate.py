"""Collect, score and fit offline, round after round.

The recipe has trainer: offline_rwr, prompts and rewards. reference: moving tilts the policy of each
round by exp(r/beta) once more; reference: fixed goes on towards the one target
pi_0 * exp(r/beta), by importance weights. Each round is a folder of output_dir, a run of its own;
after a kill --resume goes on in the middle of it, and with a larger --rounds behind the last.

examples:
  trl_ext iterate my.yaml --rounds 3
  trl_ext iterate my.yaml --rounds 5 --resume
"""

import argparse
import shlex
from functools import partial
from pathlib import Path

from trl_ext.cli.collect import end_processes, quieten, to_launch
from trl_ext.cli.ending import Ending, ended, launched, sigterm_interrupts
from trl_ext.cli.numbers import count
from trl_ext.environment import command_name
from trl_ext.errors import ConfigError
from trl_ext.recipe import read_recipe
from trl_ext.record import RECIPE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments; everything else is an override."""
    parser.usage = "%(prog)s RECIPE --rounds N [--resume] [--overwrite] [key=value ...]"
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "--rounds", type=count, required=True, metavar="N", help="how many there are to be"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the rounds that output_dir holds"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what output_dir already holds"
    )


def run(args: argparse.Namespace) -> int:
    """Iterate here, or in the processes of a launcher; the last line of stderr says how it went."""
    return ended(partial(_iterate, args))


def _iterate(args: argparse.Namespace, ending: Ending) -> str | int:
    """How it ended, or the exit code of what was launched, which has told it."""
    if args.resume and args.overwrite:
        raise ConfigError(
            "iterate: --resume goes on with the rounds that output_dir holds, and --overwrite "
            "replaces them. Choose one."
        )
    recipe = read_recipe(args.recipe, args.overrides)
    ending.output_dir = Path(recipe.values["output_dir"]).expanduser()
    ending.goes_on = (
        f"{command_name()} iterate {shlex.quote(str(ending.output_dir / RECIPE))} "
        f"--rounds {args.rounds} --resume"
    )
    flags = ["--resume"] * args.resume + ["--overwrite"] * args.overwrite
    command = ["iterate", args.recipe, f"--rounds={args.rounds}", *flags, *args.overrides]
    if (launch := to_launch(recipe, command)) is not None:
        return launched(launch, ending)
    quieten()
    from trl_ext.iterate import iterate
    from trl_ext.record import is_first_process

    with sigterm_interrupts():
        rounds, table = iterate(recipe, args.rounds, resume=args.resume, overwrite=args.overwrite)
    if is_first_process():
        print(table)
        folder = ending.output_dir / f"round-{rounds[-1].number}"
        print(f"The policy of the last round is in {folder}.", flush=True)
    end_processes()
    return "finished"
