"""What may be an expert, and how the next token's scores are had from it, step by step."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from trl_ext.errors import ConfigError, RunError
from trl_ext.models.adapter import Adapter

# How peft's mixed batches call the model without an adapter.
BASE = "__base__"


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
        has_padding: whether a mask was given; without one there is none to hand on.
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
        # Found out by `check_source`: such a model is given rows of one length only.
        self.sees_padding = False
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
        reads_all = past > 0 and not _holds(cache, past)
        ids = step.ids if reads_all else step.new_ids
        inputs: dict[str, Any] = {"input_ids": ids, **more}
        if self.sees_padding and not step.mask.all():
            raise RunError(
                f"The batch is padded, and a {type(self.model).__name__} reads padding as text. "
                "Give prompts of one length, or one at a time."
            )
        if step.has_padding:
            inputs["attention_mask"] = step.mask
        if "position_ids" in self._takes:
            inputs["position_ids"] = positions_of(step.mask) if reads_all else step.new_positions
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = step.keep
        tensors = {
            name: value.repeat(copies, 1) if isinstance(value, Tensor) and copies > 1 else value
            for name, value in inputs.items()
        }
        output = model(**tensors, past_key_values=cache, use_cache=step.use_cache)
        return output.logits[:, -step.keep :].float()

    def reorder(self, cache: Cache, rows: Tensor, batch: int) -> None:
        """Go on from these of the `batch` rows, for beam search."""
        cache.reorder_cache(rows)  # pyright: ignore[reportArgumentType]


def positions_of(mask: Tensor) -> Tensor:
    """(B, S): 0 = a row's first token, and what pads it on the left."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _holds(cache: Cache | None, tokens: int) -> bool:
    try:
        return cache is not None and cache.get_seq_length() == tokens
    except ValueError:  # one without attention has a state and no length
        return True


class AdapterSource(ModelSource):
    """LoRA adapters of one model, the base among them: one batch, its part k with adapter k."""

    def __init__(self, model: PeftModel, adapters: list[str | None]):
        super().__init__(model.get_base_model())
        self.peft_model = model
        self.adapters = [BASE if adapter is None else adapter for adapter in adapters]
        # What is done to a PEFT model is done to all of its layers.
        self._layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))

    def scores(self, step: Step, cache: Cache | None) -> list[Tensor]:
        copies, rows = len(self.adapters), step.new_ids.size(0)
        names = [adapter for adapter in self.adapters for _ in range(rows)]
        self._check_state()
        with _lock_of(self.peft_model):
            logits = self._logits(self.peft_model, step, cache, copies, adapter_names=names)
        return list(logits.unflatten(0, (copies, rows)))

    def reorder(self, cache: Cache, rows: Tensor, batch: int) -> None:
        parts = torch.arange(len(self.adapters), device=rows.device) * batch
        super().reorder(cache, (parts[:, None] + rows).flatten(), batch)

    def _check_state(self) -> None:
        """Whether peft would mix adapters now: it does so for a model that is left alone."""
        of = self._layer
        for is_so, what, mend in (
            (of.disable_adapters, "its adapters disabled", "Leave disable_adapter() first"),
            (of.merged, "an adapter merged into it", "Call unmerge_adapter() first"),
            (of.training, "been put into training mode", "Call product.eval() first"),
        ):
            if is_so:
                raise RunError(
                    f"The PEFT model of the adapters {', '.join(self.adapters)} has {what}, and "
                    f"would give other distributions. {mend}."
                )


_LOCKS: "WeakKeyDictionary[PeftModel, Lock]" = WeakKeyDictionary()


def _lock_of(model: PeftModel) -> Lock:
    """While peft mixes adapters, no other thread may use the model: its layers know for whom."""
    return _LOCKS.setdefault(model, Lock())


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
        is_tensor = isinstance(values, Tensor) and not values.is_complex()
        if not is_tensor or values.dim() != 3 or values.shape[:2] != step.ids.shape:
            shape = tuple(values.shape) if is_tensor else f"a {type(values).__name__}"
            raise RunError(
                f"A TokenReward's function returned {shape} for tokens "
                f"{tuple(step.ids.shape)}; it must return (B, T, V): in row t, the reward of every "
                "token that may follow the first t + 1."
            )
        return values[:, -step.keep :]

    def reorder(self, cache: None, rows: Tensor, batch: int) -> None:
        """Nothing to keep: the tokens are the state."""


