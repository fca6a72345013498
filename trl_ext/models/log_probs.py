"""Log-probabilities of given tokens, without the logits of a batch.

A forward pass gives B·S·V logits, of which the log-probability of one token each is wanted. Here
the backbone runs alone, and its head reads only the positions that predict a token asked for, a
few at a time. Rows are packed, a prompt once for all of its completions, where the model is known
to give the same so (`trl_ext.packing`); else padded on the right, where padding moves nothing.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_ext.errors import ConfigError
from trl_ext.functional.masking import at_least_float32
from trl_ext.models.adapter import Causal, device_of, inner_model, reading, wrapped_model
from trl_ext.packing import Packed, PackedTokens, RowSize, cut_at, packed_inputs, why_not_packed
from trl_ext.vocabulary_kl import Head, is_readable, logits_of

TokenIds = Sequence[Sequence[int]]

# Tokens whose logits exist at one time: few on a CPU, where they stay in its cache. Accelerators,
# and whoever needs a gradient, get TRL's kernel.
TOKENS_AT_ONCE = 64
KERNEL_TOKENS_AT_ONCE, KERNEL_LOGITS_AT_ONCE = 1024, 8192


@torch.no_grad()
def token_log_probs(
    model: Causal,
    prompt_ids: TokenIds,
    completion_ids: TokenIds,
    *,
    max_tokens: int = 4096,
    temperature: float = 1.0,
) -> list[Tensor]:
    """log p(y_t | x, y_<t) of each token of each completion, nats. Equation E13.

    Rows of one prompt, or of like length, are scored together; the model is in evaluation mode
    meanwhile.

    Args:
        model: a causal language model, or an adapter of one.
        prompt_ids, completion_ids: N rows; a prompt has one token or more.
        max_tokens: of a batch, as it is run; a longer row is a batch of its own.
        temperature: the logits are divided by it.

    Returns:
        N tensors (T_n,), float32, on the CPU; empty for an empty completion.

    Raises:
        ConfigError: a prompt is empty, or a row longer than what the model reads.
    """
    check_rows(model, prompt_ids, completion_ids)
    scores = [torch.zeros(0) for _ in completion_ids]
    keep = [len(ids) > 0 for ids in completion_ids]
    lengths = [len(x) + len(y) for x, y in zip(prompt_ids, completion_ids, strict=True)]
    of_batch = partial(batches_of, lengths)
    if why_not_packed(wrapped_model(model)) is None:
        of_batch = partial(packed_batches_of, prompt_ids, completion_ids)
    with reading(model):
        for rows in of_batch(keep, max_tokens):
            logps = batch_log_probs(
                model,
                [prompt_ids[row] for row in rows],
                [completion_ids[row] for row in rows],
                temperature=temperature,
            )
            parts = logps.cpu().split([len(completion_ids[row]) for row in rows])
            for row, part in zip(rows, parts, strict=True):
                scores[row] = part
    return scores


def batch_log_probs(
    model: Causal, prompt_ids: TokenIds, completion_ids: TokenIds, *, temperature: float = 1.0
) -> Tensor:
    """As `token_log_probs`, of one batch: one tensor (Σ T_n,), with gradient where that is on.

    The model runs in the mode and with the adapter that it is in.
    """
    device = device_of(model)
    inner = inner_model(model)
    backbone = inner.base_model
    packed = _packed(model, prompt_ids, completion_ids)
    if packed is not None:
        states = backbone(**packed_inputs(packed), use_cache=False).last_hidden_state[0]
        targets = packed.labels[0][packed.places[packed.mask]]
        return _of_hidden(inner, states[packed.places[packed.mask]], targets, temperature)
    ids, mask, predicted = _right_padded(prompt_ids, completion_ids)
    ids, mask, predicted = ids.to(device), mask.to(device), predicted.to(device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if not mask.all():
        inputs["attention_mask"] = mask
    if backbone is inner:  # nothing below the logits, as in a product of models
        logits = inner(**inputs, use_cache=False).logits[:, :-1][predicted]
        return _chosen(at_least_float32(logits) / temperature, ids[:, 1:][predicted])
    hidden = backbone(**inputs, use_cache=False).last_hidden_state
    return _of_hidden(inner, hidden[:, :-1][predicted], ids[:, 1:][predicted], temperature)


def _packed(model: Causal, prompt_ids: TokenIds, completion_ids: TokenIds) -> Packed | None:
    """The rows packed; None where the model cannot be run so."""
    if why_not_packed(wrapped_model(model)) is not None:
        return None
    left, kept = (max(map(len, each)) for each in (prompt_ids, completion_ids))
    if not kept:
        return None
    ids = torch.zeros(len(prompt_ids), left + kept, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        own = slice(left - len(prompt), left + len(completion))
        ids[row, own], mask[row, own] = torch.tensor([*prompt, *completion]), 1
    device = device_of(model)
    return Packed.of(ids.to(device), mask.to(device), kept)


def _of_hidden(model: Any, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """(N, H), (N,) -> (N,)"""
    if torch.is_grad_enabled() or (hidden.is_cuda and is_readable(model)):
        head = Head.of(model)
        parts = zip(
            hidden.split(KERNEL_TOKENS_AT_ONCE), targets.split(KERNEL_TOKENS_AT_ONCE), strict=True
        )
        return torch.cat(
            [
                ChunkedLogProbFunction.apply(
                    states,
                    head.weight,
                    head.bias,
                    tokens,
                    temperature,
                    KERNEL_LOGITS_AT_ONCE,
                    head.softcap,
                    head.logit_scale,
                    (),
                )[0]
                for states, tokens in parts
            ]
        )
    parts = zip(hidden.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True)
    return torch.cat(
        [
            _chosen(at_least_float32(logits_of(model, states)) / temperature, tokens)
            for states, tokens in parts
        ]
    )


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """(N, V), (N,) -> (N,) log-probabilities."""
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _right_padded(prompt_ids: TokenIds, completion_ids: TokenIds) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask (B, S), and which of tokens 1..S-1 are the completion's, (B, S-1)."""
    lengths = [len(x) + len(y) for x, y in zip(prompt_ids, completion_ids, strict=True)]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        ids[row, : lengths[row]] = torch.tensor([*prompt, *completion])
    place = torch.arange(ids.size(1))
    mask = place < torch.tensor(lengths)[:, None]
    begins = torch.tensor([len(prompt) for prompt in prompt_ids])[:, None]
    return ids, mask.long(), (mask & (place >= begins))[:, 1:]


