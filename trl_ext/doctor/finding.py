"""One finding of the doctor."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What was looked at, how bad it is, and what to do.

    Attributes:
        name: what was looked at.
        level: "ok"; "note": nothing is wrong, but some runs need to know; "warning": some runs
            will fail or be slow; "error": something is broken.
        says: what was found, with the value.
        do: the next step; empty where there is none.
    """

    name: str
    level: Literal["ok", "note", "warning", "error"]
    says: str
    do: str = ""
