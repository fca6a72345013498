"""From token ids to text, and to where each token ends in it."""

from typing import Any


def decode(ids: list[int], tokenizer: Any) -> tuple[str, list[int]]:
    """The text of ids, and where each of them ends in it."""
    text = _text_of(ids, tokenizer)
    ends = _ends_in_windows(ids, text, tokenizer)
    if ends and ends[-1] != len(text):
        # A decoder whose text of a token depends on more than the tokens near it.
        ends = [common(_text_of(ids[: i + 1], tokenizer), text) for i in range(len(ids))]
        ends = [max(ends[: i + 1]) for i in range(len(ids) - 1)] + [len(text)]
    return text, ends


def _ends_in_windows(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """Decoded behind a few tokens, one has the text that it adds; time linear in the ids."""
    ends: list[int] = []
    context = first = done = 0
    for index in range(len(ids)):
        before = _text_of(ids[context:first], tokenizer)
        new = _text_of(ids[context : index + 1], tokenizer)[len(before) :]
        length = common(new, text[done : done + len(new)])
        ends.append(max(done + length, ends[-1] if ends else 0))
        if new and length == len(new):
            context, first, done = first, index + 1, done + length
    return ends


def common(one: str, other: str) -> int:
    """Characters that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _text_of(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