def batches_of(lengths: Sequence[int], keep: Sequence[bool], max_tokens: int) -> list[list[int]]:
    """Numbers of rows that are scored together: the longest first, `max_tokens` with padding."""
    order = sorted((row for row, kept in enumerate(keep) if kept), key=lambda row: -lengths[row])
    batches: list[list[int]] = []
    for row in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def packed_batches_of(
    prompt_ids: TokenIds, completion_ids: TokenIds, keep: Sequence[bool], max_tokens: int
) -> list[list[int]]:
    """As `batches_of` without padding: those of a prompt one after the other, the prompt once."""
    numbers: dict[tuple[int, ...], int] = {}
    prompt_of = [numbers.setdefault(tuple(ids), len(numbers)) for ids in prompt_ids]
    rows = sorted((row for row, kept in enumerate(keep) if kept), key=lambda row: prompt_of[row])
    sizes = [
        RowSize(len(completion_ids[row]), len(prompt_ids[row]) - 1, prompt_of[row]) for row in rows
    ]
    each = iter(rows)
    return [[next(each) for _ in range(count)] for count in cut_at(max_tokens, sizes, PackedTokens)]


def check_rows(model: Causal, prompt_ids: TokenIds, completion_ids: TokenIds) -> None:
    """Whether a model can score these rows.

    Raises:
        ConfigError: a prompt is empty, a row longer than what the model reads, or a token unknown.
    """
    config = inner_model(model).config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        if not len(prompt) and len(completion):
            raise ConfigError(
                f"Row {row} has no prompt. A causal language model scores a token from those "
                "before it, and a text has none before its first. Give a prompt of one token or "
                "more, such as the tokenizer's bos_token."
            )
        if longest is not None and len(prompt) + len(completion) > longest:
            raise ConfigError(
                f"Row {row} has {len(prompt)} + {len(completion)} tokens (prompt + completion), "
                f"and the model reads at most {longest} (max_position_embeddings). Shorten it, or "
                "take a model with a longer context."
            )
        largest = max(max(prompt, default=-1), max(completion, default=-1))
        if largest >= config.vocab_size:
            raise ConfigError(
                f"Row {row} has the token id {largest}, beyond the model's {config.vocab_size} "
                "tokens. Is it another tokenizer's?"
            )
