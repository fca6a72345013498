"""The command `trl_ext`: one file a command, and nothing heavy imported until one needs it.

Here is the shell: which command runs, what an error looks like, which exit code.
"""

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from trl_ext import __version__
from trl_ext.errors import (
    ConfigError,
    DataError,
    MissingDependencyError,
    OutOfMemoryError,
    PluginError,
    TrlExtError,
    UnknownNameError,
)

__all__ = ["main"]

# Name -> what it does. Each is a module here with `add_arguments(parser)` and `run(args)`; one
# that reads a recipe takes `args.overrides`, whatever its own parser does not know.
COMMANDS = {
    "train": "Train what a recipe says.",
    "collect": "Sample completions of a recipe's prompts, score them, and write them.",
    "iterate": "Collect, score and fit offline, round after round.",
    "validate": "Check a recipe; report everything that is wrong with it.",
    "plan": "Say whether a recipe fits a card, and what makes it fit.",
    "show": "Print the merged recipe, and where each value comes from.",
    "ls": "List the shipped recipes.",
    "cp": "Copy a shipped recipe, to change it.",
    "generate": "Answer prompts with a product of experts, beside each expert alone.",
    "score": "Score every prefix of completions with a trained policy.",
    "rank": "Rank scored completions within their prompts, and judge the scores by what is known.",
    "count": "Count an n-gram or naive Bayes expert from a corpus.",
    "kl-table": "Grade every KL penalty exactly, your own too.",
    "oracle-check": "Train the trainers side by side where the optimum is known exactly.",
    "env": "Print versions and devices, for a bug report.",
}
_TAKE_OVERRIDES = ("train", "collect", "iterate", "validate", "plan", "show")
INPUT_ERRORS = (ConfigError, DataError, MissingDependencyError, PluginError, UnknownNameError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        0, or 2 where the input is wrong, 1 where the run failed, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or os.environ.get("TRL_EXT_DEBUG") == "1"
    if debug:
        os.environ["TRL_EXT_DEBUG"] = "1"  # for the processes that train launches
    argv = [token for token in argv if token != "--debug"]
    _see_current_folder()
    try:
        code = _run(argv)
        sys.stdout.flush()  # a pipe that is closed shows here, and not when Python exits
        return code
    except (TrlExtError, KeyboardInterrupt, BrokenPipeError) as error:
        if debug:
            raise
        return _report(error)


def _run(argv: list[str]) -> int:
    parser = _parser()
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv or ["--help"])  # exits after --help and --version
    command = importlib.import_module(f"trl_ext.cli.{argv[0].replace('-', '_')}")
    own = argparse.ArgumentParser(
        prog=f"trl_ext {argv[0]}",
        description=command.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(own)
    if argv[0] in _TAKE_OVERRIDES:
        args, args.overrides = own.parse_known_args(argv[1:])
        args.given = argv[1:]  # in the order that argparse forgets
    else:
        args = own.parse_args(argv[1:])
    return command.run(args)


def _command(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise argparse.ArgumentTypeError(
        f"there is no command {name!r}.{hint} Commands: {', '.join(COMMANDS)}"
    )


def _see_current_folder() -> None:
    """Let `package.module:object` name files here; last, so that they hide no installed package."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def _report(error: BaseException) -> int:
    if isinstance(error, BrokenPipeError):
        # The reader (`| head`) has left; keep Python from failing once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    print(f"Error: {error}", file=sys.stderr)
    return exit_code(error)


def exit_code(error: BaseException) -> int:
    """2: for a person to mend; 3: too little memory; 1: what went wrong on the way."""
    if isinstance(error, OutOfMemoryError):
        return 3
    return 2 if isinstance(error, INPUT_ERRORS) else 1


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl_ext",
        usage="trl_ext COMMAND [arguments]",
        description="Algorithms around the Gibbs policy, as plugins on top of Hugging Face TRL.",
        epilog=f"commands:\n{listed}\n\n`trl_ext COMMAND --help` says more; `--debug` shows "
        "tracebacks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", type=_command, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"trl_ext {__version__}")
    return parser
