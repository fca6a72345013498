"""What a CPU really allocates: tensors saved for a backward pass, and the peak of a program."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from trl_ext.plan.activations import Numbers

# A width of its own for each letter of the formulas, so that no term can stand in for another.
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "tie_word_embeddings": True,
}


def config_of(kind: str = "llama", **changed: Any) -> Any:
    """The config of a small model of a type."""
    attention = changed.pop("attn_implementation", "sdpa")
    return AutoConfig.for_model(kind, **SIZES | changed, attn_implementation=attention)


def lora(targets: Any = "all-linear", **changed: Any) -> LoraConfig:
    """An adapter of rank 8."""
    return LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM", **changed)


def small_model(config: Any, dtype: torch.dtype, adapter: LoraConfig | None = None) -> Any:
    """Random weights, in training mode; with an adapter as TRL puts it on."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if adapter is not None:
        model = get_peft_model(model, adapter)
        model.enable_input_require_grads()
    return model.train()


def backbone(model: Any) -> Any:
    """The decoder without its LM head."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def rows(batch: int = 3, length: int = 40) -> dict[str, Tensor]:
    """Tokens of which the first row is padded, so that there is a mask."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :7] = 0
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask}


def numbers(dtype: torch.dtype, adapter: LoraConfig | None, **changed: Any) -> Numbers:
    """How `small_model` computes inside bfloat16 autocast."""
    given = {
        "stream": dtype.itemsize,
        "compute": 2,
        "adapter": 4 if adapter else 0,
        "trains_base": adapter is None,
        "quantised": False,
        "dropout": bool(adapter and adapter.lora_dropout),
        "attention": "sdpa",
    }
    return Numbers(**given | changed)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, parameters and buffers left out."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = storage_bytes(t for at, t in found.items() if at not in known)
    del result
    return total


class Peak(TorchDispatchMode):
    """Bytes of all storages that live inside the context: `now`, and the most there ever were.

    What an operation allocates and frees again inside itself is not seen.
    """

    def __init__(self, resident: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.highest = 0
        # A weak reference keeps the address from being given to another storage.
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in resident:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._live:
            self._live[reference.cdata] = reference, storage.nbytes()
            self.now += storage.nbytes()

    def _forget_the_dead(self) -> None:
        for key in [key for key, (reference, _) in self._live.items() if reference.expired()]:
            self.now -= self._live.pop(key)[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._forget_the_dead()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self.highest = max(self.highest, self.now)
        return result
