"""From a prompt and a completion to token ids, and to where each token ends in the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.chat import (
    Messages,
    Rendered,
    conversation,
    render,
    short,
    special_tokens,
)
from trl_ext.gibbs_prm.decoding import common, decode
from trl_ext.gibbs_prm.said import check_said


@dataclass(frozen=True)
class Encoded:
    """A prompt and its completion as a causal model reads them; T tokens of completion.

    Attributes:
        prompt_ids: at least one.
        completion_ids: T of them, tokenised apart from the prompt, as a policy generates them.
        text: of the completion, special tokens included.
        tokens: T texts; joined they are `text`. A character of several tokens belongs to the
            token that completes it, and the others are empty.
        token_ends: T numbers of characters, non-decreasing: where each token ends in `text`.
        is_own: T of them, whether the policy wrote the token: False in what a user, a tool or the
            chat template put into a conversational completion.
        turn_ends: where each message of a conversational completion ends in `text`; [] of a text.
        end_text: of the special tokens that `text` ends with, such as "<|im_end|>".
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    text: str
    tokens: list[str]
    token_ends: list[int]
    is_own: list[bool]
    turn_ends: list[int]
    end_text: str = ""


def encode(
    prompt: str | Messages,
    completion: str | Messages,
    tokenizer: Any,
    *,
    completion_ids: Sequence[int] | None = None,
    append_eos: bool = False,
    row: int | None = None,
) -> Encoded:
    """Tokenise a prompt and its completion, each by itself, as TRL's online trainers see them.

    A conversational completion is what the chat template writes behind the prompt and its
    generation prompt, up to the end-of-turn token of the last message.

    Args:
        prompt: a text, or messages {role, content}.
        completion: of the same kind; it may be empty.
        tokenizer: of the policy.
        completion_ids: as generated; then they are used as they are, and the text of the
            completion is what they decode to.
        append_eos: end a completion that is a text with the end-of-sequence token, unless it is
            there; no effect on messages and on `completion_ids`.
        row: of the data, counted from 0, for errors.

    Raises:
        DataError: if prompt or completion is neither text nor messages, or they are of two kinds,
            hold half a character, or the prompt has no token; if the chat template does not
            render the prompt as the beginning of the conversation, or the ids decode to
            something else than several messages say.
        ConfigError: if the tokenizer lacks the chat template or the end-of-sequence token needed.
    """
    where = "" if row is None else f"row {row}: "
    check_said(prompt, completion, where)
    if isinstance(prompt, list) and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{where}the prompt is a list of messages, and the tokenizer has no chat template. "
            "Give prompt and completion as texts, or set tokenizer.chat_template."
        )
    prompt_ids = _prompt_ids(prompt, tokenizer, where)
    if isinstance(prompt, list) and isinstance(completion, list):
        rendered = conversation(prompt, completion, tokenizer, where)
    else:
        rendered = Rendered(str(completion), [(0, len(completion))], [])
    if completion_ids is not None:
        ids = _checked_ids(completion_ids, where)
        text, ends = decode(ids, tokenizer)
    else:
        ids, text, ends = _tokenise(rendered.text, tokenizer)
        if append_eos and isinstance(completion, str):
            ids, text, ends = _with_eos(ids, text, ends, tokenizer)
    rendered = _fitted(rendered, text, where)
    tokens = [text[begin:end] for begin, end in pairwise([0, *ends])]
    own = _is_own(rendered, ends)
    end_text = _end_text(ids, tokens, tokenizer)
    return Encoded(prompt_ids, ids, text, tokens, ends, own, rendered.turn_ends, end_text)


def _prompt_ids(prompt: str | Messages, tokenizer: Any, where: str) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer(text=prompt)["input_ids"]
    else:
        text = render(prompt, tokenizer, where, open_turn=True)
        ids = tokenizer(text=text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError(
            f"{where}the prompt {short(prompt)} has no token, so that the model has nothing to "
            "condition the first token of the completion on. Begin the prompt with some text, such "
            "as the tokenizer's bos_token."
        )
    return list(ids)


def _checked_ids(ids: Sequence[int], where: str) -> list[int]:
    wrong = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or i < 0]
    if wrong:
        raise DataError(
            f"{where}completion_ids holds {wrong[0]!r}; it must be a list of token ids, whole "
            "numbers from 0. Leave padding out, and give tensor.tolist() of a tensor."
        )
    return list(ids)


def _tokenise(text: str, tokenizer: Any) -> tuple[list[int], str, list[int]]:
    """Ids, and where their tokens end in the text: this one, or what a slow tokenizer makes of it.

    A token ends where the next one begins at the latest: all tokens of one character have its
    place. What a tokenizer drops between two tokens goes to the second.
    """
    if not getattr(tokenizer, "is_fast", False):
        ids = list(tokenizer(text=text, add_special_tokens=False)["input_ids"])
        return ids, *decode(ids, tokenizer)
    encoding = tokenizer(text=text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = list(encoding["input_ids"]), encoding["offset_mapping"]
    if not ids:
        return [], "", []
    ends: list[int] = []
    for (_, end), (following, _) in pairwise(places):
        ends.append(max(min(end, following), ends[-1] if ends else 0))
    return ids, text, [*ends, len(text)]


def _with_eos(
    ids: list[int], text: str, ends: list[int], tokenizer: Any
) -> tuple[list[int], str, list[int]]:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "append_eos is True, and the tokenizer has no end-of-sequence token. Set "
            "tokenizer.eos_token, or append_eos to False."
        )
    if ids and ids[-1] == tokenizer.eos_token_id:
        return ids, text, ends
    text += tokenizer.eos_token
    return [*ids, tokenizer.eos_token_id], text, [*ends, len(text)]


def _fitted(rendered: Rendered, text: str, where: str) -> Rendered:
    """`rendered` for the text that the ids have: a generation may lack its end, or go on."""
    if rendered.text == text:
        return rendered
    if len(rendered.turn_ends) <= 1:
        turn_ends = [len(text)] if rendered.turn_ends else []
        return Rendered(text, [(0, len(text))], turn_ends)
    same = common(rendered.text, text) == min(len(rendered.text), len(text))
    if not same or len(text) <= rendered.turn_ends[-2]:
        raise DataError(
            f"{where}the ids of the completion decode to {short(text)}, and its messages are "
            f"{short(rendered.text)} in the tokenizer's chat template. Leave completion_ids out, "
            "or give prompt and completion as texts."
        )
    (start, _), end = rendered.own[-1], len(text)
    own = [*rendered.own[:-1], (start, end)]
    return Rendered(text, own, [*rendered.turn_ends[:-1], end])


def _is_own(rendered: Rendered, ends: list[int]) -> list[bool]:
    """Whether the character that each token begins with, or is a part of, is the policy's."""
    last = len(rendered.text) - 1
    starts = [min(start, last) for start in [0, *ends[:-1]][: len(ends)]]
    return [any(a <= start < b for a, b in rendered.own) for start in starts]


def _end_text(ids: list[int], tokens: list[str], tokenizer: Any) -> str:
    special = special_tokens(tokenizer)
    count = next((n for n, i in enumerate(reversed(ids)) if i not in special), len(ids))
    return "".join(tokens[len(tokens) - count :])
