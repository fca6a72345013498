"""Log-probabilities of given tokens under an expert: no distribution is held beyond a batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_ext.errors import ConfigError
from trl_ext.models.adapter import Adapter, reading
from trl_ext.models.log_probs import batch_log_probs
from trl_ext.poe.checks import device_of
from trl_ext.poe.experts import TokenReward
from trl_ext.poe.product import ProductOfExperts


def completion_log_probs(
    expert: Any,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    batch_size: int,
) -> list[list[float]]:
    """log P_N(y_t | x, y_<t) of each token of each completion behind its prompt, nats.

    Equation E13. Rows of like length are scored together, `batch_size` at a time.

    Args:
        expert: what `check_expert` takes.
        prompt_ids, completion_ids: N rows.
        batch_size: rows at a time.

    Raises:
        ConfigError: if `expert` is none, it does not have a token id, or it reads a model and a
            completion has nothing before it: a causal model has no distribution of a text's first
            token.
    """
    check_token_ids(expert, prompt_ids, completion_ids)
    scores: list[list[float]] = [[] for _ in completion_ids]
    for rows in batches(prompt_ids, completion_ids, batch_size):
        prompts, completions = ([ids[row] for row in rows] for ids in (prompt_ids, completion_ids))
        for row, values in zip(rows, _log_probs(expert, prompts, completions), strict=True):
            scores[row] = values
    return scores


@torch.no_grad()
def _log_probs(expert: Any, prompts: list, completions: list) -> list[list[float]]:
    lengths = [len(ids) for ids in completions]
    if not all(map(len, prompts)) and not hasattr(expert, "token_log_probs"):
        raise ConfigError(
            "A causal language model scores a token from those before it, and a text has none "
            "before its first. Give a prompt of one token or more."
        )
    if isinstance(expert, PreTrainedModel | PeftModel | Adapter):
        with reading(expert):
            parts = batch_log_probs(expert, prompts, completions).split(lengths)
        return [part.tolist() for part in parts]
    keep = max(lengths)
    ids, mask = padded(prompts, completions, device_of(expert) or torch.device("cpu"))
    if hasattr(expert, "token_log_probs"):
        logps = expert.token_log_probs(ids, mask)[:, -keep:].float()
    else:
        logits = expert.log_probs(ids, mask)[:, -keep - 1 : -1].float()
        logps = logits.gather(-1, ids[:, -keep:, None])[..., 0] - logits.logsumexp(-1)
    return [row[:length] for row, length in zip(logps.tolist(), lengths, strict=True)]


def batches(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], size: int
) -> Iterator[list[int]]:
    """Numbers of rows that are scored together: the longest first, empty completions left out."""
    scored = [row for row, ids in enumerate(completion_ids) if len(ids)]
    scored.sort(key=lambda row: -len(prompt_ids[row]) - len(completion_ids[row]))
    return (scored[begin : begin + size] for begin in range(0, len(scored), size))


def padded(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: Any
) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T) as in TRL: prompts end in one column, and completions begin behind it."""
    left, right = max(map(len, prompts)), max(map(len, completions))
    ids = torch.zeros(len(prompts), left + right, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        place = slice(left - len(prompt), left + len(completion))
        ids[row, place] = torch.tensor([*prompt, *completion])
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def check_expert(name: str, expert: Any) -> None:
    """Whether tokens can be scored with it: a model, or an object with one of two methods.

    A causal language model of transformers, a `PeftModel`, an `Adapter`, `token_log_probs(input_ids
    (B, T), attention_mask) -> (B, T)`, such as a counted expert, or `log_probs(…) -> (B, T, V)`,
    row t the distribution behind x_≤t.

    Raises:
        ConfigError: if it is none of these.
    """
    is_model = isinstance(expert, PreTrainedModel) and expert.can_generate()
    if is_model or isinstance(expert, PeftModel | Adapter):
        return
    if not hasattr(expert, "token_log_probs") and not hasattr(expert, "log_probs"):
        given = "None" if expert is None else f"a {type(expert).__name__}"
        raise ConfigError(
            f"{name} is {given}. An expert is a causal language model, a PeftModel, an "
            "Adapter, the path or hub id of one, or an object with token_log_probs(input_ids, "
            "attention_mask) -> (B, T) or log_probs(input_ids, attention_mask) -> (B, T, V)."
        )


def check_token_ids(expert: Any, *token_ids: Sequence[Sequence[int]]) -> None:
    """Whether an expert that says how many tokens it has has all of these.

    Raises:
        ConfigError: if not.
    """
    size = vocabulary_size(expert)
    largest = max((max(ids, default=-1) for each in token_ids for ids in each), default=-1)
    if size is not None and largest >= size:
        raise ConfigError(
            f"the token id {largest} is beyond its vocabulary of {size} tokens. The policy and the "
            "expert must have one tokenizer; fit a counted expert with vocab_size= the number of "
            "the policy's tokens."
        )


def tensors_of(expert: Any) -> Iterator[Tensor]:
    """The parameters that an expert scores with, as far as it shows them.

    Those of other adapters than its own are not among them.
    """
    if isinstance(expert, ProductOfExperts):
        for member in expert.experts.values():
            yield from tensors_of(member)
    elif isinstance(expert, TokenReward):
        yield from tensors_of(expert.reward)
    elif isinstance(expert, Adapter):
        others = {name for name in expert.model.peft_config if name != expert.name}
        unused = {id(tensor) for tensor in _of_adapters(expert.model, others)}
        yield from (each for each in expert.model.parameters() if id(each) not in unused)
    elif isinstance(expert, nn.Module):
        yield from expert.parameters()


def _of_adapters(model: PeftModel, names: set[str]) -> Iterator[Tensor]:
    """The parameters of some adapters: peft keeps them in dictionaries by the adapters' names."""
    for module in model.modules():
        if isinstance(module, nn.ParameterDict):
            yield from (module[name] for name in names & set(module.keys()))
        elif isinstance(module, nn.ModuleDict):
            for name in names & set(module.keys()):
                yield from module[name].parameters()


def vocabulary_size(expert: Any) -> int | None:
    """V, where an expert says it."""
    model = expert.model if isinstance(expert, Adapter) else expert
    if isinstance(model, PreTrainedModel | PeftModel):
        return model.config.get_text_config().vocab_size
    return getattr(model, "vocab_size", None)
