"""How much each expert counts: fixed, by position, or by what it knows."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from trl_ext.errors import ConfigError
from trl_ext.functional import entropy_weights

Weight = float | Callable[[Tensor], Any]
# Times a log-probability, more leaves float32.
LARGEST = 1e6


class EntropyWeights:
    """Weights that move to the experts which know more of the next token. Equation E20.

    An expert counts by how much it lowers the entropy below its prior's
    (`trl_ext.functional.entropy_weights`).

    Args:
        weights: name -> weight among experts that know equally much, or one number an expert.
        prior_entropies: name -> nats, the entropy of an expert that knows nothing. Where none is
            given: a counted expert's unigram entropy, log V for others.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | Sequence[float],
        prior_entropies: Mapping[str, float] | None = None,
    ):
        self.weights = weights
        self.prior_entropies = dict(prior_entropies or {})


class WeightRule:
    """The weights of K experts at every position.

    Args:
        names: of the experts.
        weights: name -> weight or one an expert: a number, or a function of positions.
            `EntropyWeights` for weights that depend on what the experts say.
        prior_entropies: of the experts, (K,) nats.
        may_sum_to_nothing: whether a cut-off holds a contrast of weights in bounds.

    Raises:
        ConfigError: if a weight is missing, unknown, not finite, or all of them sum to nothing.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Any,
        prior_entropies: Sequence[float],
        may_sum_to_nothing: bool,
    ):
        self.names = list(names)
        self.by_entropy = isinstance(weights, EntropyWeights)
        given = weights.weights if isinstance(weights, EntropyWeights) else weights
        self.weights = _listed(self.names, given)
        self.may_sum_to_nothing = may_sum_to_nothing
        own = weights.prior_entropies if isinstance(weights, EntropyWeights) else {}
        _check_names(self.names, own, "prior_entropies")
        for name, prior in own.items():
            if not isinstance(prior, Real) or not 0 <= prior < math.inf:
                raise ConfigError(
                    f"The prior entropy of the expert {name!r} is {prior!r}; it must be a number "
                    "of nats, 0 or more."
                )
        self.prior_entropies = torch.tensor(
            [own.get(name, prior) for name, prior in zip(names, prior_entropies, strict=True)]
        )
        self.is_scheduled = any(callable(weight) for weight in self.weights)
        if self.by_entropy and self.is_scheduled:
            raise ConfigError(
                "EntropyWeights takes numbers: its weights follow the experts' entropies, not the "
                "position."
            )
        self._check()

    def __call__(self, logps: Sequence[Tensor], positions: Tensor | None) -> Tensor:
        """(K,) weights, or (K, B, T) where they differ between positions.

        Args:
            logps: K tensors (B, T, V).
            positions: (B, T) of the tokens that they predict, 0 = the first of the completion;
                wanted if `is_scheduled`.
        """
        if self.by_entropy:
            return entropy_weights(logps, self._fixed(), self.prior_entropies)
        if not self.is_scheduled:
            return self._fixed()
        assert positions is not None
        weights = torch.stack([self._at(k, positions) for k in range(len(self.names))])
        if not self.may_sum_to_nothing and not (weights.sum(0) > 0).all():
            nothing = positions[weights.sum(0) <= 0].min().item()
            raise _nothing(f"the weights at position {nothing}", self.names)
        return weights

    @property
    def heaviest(self) -> int:
        """The expert of the largest weight; at the first position where they follow it."""
        start = torch.zeros(1, 1, dtype=torch.long)
        weights = [self._at(k, start).item() for k in range(len(self.names))]
        return weights.index(max(weights))

    def _fixed(self) -> Tensor:
        return torch.tensor(self.weights)

    def _at(self, expert: int, positions: Tensor) -> Tensor:
        weight = self.weights[expert]
        if not callable(weight):
            return torch.full(positions.shape, weight, device=positions.device)
        try:
            given = weight(positions)
        except Exception as error:  # a user's function may fail in any way
            raise ConfigError(
                f"The weight of the expert {self.names[expert]!r}, a function of positions, raised "
                f"{type(error).__name__}: {error}. It gets a tensor (B, T) of positions; write "
                "torch.where(positions < 3, 1.0, 0.2), not `1.0 if positions < 3 else 0.2`."
            ) from error
        try:
            value = torch.as_tensor(given, device=positions.device)
        except (TypeError, ValueError, RuntimeError):
            value = torch.tensor(math.nan)
        is_real = value.shape in ((), positions.shape) and not value.is_complex()
        if not is_real or not (value.abs() <= LARGEST).all():
            raise ConfigError(
                f"The weight of the expert {self.names[expert]!r} must be a number of at most "
                f"{LARGEST:g} in size at each of the positions {tuple(positions.shape)}, and its "
                f"schedule gave {given!r}."
            )
        return value.float().expand(positions.shape)

    def _check(self) -> None:
        fixed = torch.tensor([0.0 if callable(w) else w for w in self.weights])
        if not (fixed.abs() <= LARGEST).all():
            raise ConfigError(
                f"Weights must be finite, and at most {LARGEST:g} in size, got "
                f"{_shown(self.names, self.weights)}."
            )
        if self.is_scheduled:
            return
        if not fixed.any() or (not self.may_sum_to_nothing and fixed.sum() <= 0):
            raise _nothing(_shown(self.names, self.weights), self.names)


def _nothing(what: str, names: list[str]) -> ConfigError:
    return ConfigError(
        f"The weights sum to nothing: {what}. Their sum must be greater than 0, or the product "
        "is no distribution that the experts would recognise: for a pull by α of "
        f"{names[-1]!r} give it α, and the others 1 − α together. A contrast of weights "
        "that sum to 0 or less needs plausibility=0.1 and a weight that is not 0."
    )


def _listed(names: list[str], weights: Any) -> list[Weight]:
    if isinstance(weights, Mapping):
        _check_names(names, weights, "weights")
        missing = [name for name in names if name not in weights]
        if missing:
            raise ConfigError(f"There is no weight for the expert {missing[0]!r}.")
        weights = [weights[name] for name in names]
    if not isinstance(weights, Sequence | Tensor) or isinstance(weights, str):
        raise ConfigError(
            f"weights is {weights!r}; it must be a mapping name -> weight, or a list with one an "
            "expert."
        )
    weights = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    if len(weights) != len(names):
        raise ConfigError(
            f"{len(names)} experts need as many weights, got {len(weights)}: {weights}."
        )
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, EntropyWeights):
            raise ConfigError(
                f"The weight of the expert {name!r} is an EntropyWeights, which stands for the "
                "weights of all experts: weights=EntropyWeights({name: weight, ...})."
            )
        if not callable(weight) and (isinstance(weight, bool) or not isinstance(weight, Real)):
            raise ConfigError(
                f"The weight of the expert {name!r} is {weight!r}; it must be a number, or a "
                "function of positions (B, T) that returns one for each."
            )
    return [weight if callable(weight) else float(weight) for weight in weights]


def _check_names(names: list[str], given: Mapping[str, Any], what: str) -> None:
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ConfigError(
            f"{what} names {unknown[0]!r}, which is no expert. The experts: {', '.join(names)}."
        )


def _shown(names: Sequence[str], weights: Sequence[Weight]) -> str:
    return ", ".join(f"{name}={weight}" for name, weight in zip(names, weights, strict=True))
