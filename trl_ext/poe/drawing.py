"""Completions of a product of experts: prompts to token ids, sampling, scoring."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from trl_ext.errors import ConfigError
from trl_ext.poe.corpora import Prompt, check_prompt
from trl_ext.poe.product import ProductOfExperts

# Scores (rows, T, V) of all experts that are held together, in numbers: 256 MB in float32.
_SCORES_AT_ONCE = 2**26


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. What a model's own generation config adds to that is left out.

    Attributes:
        max_new_tokens: of an answer.
        temperature, top_p: of sampling; 1 is the distribution itself.
        greedy: take the likeliest token.
        num_beams: beam search if more than 1; then nothing is sampled.
        num_samples: answers to a prompt.
        seed: the same answers from the same seed.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False
    num_beams: int = 1
    num_samples: int = 1
    seed: int = 0

    @property
    def is_random(self) -> bool:
        """Whether anything is sampled."""
        return not self.greedy and self.num_beams == 1

    def seeds(self) -> Iterator[int]:
        """One for each batch."""
        numbers = random.Random(self.seed)
        while True:
            yield numbers.getrandbits(63)

    def config(self, product: ProductOfExperts) -> GenerationConfig:
        """For transformers' `generate`, with the end tokens of the product's first model."""
        ends = _end_tokens(product)
        padding = getattr(product.tokenizer, "pad_token_id", None)
        chosen: dict[str, Any] = {"do_sample": False}
        if self.is_random:
            # transformers would cut to the 50 likeliest tokens.
            chosen = {"do_sample": True, "top_k": 0}
            chosen |= {"temperature": self.temperature, "top_p": self.top_p}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            num_return_sequences=self.num_samples,
            eos_token_id=ends or None,
            pad_token_id=padding if padding is not None else (ends or [0])[0],
            **chosen,
        )


@dataclass(frozen=True)
class Scores:
    """Of completions, token by token, nats.

    Attributes:
        experts: name -> log p_k of each token of each completion.
        product: log π of them.
        log_z: log Z there.
    """

    experts: dict[str, list[list[float]]]
    product: list[list[float]]
    log_z: list[list[float]]


def with_weights(product: ProductOfExperts, weights: Mapping[str, float]) -> ProductOfExperts:
    """The same experts with other weights; those that are not named are left out."""
    changed = ProductOfExperts(
        {name: product.experts[name] for name in weights},
        weights,
        plausibility=product.plausibility if len(weights) > 1 else None,
        tokenizers=dict.fromkeys(weights, product.tokenizer),
    )
    changed.tokenizer = product.tokenizer
    # Padded logits of one model are no tokens of the others.
    changed.config.vocab_size = product.config.vocab_size
    return changed


def encode(prompts: Sequence[Prompt], tokenizer: Any, chat: bool | None) -> list[list[int]]:
    """Token ids of prompts.

    Args:
        prompts: texts or chat messages.
        tokenizer: of the product.
        chat: whether a text is a user's message in the tokenizer's chat template; None: if it has
            one.

    Raises:
        ConfigError: if a template is wanted and there is none, or a prompt has no token.
        DataError: if a prompt is no text in UTF-8.
    """
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, f"Prompt {number}")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    use_chat = has_template if chat is None else chat
    messages = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    if not has_template and (use_chat or messages):
        wants = "A prompt is chat messages" if messages else "--chat asks for a chat template"
        raise ConfigError(
            f"{wants}, and the tokenizer has no chat template. Give texts, without --chat, or an "
            "instruction-tuned model."
        )
    return [_encode(prompt, tokenizer, use_chat) for prompt in prompts]


def _encode(prompt: Prompt, tokenizer: Any, chat: bool) -> list[int]:
    if not chat and isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"The prompt {prompt!r} has no token to go on from. Give a longer one.")
    return list(ids)


def check_lengths(
    product: ProductOfExperts,
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    max_new_tokens: int,
) -> None:
    """Whether each prompt and its answer fit into every model of the product.

    Raises:
        ConfigError: with the first prompt that does not, if the models say what they can read.
    """
    longest = getattr(product.config, "max_position_embeddings", None)
    if longest is None:
        return
    for number, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
        if len(ids) + max_new_tokens > longest:
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            shown = repr(text if len(text) <= 60 else f"{text[:57]}...")
            left = longest - len(ids)
            fewer = f", or ask for at most {left} new tokens" if left > 0 else ""
            raise ConfigError(
                f"Prompt {number} is too long: {shown} has {len(ids)} tokens, and max_new_tokens "
                f"is {max_new_tokens}; together the experts read at most {longest}. Shorten the "
                f"prompt{fewer}."
            )


def draw(
    product: ProductOfExperts, prompt_ids: Sequence[list[int]], seed: int, **options: Any
) -> list[list[int]]:
    """The completions of a batch, each up to its end token, as its generation config says.

    Returns:
        `num_return_sequences` lists of token ids a prompt, behind one another.
    """
    config = product.generation_config
    assert config is not None
    ids, mask = _left_padded(prompt_ids, config.pad_token_id, product.device)
    torch.manual_seed(seed)
    tokens = product.generate(ids, attention_mask=mask, **options)
    ends = set(_as_list(config.eos_token_id))
    return [_until_end(row, ends) for row in tokens[:, ids.size(1) :].tolist()]


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


@torch.no_grad()
def score(
    product: ProductOfExperts,
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
) -> Scores:
    """What the experts and the product say of completions, behind their prompts. Equation E14.

    Few rows are scored together, so that memory is bounded.
    """
    longest = max(len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True))
    held = longest * product.config.vocab_size * (len(product.experts) + 2)
    rows = max(1, _SCORES_AT_ONCE // held)
    scores = Scores({name: [] for name in product.experts}, [], [])
    for begin in range(0, len(prompt_ids), rows):
        chunk = slice(begin, begin + rows)
        _score_batch(product, prompt_ids[chunk], completion_ids[chunk], scores)
    return scores


def _score_batch(
    product: ProductOfExperts,
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    scores: Scores,
) -> None:
    """Append a batch to `scores`."""
    texts = [p + c for p, c in zip(prompt_ids, completion_ids, strict=True)]
    ids, mask = _left_padded(texts, 0, product.device)
    keep = max(map(len, completion_ids))
    targets = ids[:, -keep:, None]

    def of_tokens(logps: Tensor) -> list[list[float]]:
        """Row t predicts the token behind it; rows end with the text."""
        picked = logps[:, -keep - 1 : -1].gather(-1, targets)[..., 0]
        return _last(picked, completion_ids)

    output = product(ids, attention_mask=mask, logits_to_keep=keep + 1, output_expert_logits=True)
    for name, logits in zip(product.experts, output.expert_logits, strict=True):
        scores.experts[name].extend(of_tokens(product.own_log_probs(name, logits)))
    scores.product.extend(of_tokens(output.logits.log_softmax(-1)))
    scores.log_z.extend(_last(output.log_z[:, :-1], completion_ids))


def _last(values: Tensor, completion_ids: Sequence[list[int]]) -> list[list[float]]:
    return [
        row[len(row) - len(ids) :] for row, ids in zip(values.tolist(), completion_ids, strict=True)
    ]


def texts_of(tokenizer: Any, completions: Sequence[list[int]]) -> list[str]:
    """As text, without special tokens."""
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]


def repeated(rows: Sequence[Any], times: int) -> list[Any]:
    """Each row several times, behind one another."""
    return [row for row in rows for _ in range(times)]


def _left_padded(
    rows: Sequence[list[int]], padding: Any, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T)."""
    width = max(map(len, rows))
    ids = [[padding] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _end_tokens(product: ProductOfExperts) -> list[int]:
    own = getattr(product.generation_config, "eos_token_id", None)
    return _as_list(own if own is not None else product.tokenizer.eos_token_id)


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
