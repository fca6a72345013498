"""One adapter of a PEFT model in the place of a model, its base among them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter


@dataclass(frozen=True)
class Adapter:
    """One adapter of a PEFT model; `name=None` is its base, adapters off.

    Adapters of one `model` share its weights.
    """

    model: PeftModel
    name: str | None = None


Causal = PreTrainedModel | PeftModel | Adapter
"""A causal language model, as it is or with one of its adapters."""


def wrapped_model(model: Causal) -> Any:
    """The transformers or PEFT model that runs."""
    return model.model if isinstance(model, Adapter) else model


def inner_model(model: Causal) -> Any:
    """The transformers model, adapters inside it included."""
    wrapped = wrapped_model(model)
    return wrapped.get_base_model() if isinstance(wrapped, PeftModel) else wrapped


def device_of(model: Causal) -> torch.device:
    """Where its input must be."""
    return torch.device(wrapped_model(model).device)


def keep_nf4_gradients_on_cpu(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16 CPUs.

    It does so in the first forward pass in evaluation mode, and the kernel that it uses from then
    on has no gradient: a policy that was read once would silently not train any more.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


@contextmanager
def reading(model: Causal) -> Iterator[None]:
    """The model in evaluation mode, with the adapter that is meant; afterwards as it was."""
    wrapped = wrapped_model(model)
    keep_nf4_gradients_on_cpu(wrapped)
    training = [module for module in wrapped.modules() if module.training]
    # peft makes the adapter that it activates trainable.
    frozen = [p for p in wrapped.parameters() if not p.requires_grad]
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    wrapped.eval()
    try:
        if isinstance(model, Adapter):
            with use_adapter(model.model, model.name):
                yield
        else:
            yield
    finally:
        for module in training:
            module.training = True
        for parameters, needed in ((frozen, False), (trained, True)):
            for parameter in parameters:
                parameter.requires_grad = needed
