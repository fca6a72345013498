"""Train what a recipe says.

examples:
  trl_ext train rwr/quickstart
  trl_ext train my.yaml learning_rate=1e-5 output_dir=runs/a
  trl_ext train --resume runs/a
  trl_ext train my.yaml num_processes=2
"""

import argparse
import json
import logging
import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

from trl_ext.cli.ending import Ending, ended, launched
from trl_ext.cli.launcher import check_launched, launch_command, wants_processes
from trl_ext.errors import ConfigError, OutOfMemoryError
from trl_ext.recipe import Recipe, read_recipe
from trl_ext.recipe.secrets import hide_secrets
from trl_ext.recipe.shipped import recipe_names
from trl_ext.record import RECIPE
from trl_ext.rewards.process import RANK_VARIABLES
from trl_ext.smaller import BY_MICRO_BATCH, smaller_batches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments; everything else is an override."""
    parser.usage = (
        "%(prog)s RECIPE [--resume [DIR]] [--overwrite] [--probe] [--keep-batch] [key=value ...]"
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="DIR",
        help="go on from the last checkpoint in output_dir, or from this checkpoint or run",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what output_dir already holds"
    )
    parser.add_argument(
        "--probe", action="store_true", help="run the longest possible batch first: does it fit?"
    )
    parser.add_argument(
        "--keep-batch",
        action="store_true",
        help="end the run when memory runs out, instead of going on with half the micro-batch",
    )


def run(args: argparse.Namespace) -> int:
    """Train here, or in the processes of a launcher; the last line of stderr says how it ended."""
    return ended(partial(_train, args))


def _train(args: argparse.Namespace, ending: Ending) -> str | int:
    """How training ended, or the exit code of what was launched, which has told it."""
    _give_back_what_resume_took(args)
    if args.recipe is None:
        raise ConfigError(
            "train: no recipe is given. Name a YAML file, or a shipped recipe such as "
            "rwr/quickstart; `trl_ext ls` lists them."
        )
    _check_resume(args)
    recipe = read_recipe(args.recipe, args.overrides)
    ending.output_dir = Path(recipe.values["output_dir"]).expanduser()
    os.environ.update(recipe.env)  # before torch and tokenizers read theirs
    is_launched = "LOCAL_RANK" in os.environ
    if wants_processes(recipe.launcher) and not is_launched:
        command = launch_command(recipe, _arguments(args))
        print("Launching:", " ".join(hide_secrets(command)), file=sys.stderr, flush=True)
        code = launched(command, ending)
        return _train(args, ending) if ending.phase and _goes_on(args, recipe, ending) else code
    check_launched(recipe.launcher)
    # Said at import of a kernel that nothing here uses; it reads as if the installation had failed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from trl_ext.launch import train

    try:
        return train(recipe, resume=args.resume, overwrite=args.overwrite, probe=args.probe)
    except OutOfMemoryError as error:
        ending.phase = error.phase
        if is_launched or not _goes_on(args, recipe, ending, error):
            raise
    for name in RANK_VARIABLES:  # TRL sets them for a vLLM in this process
        os.environ.pop(name, None)
    # A fresh process: in this one much would still hold memory.
    program = [sys.executable, "-m", "trl_ext", *_arguments(args)]
    sys.stdout.flush()
    os.execv(sys.executable, program)


def _goes_on(
    args: argparse.Namespace, recipe: Recipe, ending: Ending, error: Exception | None = None
) -> bool:
    """Whether a run that is out of memory goes on with smaller micro-batches: then `args` do so."""
    phase, ending.phase = ending.phase, None
    smaller = smaller_batches(recipe)
    if args.keep_batch or phase not in BY_MICRO_BATCH or smaller is None:
        return False
    settings = [f"{key}={value}" for key, value in smaller.items()]
    told = "" if error is None else f"{error}\n"
    print(
        f"{told}Going on with the same batch in smaller parts: {' '.join(settings)}",
        file=sys.stderr,
        flush=True,
    )
    args.overrides += settings
    args.resume, args.overwrite = True, False
    return True


def _give_back_what_resume_took(args: argparse.Namespace) -> None:
    """`--resume` may be followed by a run or a checkpoint, by the recipe or by an override."""
    after = args.resume
    if not isinstance(after, str):
        return
    if Path(after).is_dir():
        _give_back_a_value(args)
        # The recipe's place is taken by the first override, if there is one.
        if args.recipe is None or ("=" in args.recipe and not Path(args.recipe).is_file()):
            args.overrides[:0] = [args.recipe] if args.recipe else []
            _go_on_with(Path(after), args)
    elif "=" in after:
        args.overrides.insert(0, after)
        args.resume = True
    elif after.endswith((".yaml", ".yml")) or after in recipe_names():
        args.overrides[:0] = [args.recipe] if args.recipe else []
        args.recipe, args.resume = after, True


def _give_back_a_value(args: argparse.Namespace) -> None:
    """Of `--key value` argparse does not know the key, and takes the value for the recipe."""
    if args.recipe is None or args.recipe.endswith((".yaml", ".yml")):
        return
    for key, value in pairwise(args.given):
        is_key = key.startswith("--") and "=" not in key and key in args.overrides
        if is_key and value == args.recipe and value not in recipe_names():
            args.overrides.insert(args.overrides.index(key) + 1, value)
            args.recipe = None
            return


def _go_on_with(folder: Path, args: argparse.Namespace) -> None:
    """Take the recipe from the run that is gone on with: `folder`, or what a checkpoint lies in.

    Raises:
        ConfigError: if there is none, or another command began it.
    """
    run = folder if (folder / RECIPE).is_file() else folder.resolve().parent
    if not (run / RECIPE).is_file():
        raise ConfigError(
            f"train: --resume {folder} is no run and no checkpoint of one: there is no {RECIPE} in "
            "it or above it. Give the output_dir of a run, or the recipe too."
        )
    if (run / "iterate.json").is_file():
        raise ConfigError(
            f"train: --resume {folder} holds rounds of `trl_ext iterate`. Go on with: trl_ext "
            f"iterate {run / RECIPE} --resume --rounds N"
        )
    args.recipe, args.resume = str(run / RECIPE), True if run == folder else str(folder)
    # It may have been moved, or begun from another folder.
    args.overrides.insert(0, f"output_dir={json.dumps(str(run))}")


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
    flags = {
        "--overwrite": args.overwrite,
        "--probe": args.probe,
        "--keep-batch": args.keep_batch,
    }
    given = [flag for flag, is_given in flags.items() if is_given]
    return ["train", args.recipe, *given, *resume, *args.overrides]
