"""A model once more, below its adapters: other adapters stand on the same frozen weights."""

import copy
from itertools import chain
from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from trl_ext.bundled import resolve_model
from trl_ext.models.loading import same_place


def without_adapters(policy: nn.Module, *, share: bool = True) -> PreTrainedModel:
    """A causal language model once more, head included, as it was below its adapters.

    Args:
        policy: a causal LM, or a PeftModel of one.
        share: frozen weights are those of the policy and not copies. What it trains is copied.
    """
    frozen = [t for t in chain(policy.parameters(), policy.buffers()) if not t.requires_grad]
    twin: Any = copy.deepcopy(policy, {id(t): t for t in frozen} if share else {})
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            # What a PeftModel trains whole has the untrained one beside it.
            if isinstance(child, ModulesToSaveWrapper):
                setattr(parent, name, child.original_module)
    return twin.unload() if isinstance(twin, PeftModel) else twin


def place_below(policy: Any) -> str:
    """The path or hub id of the weights below a policy's adapters, in one spelling."""
    inner = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    return place_of(str(getattr(inner.config, "_name_or_path", "")))


def place_of(path: str) -> str:
    """One spelling of a path, a hub id or a `bundled:` name."""
    return same_place(resolve_model(path))


def can_share(policy: Any, place: str) -> bool:
    """Whether a model at `place` may stand on a policy's weights: those of a base, frozen."""
    return isinstance(policy, PeftModel) and place_below(policy) == place
