"""A conversational completion as the text that the chat template writes behind the prompt."""

import re
from dataclasses import dataclass
from typing import Any

from trl_ext.errors import DataError

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A completion as text: the ranges that the policy wrote, and where its messages end."""

    text: str
    own: list[tuple[int, int]]
    turn_ends: list[int]


def by_policy(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant"


def render(messages: Messages, tokenizer: Any, where: str, *, open_turn: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_turn
        )
    except Exception as error:  # a template is a program: it fails in any way
        raise DataError(
            f"{where}the tokenizer's chat template cannot render {short(messages)}: {error}. Give "
            "messages that the template takes, or texts."
        ) from error


def conversation(prompt: Messages, completion: Messages, tokenizer: Any, where: str) -> Rendered:
    """The messages behind the prompt, of which the last ends with its end-of-turn token."""
    if not completion:
        return Rendered("", [], [])
    whole = render(prompt + completion, tokenizer, where, open_turn=False)

    def length_of(count: int, *, open_turn: bool) -> int:
        part = render(prompt + completion[:count], tokenizer, where, open_turn=open_turn)
        if whole.startswith(part):
            return len(part)
        raise DataError(
            f"{where}the tokenizer's chat template does not render the prompt and {count} messages "
            f"of the completion, {short(part[-40:])} at their end, as the beginning of the whole "
            "conversation. Render them yourself and give prompt and completion as texts."
        )

    begin = end = length_of(0, open_turn=True)
    own, turn_ends = [], []
    for count, message in enumerate(completion, start=1):
        start = length_of(count - 1, open_turn=True) if by_policy(message) else end
        end = length_of(count, open_turn=False)
        written = start + _written(whole[start:end], message, tokenizer)
        if by_policy(message):
            own.append((start - begin, written - begin))
        turn_ends.append((written if count == len(completion) else end) - begin)
    return Rendered(whole[begin : begin + turn_ends[-1]], own, turn_ends)


def _written(turn: str, message: dict[str, Any], tokenizer: Any) -> int:
    """Characters up to the end-of-turn token: the line break behind it is the template's alone."""
    ends = "|".join(
        map(re.escape, sorted(special_tokens(tokenizer).values(), key=len, reverse=True))
    )
    closing = re.search(rf"({ends})(?:\s|{ends})*\Z", turn) if ends else None
    if closing:
        return closing.end(1)
    content = message.get("content") or ""
    kept = len(content) - len(content.rstrip())
    return min(len(turn.rstrip()) + kept, len(turn))


def special_tokens(tokenizer: Any) -> dict[int, str]:
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return dict(named) | {
        index: str(token)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }


def short(value: Any) -> str:
    """A value as Python writes it, cut for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
