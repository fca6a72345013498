"""What a prompt and a completion may be, before a tokenizer takes them."""

import json
from collections.abc import Iterator
from typing import Any

from trl_ext.errors import DataError
from trl_ext.gibbs_prm.chat import by_policy, short


def check_said(prompt: Any, completion: Any, where: str = "") -> None:
    """Whether both are texts, or both messages, that a tokenizer may take.

    Args:
        prompt, completion: of one row.
        where: what an error begins with.

    Raises:
        DataError: if not.
    """
    for what, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str | list):
            raise DataError(
                f"{where}the {what} is {short(value)}, a {type(value).__name__}; it must be a "
                'text or a list of messages {"role": "user", "content": "…"}.'
            )
        for text in [value] if isinstance(value, str) else _contents(value, f"{where}the {what}"):
            _check_characters(text, f"{where}the {what}")
    if isinstance(prompt, str) != isinstance(completion, str):
        kinds = ("a text", "a list of messages")
        this, other = kinds if isinstance(prompt, str) else kinds[::-1]
        raise DataError(
            f"{where}the prompt is {this} and the completion is {other}. Write both in one way."
        )
    if prompt == []:
        raise DataError(f"{where}the prompt is an empty list; it must hold a message.")
    if completion and isinstance(completion, list) and not any(map(by_policy, completion)):
        raise DataError(
            f"{where}the completion has no message with the role 'assistant': nothing in it is "
            "the policy's, so nothing can be scored."
        )


def _contents(messages: list[Any], what: str) -> Iterator[str]:
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{what}: message {index} is {short(message)}; it must be "
                '{"role": "user", "content": "…"}.'
            )
        content = message.get("content")
        # A turn that only calls tools says nothing. Parts (a list) would be printed as Python's
        # list by most templates of text models.
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError(
                f"{what}: the content of message {index} is {short(content)}; it must be a text. "
                "Join the texts of a message that has several parts."
            )
        yield content or ""
        # Names, roles and tools' arguments, which a template may write.
        yield json.dumps(message, ensure_ascii=False, default=str)


def _check_characters(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} has half a character, {text[error.start]!r}, at {error.start}, which no "
            "tokenizer takes. Repair it, for example with text.encode('utf-8', 'replace').decode()."
        ) from error
