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

from trl_ext.cli.collect import end_processes, prepare
from trl_ext.cli.numbers import count
from trl_ext.errors import ConfigError
from trl_ext.recipe import read_recipe


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
    """Iterate here, or replace this process by a launcher that runs this command several times."""
    if args.resume and args.overwrite:
        raise ConfigError(
            "iterate: --resume goes on with the rounds that output_dir holds, and --overwrite "
            "replaces them. Choose one."
        )
    recipe = read_recipe(args.recipe, args.overrides)
    flags = ["--resume"] * args.resume + ["--overwrite"] * args.overwrite
    command = ["iterate", args.recipe, f"--rounds={args.rounds}", *flags, *args.overrides]
    prepare(recipe, command)
    from trl_ext.iterate import iterate
    from trl_ext.record import is_first_process

    rounds, table = iterate(recipe, args.rounds, resume=args.resume, overwrite=args.overwrite)
    if is_first_process():
        print(table)
        folder = f"{recipe.values['output_dir']}/round-{rounds[-1].number}"
        print(f"The policy of the last round is in {folder}.", flush=True)
    end_processes()
    return 0
