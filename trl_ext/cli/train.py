"""Train what a recipe says.

examples:
  trl_ext train rwr/quickstart
  trl_ext train my.yaml learning_rate=1e-5 output_dir=runs/a
  trl_ext train my.yaml --resume
  trl_ext train my.yaml num_processes=2
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from trl_ext.cli.launcher import check_launched, launch_command, wants_processes
from trl_ext.errors import ConfigError
from trl_ext.recipe import read_recipe
from trl_ext.recipe.secrets import hide_secrets
from trl_ext.recipe.shipped import recipe_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments; everything else is an override."""
    parser.usage = "%(prog)s RECIPE [--resume [CHECKPOINT]] [--overwrite] [key=value ...]"
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from the last checkpoint in output_dir, or from this one",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what output_dir already holds"
    )


def run(args: argparse.Namespace) -> int:
    """Train here, or replace this process by a launcher that runs this command several times."""
    _give_back_what_resume_took(args)
    if args.recipe is None:
        raise ConfigError(
            "train: no recipe is given. Name a YAML file, or a shipped recipe such as "
            "rwr/quickstart; `trl_ext ls` lists them."
        )
    _check_resume(args)
    recipe = read_recipe(args.recipe, args.overrides)
    os.environ.update(recipe.env)  # before torch and tokenizers read theirs
    if wants_processes(recipe.launcher) and "LOCAL_RANK" not in os.environ:
        command = launch_command(recipe, _arguments(args))
        print("Launching:", " ".join(hide_secrets(command)), file=sys.stderr, flush=True)
        os.execv(command[0], command)
    check_launched(recipe.launcher)
    # Said at import of a kernel that nothing here uses; it reads as if the installation had failed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from trl_ext.launch import train

    train(recipe, resume=args.resume, overwrite=args.overwrite)
    return 0


def _give_back_what_resume_took(args: argparse.Namespace) -> None:
    """`--resume` may be followed by a checkpoint, but also by the recipe or by an override."""
    after = args.resume
    if not isinstance(after, str) or Path(after).is_dir():
        return
    if "=" in after:
        args.overrides.insert(0, after)
        args.resume = True
    elif after.endswith((".yaml", ".yml")) or after in recipe_names():
        # The recipe's place was taken by the first override, if there is one.
        args.overrides[:0] = [args.recipe] if args.recipe else []
        args.recipe, args.resume = after, True


def _check_resume(args: argparse.Namespace) -> None:
    if args.resume == "":
        raise ConfigError(
            "train: --resume '' names no checkpoint. Give --resume alone for the last one in "
            "output_dir, or a checkpoint's folder."
        )
    if args.resume and args.overwrite:
        raise ConfigError(
            "train: --resume goes on with the run that output_dir holds, and --overwrite replaces "
            "it. Choose one."
        )


def _arguments(args: argparse.Namespace) -> list[str]:
    """This command line again, for the processes that are launched."""
    resume = [] if args.resume is False else ["--resume"]
    resume += [args.resume] if isinstance(args.resume, str) else []
    overwrite = ["--overwrite"] if args.overwrite else []
    return ["train", args.recipe, *overwrite, *resume, *args.overrides]
