"""Keys and values of prefixes that begin one another, computed once for the longest of them.

A prefix of a text has the first keys and values of the text, so that one forward pass over a
completion serves the rollouts from all of its prefixes. Prefixes of different length go into one
batch with padding on the left: keys are rotated with their true positions before they are stored,
and the padding is masked.
"""

import inspect
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

# The rotation of a key would depend on how long the text is behind it.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def why_not_shared(model: Any) -> str | None:
    """What keeps the keys and values of a prefix from being those of a longer text; None: nothing.

    Args:
        model: a transformers model, adapters inside it included.
    """
    if not model._supports_default_dynamic_cache():
        return "it has no cache of keys and values of transformers' usual kind"
    config = model.config.get_text_config(decoder=True)
    if config is not model.config:
        return "it reads more than text, and places tokens by rules of its own"
    layers = DynamicCache(config=config).layers
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if others:
        return f"not all of its layers keep all keys and values ({', '.join(others)})"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no position_ids, which padding within a cache needs"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        return f"its rotary embedding ({rope['rope_type']}) depends on the length of the text"
    return None


def trunks(prefixes: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """For each prefix the number of a longest one that begins with it, and an order by these.

    Returns:
        trunk of each prefix; the numbers of the prefixes, those of one trunk behind one another.
    """
    # What begins with a text comes right behind it, so the next one tells.
    order = sorted(range(len(prefixes)), key=lambda number: list(prefixes[number]))
    trunk = list(range(len(prefixes)))
    for number, following in reversed(list(pairwise(order))):
        prefix = list(prefixes[number])
        if list(prefixes[following][: len(prefix)]) == prefix:
            trunk[number] = trunk[following]
    return trunk, order


class PrefixCaches:
    """Caches of batches of prefixes; of each trunk as long as a batch needs it.

    Args:
        model: one that `why_not_shared` has nothing against, in evaluation mode.
        prefixes: tokens, one or more each.
    """

    def __init__(self, model: Any, prefixes: Sequence[Sequence[int]]):
        self.model = model
        self.prefixes = prefixes
        self.trunk, self.order = trunks(prefixes)
        self._read: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def of(self, rows: Sequence[int]) -> DynamicCache:
        """Of all tokens of these prefixes but the last, which is for `generate` to read.

        Args:
            rows: numbers of prefixes, (B,), equal ones behind one another.

        Returns:
            Keys and values (B, heads, W − 1, size) of each layer, W the longest of the prefixes,
            zeros on the left of shorter ones.
        """
        width = max(len(self.prefixes[row]) for row in rows) - 1
        needed = dict.fromkeys(self.trunk[row] for row in rows)
        self._read = {
            trunk: self._read[trunk] if trunk in self._read else self._keys_and_values(trunk)
            for trunk in needed
        }
        groups = [(row, len(list(equal))) for row, equal in groupby(rows)]
        cache = DynamicCache(config=self.model.config)
        for layer in range(len(cache.layers)):
            keys, values = (self._stacked(groups, layer, which, width) for which in (0, 1))
            cache.update(keys, values, layer)
        return cache

    def _stacked(self, groups: list[tuple[int, int]], layer: int, which: int, width: int) -> Tensor:
        """Keys (0) or values (1) of one layer, each prefix as many times as asked for."""
        parts = []
        for row, times in groups:
            kept = len(self.prefixes[row]) - 1
            states = self._read[self.trunk[row]][layer][which][:, :, :kept]
            parts.append(pad(states, (0, 0, width - kept, 0)).expand(times, -1, -1, -1))
        return torch.cat(parts)

    def _keys_and_values(self, trunk: int) -> list[tuple[Tensor, Tensor]]:
        ids = torch.tensor([list(self.prefixes[trunk])], device=self.model.device)
        options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = 1  # the logits of a long text would fill the memory
        cache = self.model(input_ids=ids, **options).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers]