Source = ModelSource | TableSource


def sources_of(experts: dict[str, Any]) -> list[tuple[Source, list[int]]]:
    """How the experts are run: each source with the places of its experts among `experts`.

    Adapters of one model come together, and so does its base if it is an expert of its own.

    Raises:
        ConfigError: if something cannot be an expert, or adapters cannot share a batch.
    """
    models = [e.model if isinstance(e, Adapter) else e for e in experts.values()]
    wrapped: dict[int, PeftModel] = {}
    for name, model in zip(experts, models, strict=True):
        if isinstance(model, PeftModel):
            first = wrapped.setdefault(id(model.get_base_model()), model)
            if first is not model:
                raise ConfigError(
                    f"The expert {name!r} is a second PeftModel around one model, whose layers "
                    "hold the adapters of both under the same names. Load them as two adapters of "
                    "one PeftModel (load_adapter), and give Adapter(model, name) for each."
                )
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
    known = adapter.model.peft_config
    if adapter.name is not None and adapter.name not in known:
        raise ConfigError(
            f"The expert {name!r} is the adapter {adapter.name!r}, which its model does not have. "
            f"It has: {', '.join(known)}; Adapter(model, None) is the model without one."
        )
    # What one adapter changes in the model itself, all experts of that model have.
    for other, config in known.items():
        if other != adapter.name and getattr(config, "peft_type", None) == "LORA":
            kind = _reaches_further(config)
        else:
            kind = _is_not_plain(config)
        if kind:
            raise ConfigError(
                f"The expert {name!r} belongs to a PEFT model whose adapter {other!r} is {kind}; "
                "only plain LoRA adapters share a batch, with each other and with the base. Load "
                "it on a copy of the model, merge it (merge_and_unload) and give that."
            )


def _is_not_plain(config: Any) -> str | None:
    """What an adapter is, where it is no plain LoRA."""
    if config.peft_type != "LORA":
        return f"of the kind {getattr(config.peft_type, 'value', config.peft_type)}"
    return "of the kind DoRA" if config.use_dora else _reaches_further(config)


def _reaches_further(config: Any) -> str | None:
    """What a LoRA adapter changes beside what it adds to layers."""
    if config.bias != "none":
        return f"trained with bias={config.bias!r}, which replaces the base's"
    return "one with layer_replication" if config.layer_replication else None


def _source(name: str, expert: Any) -> Source:
    if isinstance(expert, TokenReward):
        if isinstance(expert.reward, PreTrainedModel):
            return ModelSource(expert.reward)
        is_table = isinstance(expert.reward, Tensor)
        if not is_table and (isinstance(expert.reward, PeftModel) or not callable(expert.reward)):
            raise ConfigError(
                f"The expert {name!r} is a TokenReward of a {type(expert.reward).__name__}; it "
                "must be a tensor (V,), a function, or a causal language model without adapters."
            )
        if is_table and expert.reward.dim() != 1:
            raise ConfigError(
                f"The expert {name!r} is a TokenReward with a table {tuple(expert.reward.shape)}; "
                "it must be (V,), one reward a token."
            )
        return TableSource(expert)
    if hasattr(expert, "new_cache"):  # a product
        return ModelSource(expert)
    if isinstance(expert, PreTrainedModel):
        if any(isinstance(module, BaseTunerLayer) for module in expert.modules()):
            raise ConfigError(
                f"The expert {name!r} is a model with adapters inside, whose state it would "
                "follow: a PeftModel puts them into the model that it is made of. Give "
                "Adapter(peft_model, name), or Adapter(peft_model, None) for the base."
            )
        if expert.get_output_embeddings() is None:
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
