"""Consecutive segments of a packed row, and the same padded to one length."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """R segments one after the other, from token `first` of a packed row on.

    Attributes:
        first: where they begin.
        lengths: (R,) tokens of each, at least one of them not 0.
        prompt_of: (R,) which of the prompts each goes on from; None for the prompts themselves.
    """

    first: int
    lengths: Tensor
    prompt_of: Tensor | None = None

    @cached_property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def is_padding(self) -> Tensor:
        """(R, L) bool, L tokens in the longest."""
        steps = torch.arange(int(self.lengths.max()), device=self.lengths.device)
        return steps >= self.lengths[:, None]

    @cached_property
    def _index(self) -> Tensor:
        """(R, L) where each padded token lies among the packed ones; 0 for padding."""
        begins = self.lengths.cumsum(0) - self.lengths
        steps = torch.arange(self.is_padding.size(1), device=self.lengths.device)
        return (begins[:, None] + steps).masked_fill(self.is_padding, 0)

    @cached_property
    def _back(self) -> Tensor:
        """(tokens,) where each packed token lies among the R·L padded ones."""
        return (~self.is_padding).flatten().nonzero().squeeze(1)

    def pad(self, packed: Tensor) -> Tensor:
        """(N, h, d) of a whole packed row -> (R, h, L, d) of these segments; padding is not 0."""
        own = packed[self.first : self.first + self.tokens]
        padded: Any = _Pad.apply(own, self._index, self._back)
        return padded.transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """(R, L, h, d) -> (tokens, h, d)."""
        packed: Any = _Unpad.apply(padded, self._index, self._back, self.is_padding)
        return packed


class _Pad(torch.autograd.Function):
    """Each token goes to one place: its gradient is looked up there, and not added up."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return packed.index_select(0, index.flatten()).unflatten(0, index.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (back,) = ctx.saved_tensors
        return gradients[0].flatten(0, 1).index_select(0, back), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, padded: Tensor, index: Tensor, back: Tensor, is_padding: Tensor
    ) -> Tensor:
        ctx.save_for_backward(index, is_padding)
        return padded.flatten(0, 1).index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        index, is_padding = ctx.saved_tensors
        padded = gradients[0].index_select(0, index.flatten()).unflatten(0, index.shape)
        return padded.masked_fill_(is_padding[..., None, None], 0.0), None, None, None
