"""Whether experts can be multiplied, and whether what goes in and comes out is right."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from trl_ext.errors import ConfigError, RunError
from trl_ext.models.adapter import Adapter
from trl_ext.models.vocabulary import check_vocabularies
from trl_ext.poe.experts import ModelSource, Source, Step, TokenReward, positions_of


def model_of(expert: Any) -> Any:
    """The transformers or PEFT model that an expert runs; None for one that runs none."""
    if isinstance(expert, Adapter):
        return expert.model
    if isinstance(expert, TokenReward):
        return model_of(expert.reward)
    return expert if isinstance(expert, PreTrainedModel | PeftModel) else None


def device_of(expert: Any) -> torch.device | None:
    """Where an expert's input must be; None where it does not say."""
    held = model_of(expert)
    if held is None:
        held = expert.reward if isinstance(expert, TokenReward) else expert
    return getattr(held, "device", None) and torch.device(held.device)


def check_experts(experts: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> int:
    """The width of the vocabulary that all of them share.

    Models may have more logits than tokens, for padding: where the tokenizers are known and agree,
    the smallest width counts.

    Args:
        experts: name -> expert.
        tokenizers: name -> tokenizer; others are looked for with the expert.

    Raises:
        ConfigError: with the two experts that do not fit, and where.
    """
    _check_names(experts, tokenizers)
    _check_same("device", {name: device_of(expert) for name, expert in experts.items()}, 'to("{}")')
    models = {name: model_of(expert) for name, expert in experts.items()}
    dtypes = {name: model.dtype for name, model in models.items() if model is not None}
    _check_same("dtype", dtypes, "to({})")
    found = {name: tokenizers.get(name) or tokenizer_of(experts[name]) for name in experts}
    known = {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}
    if known:
        check_vocabularies(known)
    widths = {name: width for name in experts if (width := _width(experts[name])) is not None}
    if not widths:
        raise ConfigError(
            "No expert says how many tokens it knows. Add a model, a counted expert, or an object "
            "with vocab_size."
        )
    if len(set(widths.values())) > 1 and not set(widths) <= set(known):
        shown = ", ".join(f"{name!r} has {width}" for name, width in widths.items())
        unknown = next(name for name in widths if name not in known)
        raise ConfigError(
            f"The experts score vocabularies of different size: {shown}. If they have one "
            "tokenizer and the larger one is padded, give tokenizers={name: tokenizer, ...} to "
            f"show it (that of {unknown!r} is not known)."
        )
    return min(widths.values())


def _check_names(experts: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> None:
    unknown = [name for name in tokenizers if name not in experts]
    if unknown:
        raise ConfigError(
            f"tokenizers names {unknown[0]!r}, which is no expert. The experts: "
            f"{', '.join(experts)}."
        )


def _check_same(what: str, values: Mapping[str, Any], move: str) -> None:
    known = [(name, value) for name, value in values.items() if value is not None]
    for name, value in known[1:]:
        first, wanted = known[0]
        if value != wanted:
            raise ConfigError(
                f"The expert {name!r} has the {what} {value}, and {first!r} has {wanted}; a "
                f"product multiplies them in one place. Move it: .{move.format(wanted)}."
            )


def tokenizer_of(expert: Any) -> Any:
    """The tokenizer that lies with an expert: its own, or in its local folder; else None."""
    if hasattr(expert, "tokenizer"):
        return expert.tokenizer
    model = model_of(expert)
    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not any(os.path.isfile(os.path.join(folder, f)) for f in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def _width(expert: Any) -> int | None:
    """How many tokens an expert scores; None if that is known only once it has."""
    model = model_of(expert)
    if model is not None:
        head = model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        # A head in four bits has a weight of another shape.
        features = getattr(head, "out_features", None)
        return features or (len(weight) if weight is not None else model.config.vocab_size)
    if isinstance(expert, TokenReward):
        return len(expert.reward) if isinstance(expert.reward, torch.Tensor) else None
    return getattr(expert, "vocab_size", None)


def check_source(names: str, source: Source) -> None:
    """Whether models score tokens from those before them alone, tried on three short texts.

    Texts are x, y and then: nothing; y; y, the first padded on the left. A model that looks ahead
    scores differently in the first two, one that sees padding in the last.

    Args:
        names: of the experts, for errors.
        source: of their scores. One that cannot be padded remembers it.

    Raises:
        ConfigError: if they do not, or cannot score them at all.
    """
    if not isinstance(source, ModelSource) or source.model.device.type == "meta":
        return
    if source.model.config.is_encoder_decoder:
        raise ConfigError(
            f"The expert {names!r} is an encoder-decoder model; an expert must be a causal "
            "language model."
        )
    device = source.model.device
    ids = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0]], device=device)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]], device=device)
    step = Step(ids, positions_of(mask), ids, mask, True, 3, False)
    try:
        with torch.no_grad():
            all_scores = source.scores(step, None)
    except Exception as error:  # whatever a model's own code raises
        raise ConfigError(
            f"The expert {names!r} cannot score a text: {type(error).__name__}: {error}. An expert "
            "is a causal language model, or LoRA adapters of one that can share a batch."
        ) from error
    for scores in all_scores:
        if not _alike(scores[1, :2], scores[2, :2], source.model.dtype):
            raise ConfigError(
                f"The expert {names!r} looks ahead: what it says of a token changes with those "
                "behind it. An expert must be a causal language model."
            )
        if not _alike(scores[0, 2], scores[1, 1], source.model.dtype):
            source.sees_padding = True


