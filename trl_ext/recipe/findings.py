"""Where a value comes from, and what is wrong with it. Findings are collected and raised once."""

import difflib
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trl_ext.errors import ConfigError

_LONGEST_VALUE = 80  # a value shown in an error; longer ones are cut in the middle


@dataclass(frozen=True)
class Origin:
    """A file and a line, the command line, or the default of a class."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


COMMAND_LINE = Origin("command line")
DEFAULT = Origin("default")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one key (or, with an empty key, with a whole file)."""

    origin: Origin
    key: str
    message: str

    def __str__(self) -> str:
        key = f"{self.key}: " if self.key else ""
        return f"{self.origin}: {key}{self.message}"


def raise_if_any(findings: list[Finding], recipe: str) -> None:
    """Raise one `ConfigError` with a line for each finding.

    Raises:
        ConfigError: if there is a finding.
    """
    if not findings:
        return
    sources = list(dict.fromkeys(finding.origin.source for finding in findings))
    findings = sorted(findings, key=lambda x: (sources.index(x.origin.source), x.origin.line or 0))
    lines = list(dict.fromkeys(str(finding) for finding in findings))
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    raise ConfigError("\n".join([f"The recipe {recipe} has {count}:", *(f"  {x}" for x in lines)]))


def show_value(value: Any) -> str:
    """A value as it is written in YAML where that is shorter than Python, cut to one line."""
    words = {True: "true", False: "false", None: "null"}
    if isinstance(value, bool) or value is None:
        return words[value]
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = _LONGEST_VALUE
    return shortened.repr(value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
