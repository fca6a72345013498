"""Train what a recipe says.

examples:
  trl_ext train rwr/quickstart
  trl_ext train my.yaml learning_rate=1e-5 output_dir=runs/a
  trl_ext train --resume runs/a
  trl_ext train my.yaml num_processes=2
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trl_ext.cli import INPUT_ERRORS
from trl_ext.cli.launcher import check_launched, launch_command, wants_processes
from trl_ext.errors import ConfigError, TrlExtError
from trl_ext.recipe import read_recipe
from trl_ext.recipe.secrets import hide_secrets
from trl_ext.recipe.shipped import recipe_names
from trl_ext.record import RECIPE, is_first_process
from trl_ext.resume import last_line

# The file in which a launched process tells the one that launched it how training ended.
_TOLD = "TRL_EXT_TOLD"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments; everything else is an override."""
    parser.usage = "%(prog)s RECIPE [--resume [DIR]] [--overwrite] [key=value ...]"
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


def run(args: argparse.Namespace) -> int:
    """Train here, or in the processes of a launcher; the last line of stderr says how it ended."""
    ending = _Ending()
    try:
        how = _train(args, ending)
    except KeyboardInterrupt as error:
        number = getattr(error, "signal", signal.SIGINT)
        code = ending.tell(f"stopped ({number.name})", 128 + number)
        # A launcher would take an orderly stop for a crash, and report it at length.
        return 0 if hasattr(error, "signal") and _TOLD in os.environ else code
    except TrlExtError as error:
        code = 2 if isinstance(error, INPUT_ERRORS) else 1
        line = ending.note(f"failed ({type(error).__name__})", code, error)
        raise type(error)(f"{error}\n{line}") from error
    except Exception as error:
        error.add_note(ending.note(f"failed ({type(error).__name__})", 1, error))
        raise
    return how if isinstance(how, int) else ending.tell(how, 0)


def _train(args: argparse.Namespace, ending: "_Ending") -> str | int:
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
    if wants_processes(recipe.launcher) and "LOCAL_RANK" not in os.environ:
        command = launch_command(recipe, _arguments(args))
        print("Launching:", " ".join(hide_secrets(command)), file=sys.stderr, flush=True)
        return _launched(command, ending)
    check_launched(recipe.launcher)
    # Said at import of a kernel that nothing here uses; it reads as if the installation had failed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from trl_ext.launch import train

    return train(recipe, resume=args.resume, overwrite=args.overwrite)


class _Ending:
    """The last line that this command prints.

    Attributes:
        output_dir: of the run; None until the recipe is read.
    """

    output_dir: Path | None = None

    def note(self, what: str, code: int, error: Exception | None = None) -> str:
        """The line; of several processes the first to end also tells it to the one above."""
        line = last_line(what, code, self.output_dir)
        if _TOLD in os.environ:
            rank = os.environ.get("RANK")
            why = "" if error is None else f"Error of process {rank}: {error}\n"
            with contextlib.suppress(FileExistsError), open(os.environ[_TOLD], "x") as told:
                told.write(f"{code}\n{why}{line}")
        return line

    def tell(self, what: str, code: int) -> int:
        """Print the line, once; the exit code."""
        if is_first_process():
            line = self.note(what, code)
            if _TOLD not in os.environ:
                print(line, file=sys.stderr, flush=True)
        return code


def _launched(command: list[str], ending: _Ending) -> int:
    """Run a launcher to its end; below its own report, say how the first process to end did."""
    with tempfile.TemporaryDirectory(prefix="trl_ext-") as folder:
        told = Path(folder) / "told"
        # In a session of its own: a Ctrl-C would reach its processes from the terminal and from
        # the launcher, and the second one ends them at once.
        launcher = subprocess.Popen(
            command, env=os.environ | {_TOLD: str(told)}, start_new_session=True
        )
        with _passing_on(launcher) as signals:
            code = launcher.wait()
        first, _, text = told.read_text().partition("\n") if told.exists() else ("", "", "")
    if signals and not first:
        return ending.tell(f"stopped ({signal.Signals(signals[0]).name})", 128 + signals[0])
    if not first or (code and int(first) == 0):
        code = 128 - code if code < 0 else code
        return ending.tell("failed (in the launcher)" if code else "finished", code)
    print(text, file=sys.stderr, flush=True)
    return int(first)


@contextlib.contextmanager
def _passing_on(launcher: subprocess.Popen) -> Iterator[list[int]]:
    """Pass the signals that end a run on to the processes of a launcher; those that came.

    Not to the launcher: it would kill what has not ended after 30 s.
    """
    import psutil

    came: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        at_once = number == signal.SIGINT in came
        came.append(number)
        with contextlib.suppress(psutil.NoSuchProcess):
            above = psutil.Process(launcher.pid)
            if at_once:
                for process in (above, *above.children(recursive=True)):
                    process.kill()
            else:
                for process in above.children() or [above]:
                    process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    earlier = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _give_back_what_resume_took(args: argparse.Namespace) -> None:
    """`--resume` may be followed by a run or a checkpoint, by the recipe or by an override."""
    after = args.resume
    if not isinstance(after, str):
        return
    if Path(after).is_dir():
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
    overwrite = ["--overwrite"] if args.overwrite else []
    return ["train", args.recipe, *overwrite, *resume, *args.overrides]