def _alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    size = one[one.isfinite()].abs().max().item() if one.isfinite().any() else 0.0
    share = 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
    return torch.allclose(one, other, rtol=0, atol=1e-5 + share * size, equal_nan=True)


def checked_cutoff(plausibility: float | None) -> float | None:
    """`plausibility`, which must be a share or None.

    Raises:
        ConfigError: if it is neither.
    """
    is_number = isinstance(plausibility, int | float) and not isinstance(plausibility, bool)
    if plausibility is not None and not (is_number and 0 < plausibility <= 1):
        raise ConfigError(
            f"plausibility={plausibility!r} must be greater than 0 and at most 1: a token stays "
            "if it is at least that many times as likely as the likeliest. None keeps all."
        )
    return plausibility


def check_ids(ids: Tensor, device: torch.device, vocab_size: int) -> None:
    """Whether these are tokens that the experts know, where they are.

    Raises:
        ConfigError: if not; with the value.
    """
    if not isinstance(ids, Tensor):
        raise ConfigError(
            f"input_ids must be a tensor (B, T), got a {type(ids).__name__}. Unpack what a "
            'tokenizer returns: generate(**tokenizer(texts, return_tensors="pt")).'
        )
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
        raise ConfigError(
            f"input_ids must be whole numbers (B, T), B and T at least 1, got {ids.dtype} "
            f"{tuple(ids.shape)}."
        )
    if ids.device.type != device.type:
        raise ConfigError(
            f"input_ids are on {ids.device} and the experts on {device}; move them with "
            f'.to("{device}").'
        )
    if not 0 <= ids.min() <= ids.max() < vocab_size:
        worst = ids.max() if ids.min() >= 0 else ids.min()
        raise ConfigError(
            f"input_ids has the token {worst.item()}; the experts share the tokens 0 to "
            f"{vocab_size - 1}. Is it another tokenizer's?"
        )


def check_finite(names: Sequence[str], norms: Sequence[Tensor], mask: Tensor) -> None:
    """Whether each expert gave numbers.

    Args:
        names: of the experts.
        norms: of each, (B, T) the logarithm of the sum of its exponentiated scores: NaN or inf
            where one of them is.
        mask: (B, T) bool, False at padding.

    Raises:
        RunError: if not; with the expert.
    """
    for name, norm in zip(names, norms, strict=True):
        broken = (norm.isnan() | norm.isposinf()) & mask
        if broken.any():
            row, position = broken.nonzero()[0].tolist()
            raise RunError(
                f"The expert {name!r} gives NaN or infinite logits in row {row} of the batch, "
                f"position {position} of those scored. Load it in float32 or bfloat16, and look "
                "at its weights."
            )


def check_outcome(names: Sequence[str], log_z: Tensor, mask: Tensor) -> None:
    """Whether the product is a distribution; arguments as for `check_finite`, of the product.

    Raises:
        RunError: if no token is left, or one has infinite weight.
    """
    if not (broken := ~log_z.isfinite() & mask).any():
        return
    experts = ", ".join(map(repr, names))
    if (log_z[broken] == -torch.inf).any():
        raise RunError(
            f"The experts {experts} leave no token: each is forbidden (−inf) by one of them or by "
            "the cut-off. Smooth the expert that forbids (pseudo_count), or lower plausibility."
        )
    raise RunError(
        f"A product of {experts} is not finite: an expert of negative weight gives a token "
        "probability 0 that the others allow. Smooth it, or set plausibility=0.1."
    )
