"""The weights of logged completions: Gibbs within groups, from arrays of rewards."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trl_ext.errors import ConfigError, DataError
from trl_ext.functional import (
    clip_weights,
    effective_sample_size,
    gibbs_weights,
    target_log_weights,
    weight_entropy,
)
from trl_ext.rwr.logged import LoggedRows
from trl_ext.rwr.offline_config import OfflineRWRConfig

# Entries of a padded block of groups: 8 MB in float64.
_BLOCK = 1 << 20
# Halvings of an interval of betas: more than a float64 has bits.
_HALVINGS = 60
# What 1/Σw² of uniform weights may miss of their number.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Weighed:
    """The weights of a dataset, and what they say about β.

    Attributes:
        weights: (N,) of each row, scaled so that the mean over the rows with a weight above 0 of
            weight·(−log π) is the mean over groups of Equation E8's loss. 0: the row is left out.
        metrics: name -> number, of all groups with weight: `effective_sample_size` (samples) and
            `weight_entropy` (nats), both before `max_weight`; `mass_clipped`, the share of a
            group's weight that it cut off; `uniform_groups`, the share of groups whose rewards are
            all equal, left out or not; `group_size`, the mean over groups of
            their rows; `beta_used`.
    """

    weights: np.ndarray
    metrics: dict[str, float]


@dataclass(frozen=True)
class _Block:
    """Groups of about one size, padded: (P, G) row numbers, and which of them are rows."""

    rows: Tensor
    real: Tensor


def weigh(rows: LoggedRows, config: OfflineRWRConfig, name: str) -> Weighed:
    """Weights of E8 for every row, by the options of the config.

    Raises:
        DataError: if a group of one is to be compared within itself, or no row is left.
        ConfigError: if `min_effective_sample_size` cannot be reached.
    """
    return _Groups(rows, config, name).weighed()


class _Groups:
    def __init__(self, rows: LoggedRows, config: OfflineRWRConfig, name: str):
        self.config, self.name = config, name
        self.scores = torch.tensor(rows.scores)
        self.log_ratios = None if rows.log_ratios is None else torch.tensor(rows.log_ratios)
        threshold = config.reward_threshold
        kept = np.ones(len(rows), bool) if threshold is None else rows.rewards >= threshold
        if not kept.any():
            raise DataError(
                f"{name}: no reward reaches reward_threshold={threshold}; the highest is "
                f"{rows.rewards.max():g}. Lower the threshold."
            )
        self.kept = torch.tensor(kept)
        within = config.baseline == "group"
        self.blocks = list(_blocks(rows.groups if within else np.zeros(len(rows), np.uint64)))
        self.drops_uniform = within and config.drop_uniform_groups and config.beta < math.inf
        if self.drops_uniform:
            self._check_sizes()

    def weighed(self) -> Weighed:
        beta = self._beta()
        weights = torch.zeros(len(self.scores), dtype=torch.float64)
        sums = torch.zeros(4, dtype=torch.float64)  # groups with weight, ESS, entropy, cut off
        uniform = 0
        for block in self.blocks:
            found = self._weights(block, beta)
            is_uniform = self._uniform(block, beta)
            uniform += int(is_uniform.sum())
            if self.drops_uniform:
                found = found.masked_fill(is_uniform[:, None], 0.0)
            clipped = self._clipped(found, block)
            weights[block.rows[block.real]] = clipped[block.real]
            used = found[found.sum(1) > 0]
            lost = (found - clipped).sum()
            sums += torch.stack(
                [
                    torch.tensor(float(len(used))),
                    effective_sample_size(used).sum(),
                    weight_entropy(used).sum(),
                    lost,
                ]
            )
        self._check_left(weights, uniform)
        groups, sizes, entropies, lost = sums.tolist()
        everything = sum(len(block.rows) for block in self.blocks)
        metrics = {
            "beta_used": beta,
            "effective_sample_size": sizes / groups,
            "weight_entropy": entropies / groups,
            "group_size": len(self.scores) / everything,
            "uniform_groups": uniform / everything,
            "mass_clipped": lost / groups,
        }
        left = int((weights > 0).sum())
        return Weighed((weights * left / groups).numpy(), metrics)

    def _weights(self, block: _Block, beta: float) -> Tensor:
        keep = block.real & self.kept[block.rows]
        return gibbs_weights(*self._tilted(block, beta), mask=keep)

    def _tilted(self, block: _Block, beta: float) -> tuple[Tensor, float]:
        """(P, G) what a softmax is taken of, and at which β."""
        scores = self.scores[block.rows]
        if self.log_ratios is None:
            return scores, beta
        return target_log_weights(scores, self.log_ratios[block.rows], beta), 1.0

    def _uniform(self, block: _Block, beta: float) -> Tensor:
        """(P,) bool: groups in which nothing sets one row apart; rows below the threshold count."""
        scores, _ = self._tilted(block, beta)
        highest = scores.where(block.real, -torch.inf).amax(1)
        return highest <= scores.where(block.real, torch.inf).amin(1)

    def _clipped(self, weights: Tensor, block: _Block) -> Tensor:
        if self.config.max_weight is None:
            return weights
        keep = block.real & self.kept[block.rows]
        return clip_weights(weights, self.config.max_weight, mask=keep)

    def _beta(self) -> float:
        """β of the config, or the one at which the effective sample size is high enough."""
        beta, floor = self.config.beta, self.config.min_effective_sample_size
        if floor is None:
            return beta
        enough = floor * (1 - _ROUNDING)
        if self._mean_size(beta) >= enough:
            return beta
        reachable = self._mean_size(math.inf)
        if reachable < enough:
            raise ConfigError(
                f"min_effective_sample_size={floor:g} cannot be reached: with beta=inf the groups "
                f"of {self.name} have {reachable:.4g} effective samples on average. Ask for at "
                "most that, or collect more completions a prompt."
            )
        spread = (self.scores.max() - self.scores.min()).item()
        low, high = beta, max(beta, spread, 1.0)
        while high < math.inf and self._mean_size(high) < enough:
            low, high = high, high * 16
        return self._bisected(low, high, enough) if high < math.inf else high

    def _bisected(self, low: float, high: float, floor: float) -> float:
        """β between two, of which the higher one is high enough; so is the result."""
        for _ in range(_HALVINGS):
            # Between powers of ten as long as the lower end is not 0.
            middle = math.sqrt(low * high) if low > 0 else high / 16
            if not low < middle < high:
                break
            low, high = (low, middle) if self._mean_size(middle) >= floor else (middle, high)
        return high

    def _mean_size(self, beta: float) -> float:
        """Mean over groups of the effective sample size, in samples."""
        total, groups = 0.0, 0
        for block in self.blocks:
            weights = self._weights(block, beta)
            if self.drops_uniform:
                weights = weights[~self._uniform(block, beta)]
            sizes = effective_sample_size(weights)
            total, groups = total + sizes.sum().item(), groups + int((sizes > 0).sum())
        return total / max(groups, 1)

    def _check_sizes(self) -> None:
        single = sum(int((block.real.sum(1) == 1).sum()) for block in self.blocks)
        if single:
            everything = sum(len(block.rows) for block in self.blocks)
            raise DataError(
                f"{self.name}: {single} of {everything} groups have one completion, and "
                "baseline: group compares the completions of a prompt. Use baseline: dataset, "
                "which compares all rows; or leave them out; or take them as they are with "
                "drop_uniform_groups: false."
            )

    def _check_left(self, weights: Tensor, uniform: int) -> None:
        if (weights > 0).any():
            return
        raise DataError(
            f"{self.name}: no row is left. {uniform} groups have rewards that are all equal, and "
            "drop_uniform_groups leaves them out. Collect completions with different rewards, or "
            "set drop_uniform_groups: false."
        )


def _blocks(groups: np.ndarray) -> Iterator[_Block]:
    """All rows by group, groups by size, as many in a block as fit."""
    _, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    by_group = torch.tensor(np.argsort(group_of, kind="stable"))
    starts = np.cumsum(sizes) - sizes
    by_size = np.argsort(-sizes, kind="stable")
    first = 0
    while first < len(by_size):
        widest = int(sizes[by_size[first]])
        chosen = by_size[first : first + max(1, _BLOCK // widest)]
        across = torch.arange(widest)
        real = across < torch.tensor(sizes[chosen])[:, None]
        places = (torch.tensor(starts[chosen])[:, None] + across).where(real, 0)
        yield _Block(by_group[places], real)
        first += len(chosen)
