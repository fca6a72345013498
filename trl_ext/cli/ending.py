"""How `train` and `iterate` end: the last line, and what the processes that they launch say."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from trl_ext.cli import exit_code
from trl_ext.errors import TrlExtError
from trl_ext.record import RunRecord, is_first_process
from trl_ext.resume import last_line

# The file in which a launched process tells the one that launched it how training ended.
TOLD = "TRL_EXT_TOLD"


class Ending:
    """The last line that this command prints.

    Attributes:
        output_dir: of the run; None until the recipe is read.
        phase: in which it ran out of memory; None if it did not.
        goes_on: the command that goes on with it; None: `trl_ext train --resume`.
    """

    output_dir: Path | None = None
    phase: str | None = None
    goes_on: str | None = None

    def note(self, what: str, code: int, error: Exception | None = None) -> str:
        """The line; of several processes the first to end also tells it to the one above."""
        line = self._line(what, code)
        if TOLD in os.environ:
            rank = os.environ.get("RANK")
            why = "" if error is None else f"Error of process {rank}: {error}\n"
            with contextlib.suppress(FileExistsError), open(os.environ[TOLD], "x") as told:
                told.write(f"{code} {self.phase or ''}".strip() + f"\n{why}{line}")
        return line

    def _line(self, what: str, code: int) -> str:
        if self.goes_on is None or code in (0, 2) or self.output_dir is None:
            return last_line(what, code, self.output_dir)
        line = last_line(what, code, None)
        return f"{line}; resume: {self.goes_on}" if RunRecord(self.output_dir).is_run else line

    def tell(self, what: str, code: int) -> int:
        """Print the line, once; the exit code."""
        if is_first_process():
            line = self.note(what, code)
            if TOLD not in os.environ:
                print(line, file=sys.stderr, flush=True)
        return code


def ended(command: Callable[[Ending], str | int]) -> int:
    """Run a command's body; the last line of stderr says how it ended.

    Args:
        command: says how it ended, or the exit code of what was launched, which has told it.

    Returns:
        The exit code: that of a signal which ended the body, 0, or what was launched.

    Raises:
        TrlExtError: as the body, with that line below.
    """
    ending = Ending()
    try:
        how = command(ending)
    except KeyboardInterrupt as error:
        number = getattr(error, "signal", signal.SIGINT)
        code = ending.tell(f"stopped ({number.name})", 128 + number)
        # A launcher would take an orderly stop for a crash, and report it at length.
        return 0 if hasattr(error, "signal") and TOLD in os.environ else code
    except TrlExtError as error:
        code = exit_code(error)
        line = ending.note(f"failed ({type(error).__name__})", code, error)
        raise type(error)(f"{error}\n{line}") from error
    except Exception as error:
        error.add_note(ending.note(f"failed ({type(error).__name__})", 1, error))
        raise
    return how if isinstance(how, int) else ending.tell(how, 0)


class _Terminated(KeyboardInterrupt):
    signal = signal.SIGTERM


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """A SIGTERM ends the body as Ctrl-C does, with an exit code of its own."""

    def interrupt(number: int, frame: object) -> None:
        raise _Terminated

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def launched(command: list[str], ending: Ending) -> int:
    """Run a launcher to its end; below its own report, say how the first process to end did."""
    with tempfile.TemporaryDirectory(prefix="trl_ext-") as folder:
        told = Path(folder) / "told"
        # In a session of its own: a Ctrl-C would reach its processes from the terminal and from
        # the launcher, and the second one ends them at once.
        launcher = subprocess.Popen(
            command, env=os.environ | {TOLD: str(told)}, start_new_session=True
        )
        with _passing_on(launcher) as signals:
            code = launcher.wait()
        first, _, text = told.read_text().partition("\n") if told.exists() else ("", "", "")
        first, _, phase = first.partition(" ")
        ending.phase = phase or None
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
