"""Sums and means under a mask (1 or True = keep), and what an empty mask gives."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32, others stay: no exponential or sum in 8 bits of mantissa.

    Args:
        values: any shape, any dtype.

    Returns:
        Tensor of the same shape, float32 or float64.
    """
    return values if values.dtype == torch.float64 else values.float()


def masked_sum(values: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Σ over kept entries. What is masked out may be NaN or inf: it is never touched.

    Source: definition.

    Args:
        values: (…, N, …), any floating dtype.
        mask: broadcastable to `values`, 1 or True = keep.
        dim: the axis summed over.

    Returns:
        `values` without `dim`; 0 where nothing is kept.
    """
    return torch.where(mask.bool(), values, 0).sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Σ over kept entries / number of kept entries.

    Source: definition.

    Args:
        values: (…, N, …), any floating dtype.
        mask: broadcastable to `values`, 1 or True = keep.
        dim: the axis averaged over.

    Returns:
        `values` without `dim`; 0 (not NaN) where nothing is kept.
    """
    count = mask.bool().expand_as(values).sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all kept entries.

    Source: definition; the variance divides by the number of entries.

    Args:
        values: any shape, any floating dtype.
        mask: broadcastable to `values`, 1 or True = keep.

    Returns:
        Two scalars in the units of `values`, float32 (float64 for float64 input); 0 and 0 where
        nothing is kept.
    """
    flat, keep = at_least_float32(values).flatten(), mask.expand_as(values).flatten()
    mean = masked_mean(flat, keep)
    return mean, masked_mean((flat - mean).square(), keep).sqrt()


def all_equal(values: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Whether max = min over kept entries. What is masked out may be NaN or inf.

    Source: definition.

    Args:
        values: (…, N, …), any floating dtype.
        mask: of the same shape, 1 or True = keep.
        dim: the axis compared over.

    Returns:
        bool, `values` without `dim`; True where one entry or none is kept.
    """
    highest = torch.where(mask.bool(), values, -torch.inf).amax(dim)
    return highest <= torch.where(mask.bool(), values, torch.inf).amin(dim)
