"""What may be an expert, and how the next token's scores are had from it, step by step."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from trl_ext.errors import ConfigError, RunError

# How peft's mixed batches call the model without an adapter.
BASE = "__base__"


@dataclass(frozen=True)
class Adapter:
    """An expert that is one adapter of a PEFT model; `name=None` is its base, adapters off.

    Experts that are adapters of one `model` share its weights and one batched forward pass.
    """

    model: PeftModel
    name: str | None = None


@dataclass(frozen=True)
class TokenReward:
    """An expert exp(r): r(v | x_≤t) of every token that may come next. Equation E19.

    With weight 1/β beside a model of weight 1 the product is π_ref·exp(r/β), token by token.

    Args:
        reward: (V,) one number a token whatever came before; a function (input_ids (B, T),
            attention_mask (B, T)) -> (B, T, V); or a causal language model whose logits are the
            rewards (not normalised). −inf forbids a token.
    """

    reward: Tensor | PreTrainedModel | Callable[[Tensor, Tensor], Tensor]


@dataclass
class Step:
    """A forward pass of all experts: T new tokens behind S that they have seen.

    Attributes:
        new_ids: (B, T).
        new_positions: (B, T), 0 = a row's first token that is no padding.
        ids: (B, S + T), all tokens.
        mask: (B, S + T), 1 = token, 0 = padding.
        has_padding: whether `mask` has a 0.
        keep: how many of the last positions to score.
        use_cache: whether there will be a next step.
    """

    new_ids: Tensor
    new_positions: Tensor
    ids: Tensor
    mask: Tensor
    has_padding: bool
    keep: int
    use_cache: bool


class ModelSource:
    """One causal language model."""

    def __init__(self, model: Any):
        self.model = model
        self._takes = set(inspect.signature(model.forward).parameters)

    def new_cache(self) -> Cache:
        """An empty cache of this expert."""
        if hasattr(self.model, "new_cache"):  # a product within a product
            return self.model.new_cache()
        config = self.model.config.get_text_config(decoder=True)
        return DynamicCache(config=config if hasattr(config, "num_hidden_layers") else None)

    def scores(self, step: Step, cache: Cache | None) -> list[Tensor]:
        """(B, keep, V) of each expert here: logits, not normalised."""
        return [self._logits(self.model, step, cache, 1)]

    def _logits(
        self, model: Any, step: Step, cache: Cache | None, copies: int, **more: Any
    ) -> Tensor:
        past = step.ids.size(1) - step.new_ids.size(1)
        # A model that put nothing into its cache reads everything again.
        reads_all = cache is None or cache.get_seq_length() != past
        ids = step.ids if reads_all else step.new_ids
        inputs: dict[str, Any] = {"input_ids": ids, **more}
        if step.has_padding:
            inputs["attention_mask"] = step.mask
        if "position_ids" in self._takes and not (reads_all and past):
            inputs["position_ids"] = step.new_positions
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = step.keep
        tensors = {
            name: value.repeat(copies, 1) if isinstance(value, Tensor) and copies > 1 else value
            for name, value in inputs.items()
        }
        output = model(**tensors, past_key_values=cache, use_cache=step.use_cache)
        return output.logits[:, -step.keep :].float()

    def reorder(self, cache: Cache, rows: Tensor) -> None:
        """Keep these rows of the batch, for beam search."""
        cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType]


class AdapterSource(ModelSource):
    """LoRA adapters of one model, the base among them: one batch, its part k with adapter k."""

    def __init__(self, model: PeftModel, adapters: list[str | None]):
        super().__init__(model.get_base_model())
        self.peft_model = model
        self.adapters = [BASE if adapter is None else adapter for adapter in adapters]

    def scores(self, step: Step, cache: Cache | None) -> list[Tensor]:
        copies, rows = len(self.adapters), step.new_ids.size(0)
        names = [adapter for adapter in self.adapters for _ in range(rows)]
        logits = self._logits(self.peft_model, step, cache, copies, adapter_names=names)
        return list(logits.unflatten(0, (copies, rows)))

    def reorder(self, cache: Cache, rows: Tensor) -> None:
        batch = len(rows)
        parts = torch.arange(len(self.adapters), device=rows.device) * batch
        super().reorder(cache, (parts[:, None] + rows).flatten())


class TableSource:
    """An expert without hidden state, read from the tokens: a counted expert or a token reward."""

    def __init__(self, expert: Any):
        self.expert = expert

    def new_cache(self) -> None:
        return None

    def scores(self, step: Step, cache: Cache | None) -> list[Tensor]:
        if isinstance(self.expert, TokenReward):
            return [self._rewards(self.expert.reward, step)]
        if step.keep == 1 and hasattr(self.expert, "next_log_probs"):
            context = max(1, getattr(self.expert, "context_length", step.ids.size(1)))
            ids, mask = step.ids[:, -context:], step.mask[:, -context:]
            return [self.expert.next_log_probs(ids, mask)[:, None]]
        return [self.expert.log_probs(step.ids, step.mask)[:, -step.keep :]]

    def _rewards(self, reward: Any, step: Step) -> Tensor:
        rows = (step.ids.size(0), step.keep)
        if isinstance(reward, Tensor):
            return reward.to(step.ids.device).expand(*rows, -1)
        values = reward(step.ids, step.mask)
        if values.dim() != 3 or values.shape[:2] != step.ids.shape:
            raise RunError(
                f"A TokenReward's function returned {tuple(values.shape)} for tokens "
                f"{tuple(step.ids.shape)}; it must return (B, T, V): in row t, the reward of every "
                "token that may follow the first t + 1."
            )
        return values[:, -step.keep :]

    def reorder(self, cache: None, rows: Tensor) -> None:
        """Nothing to keep: the tokens are the state."""


Source = ModelSource | TableSource


def sources_of(experts: dict[str, Any]) -> list[tuple[Source, list[int]]]:
    """How the experts are run: each source with the places of its experts among `experts`.

    Adapters of one model come together, and so does its base if it is an expert of its own.

    Raises:
        ConfigError: if something cannot be an expert, or adapters cannot share a batch.
    """
    models = [e.model if isinstance(e, Adapter) else e for e in experts.values()]
    wrapped = {id(m.get_base_model()): m for m in models if isinstance(m, PeftModel)}
    sources: list[tuple[Source, list[int]]] = []
    shared: dict[int, tuple[PeftModel, list[str | None], list[int]]] = {}
    for place, (name, expert) in enumerate(experts.items()):
        adapter = _as_adapter(name, expert, wrapped)
        if adapter is not None:
            _, adapters, places = shared.setdefault(id(adapter.model), (adapter.model, [], []))
            adapters.append(adapter.name)
            places.append(place)
        else:
            sources.append((_source(name, expert), [place]))
    for model, adapters, places in shared.values():
        sources.append((AdapterSource(model, adapters), places))
    return sources


def _as_adapter(name: str, expert: Any, wrapped: dict[int, PeftModel]) -> Adapter | None:
    if isinstance(expert, PeftModel):
        if len(expert.active_adapters) != 1:
            raise ConfigError(
                f"The expert {name!r} is a PEFT model with {len(expert.active_adapters)} active "
                f"adapters: {', '.join(expert.active_adapters)}. Give Adapter(model, name)."
            )
        expert = Adapter(expert, expert.active_adapters[0])
    elif id(expert) in wrapped:
        expert = Adapter(wrapped[id(expert)], None)
    if not isinstance(expert, Adapter):
        return None
    _check_adapter(name, expert)
    return expert


def _check_adapter(name: str, adapter: Adapter) -> None:
    if not isinstance(adapter.model, PeftModel):
        raise ConfigError(
            f"The expert {name!r} is an Adapter of a {type(adapter.model).__name__}; it must be "
            "one of a PeftModel."
        )
    if adapter.name is None:
        return
    config = adapter.model.peft_config.get(adapter.name)
    if config is None:
        known = ", ".join(adapter.model.peft_config)
        raise ConfigError(
            f"The expert {name!r} is the adapter {adapter.name!r}, which its model does not have. "
            f"It has: {known}; Adapter(model, None) is the model without one."
        )
    if config.peft_type != "LORA" or getattr(config, "use_dora", False):
        kind = "DoRA" if getattr(config, "use_dora", False) else config.peft_type
        raise ConfigError(
            f"The expert {name!r} is an adapter of the kind {kind}; only LoRA adapters share a "
            "batch. Load it on a copy of the model, merge it (merge_and_unload) and give that."
        )
    merged = [m for m in adapter.model.modules() if isinstance(m, BaseTunerLayer) and m.merged]
    if merged:
        raise ConfigError(
            f"The expert {name!r} is an adapter of a model with merged adapters, which would be "
            "part of every expert. Call unmerge_adapter() first."
        )


def _source(name: str, expert: Any) -> Source:
    if isinstance(expert, TokenReward):
        if isinstance(expert.reward, PreTrainedModel):
            return ModelSource(expert.reward)
        if isinstance(expert.reward, Tensor) and expert.reward.dim() != 1:
            raise ConfigError(
                f"The expert {name!r} is a TokenReward with a table {tuple(expert.reward.shape)}; "
                "it must be (V,), one reward a token."
            )
        return TableSource(expert)
    if isinstance(expert, PreTrainedModel):
        if any(isinstance(module, BaseTunerLayer) for module in expert.modules()):
            raise ConfigError(
                f"The expert {name!r} is a model with adapters inside, whose state it would "
                "follow. Give Adapter(peft_model, name), or Adapter(peft_model, None) for the "
                "base."
            )
        if expert.get_output_embeddings() is None and not hasattr(expert, "new_cache"):
            raise ConfigError(
                f"The expert {name!r}, a {type(expert).__name__}, has no head over a vocabulary. "
                "Load it with AutoModelForCausalLM."
            )
        return ModelSource(expert)
    if hasattr(expert, "log_probs"):
        return TableSource(expert)
    raise ConfigError(
        f"The expert {name!r} is a {type(expert).__name__}. An expert is a causal language model, "
        "an Adapter of a PEFT model, an NGramExpert or NaiveBayesExpert, a TokenReward, or any "
        "object with log_probs(input_ids, attention_mask) -> (B, T, V)."
    )
