"""What a completion says: its text, and the answer in it."""

import re
from collections.abc import Sequence
from typing import Any

NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?")
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: itself, or what the last of its messages says."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, list):
        return "".join(block.get("text", "") for block in content)
    return content or ""


def strict_answer(text: str, expected: str | None) -> str:
    """The whole text without surrounding white space."""
    return text.strip()


def lenient_answer(text: str, expected: str | None) -> str:
    """The tagged answer; else the last number, where one is expected; else the first line."""
    tagged = TAGGED.findall(text)
    if tagged:
        return tagged[-1].strip()
    if expected is not None and NUMBER.fullmatch(expected):
        numbers = NUMBER.findall(text)
        if numbers:
            # A thousands separator is the reader's habit, not part of the task's answer.
            return numbers[-1] if "," in expected else numbers[-1].replace(",", "")
    return text.strip().partition("\n")[0].rstrip()
