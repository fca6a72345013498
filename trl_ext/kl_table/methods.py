"""The ways in which libraries penalise the KL to the reference, written from their definitions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trl_ext.errors import ConfigError
from trl_ext.functional import exact_kl, k1, k2, k3, topk_kl
from trl_ext.kl_table.samples import Formula, Placement, Samples

Part = Literal["whole", "per step"]
# Of a vocabulary of a few tokens, two stand for the top k of a real one.
_TOP_K = 2


@dataclass(frozen=True)
class Method:
    """One way to penalise KL(π‖π_ref).

    Attributes:
        name: as its users know it.
        source: the library whose setting it is.
        formula: the per-token estimate.
        placement: see `penalty_terms`.
        claim: what part of ∇KL its expected gradient is said to be on-policy; None: neither.
        off_policy_claim: the same for samples of another policy.
    """

    name: str
    source: str
    formula: Formula
    placement: Placement
    claim: Part | None = None
    off_policy_claim: Part | None = None


def _sampled(estimate) -> Formula:
    return lambda samples: estimate(samples.logps, samples.ref_logps)


def _at_rollout(estimate) -> Formula:
    """Of the policy that sampled: what a reward is made from."""
    return lambda samples: estimate(samples.old_logps, samples.ref_logps)


def _corrected(estimate) -> Formula:
    """ρ·k: the ratio takes part in the gradient."""
    return lambda samples: samples.ratio * estimate(samples.logps, samples.ref_logps)


def _weighted_k2(samples: Samples) -> Tensor:
    """ρ·k2 with ρ as a constant: k2's gradient k1·∇log π is right as it is, and only reweighed."""
    return samples.ratio.detach() * k2(samples.logps, samples.ref_logps)


def _exact(samples: Samples) -> Tensor:
    return exact_kl(samples.logits, samples.ref_logits)


def _topk(samples: Samples) -> Tensor:
    return topk_kl(samples.logits, samples.ref_logits, _TOP_K)


def _absolute(samples: Samples) -> Tensor:
    return k1(samples.logps, samples.ref_logps).abs()


def _low_var_kl(samples: Samples) -> Tensor:
    """verl's k3: the log-ratio clamped at ±20, the estimate at ±10."""
    difference = (samples.ref_logps - samples.logps).clamp(-20, 20)
    return (difference.exp() - difference - 1).clamp(-10, 10)


def _straight_through(formula: Formula, slope: Formula) -> Formula:
    """The value of one formula with the gradient of another."""

    def value_with_gradient(samples: Samples) -> Tensor:
        backward = slope(samples)
        return formula(samples).detach() + backward - backward.detach()

    return value_with_gradient


def _plus(formula: Formula) -> Formula:
    """verl's "+": the gradient is that of k2."""
    return _straight_through(formula, _sampled(k2))


def _unbiased_gradient(formula: Formula) -> Formula:
    """OpenRLHF's option of that name: the gradient is min(ρ, 10)·k1·∇log π.

    Source: `compute_approx_kl` and `KL_IS_WEIGHT_CLIP` of openrlhf/models/utils.py, since its pull
    request 1309. ρ is a token's own ratio and a constant; the value stays that of the formula.
    """
    return _straight_through(
        formula, lambda s: s.ratio.detach().clamp(max=10.0) * k2(s.logps, s.ref_logps)
    )


def _clamped(estimate, limit: float = 10.0) -> Formula:
    return lambda samples: estimate(samples.logps, samples.ref_logps).clamp(-limit, limit)


OURS = [
    Method("k1 in the loss", "trl_ext", _sampled(k1), "loss"),
    Method("k2 in the loss", "trl_ext", _sampled(k2), "loss", "per step"),
    Method("k3 in the loss", "trl_ext", _sampled(k3), "loss"),
    Method("ratio·k1 in the loss", "trl_ext", _corrected(k1), "loss", "per step", "per step"),
    Method("ratio·k2 in the loss", "trl_ext", _weighted_k2, "loss", "per step", "per step"),
    Method("ratio·k3 in the loss", "trl_ext", _corrected(k3), "loss", "per step", "per step"),
    Method("exact in the loss", "trl_ext", _exact, "loss", "per step", "per step"),
    Method("topk in the loss", "trl_ext", _topk, "loss"),
    Method("k1 in the reward", "trl_ext", _at_rollout(k1), "reward", "whole"),
    Method("k2 in the reward", "trl_ext", _at_rollout(k2), "reward"),
    Method("k3 in the reward", "trl_ext", _at_rollout(k3), "reward"),
    Method("exact in the reward", "trl_ext", _exact, "reward"),
    Method("exact in reward and loss", "trl_ext", _exact, "reward and loss", "whole"),
    Method(
        "k1 in the reward, corrected", "trl_ext", _sampled(k1), "corrected reward", "whole", "whole"
    ),
]

OTHERS = [
    Method("GRPO", "TRL", _corrected(k3), "loss"),
    Method("GRPO, use_bias_correction_kl false", "TRL", _sampled(k3), "loss"),
    Method("RLOO", "TRL", _at_rollout(k1), "return"),
    Method("kl", "verl", _sampled(k1), "loss"),
    Method("abs", "verl", _absolute, "loss"),
    Method("mse", "verl", _sampled(k2), "loss"),
    Method("low_var_kl", "verl", _low_var_kl, "loss"),
    Method("kl+", "verl", _plus(_sampled(k1)), "loss"),
    Method("abs+", "verl", _plus(_absolute), "loss"),
    Method("mse+", "verl", _plus(_sampled(k2)), "loss"),
    Method("low_var_kl+", "verl", _plus(_low_var_kl), "loss"),
    Method("kl in the reward", "verl", _at_rollout(k1), "reward"),
    Method("k1 in the reward", "OpenRLHF", _at_rollout(k1), "reward"),
    Method("k2 in the loss", "OpenRLHF", _sampled(k2), "loss"),
    Method("k3 in the loss", "OpenRLHF", _sampled(k3), "loss"),
    Method("k1, unbiased_gradient", "OpenRLHF", _unbiased_gradient(_clamped(k1)), "loss"),
    Method("k2, unbiased_gradient", "OpenRLHF", _unbiased_gradient(_clamped(k2)), "loss"),
    Method("k3, unbiased_gradient", "OpenRLHF", _unbiased_gradient(_clamped(k3)), "loss"),
    Method("k1 in the loss, clamp ±10", "others", _clamped(k1), "loss"),
    Method("k3 in the loss, clamp ±10", "others", _clamped(k3), "loss"),
]


def user_method(
    name: str, function: Callable[[Tensor, Tensor], Tensor], placement: Placement
) -> Method:
    """A user's own formula, `function(logps, ref_logps)` -> (B, T), as a method.

    Raises:
        ConfigError: if it is no function; and when it is evaluated, if it fails, does not give one
            finite number a token, or in the loss one without gradient.
    """
    expected = "It is called with (logps, ref_logps), both (B, T), and returns one number a token."
    if not callable(function):
        raise ConfigError(
            f"{name} is no function, but of type {type(function).__name__}. {expected}"
        )

    def checked(logps: Tensor, ref_logps: Tensor) -> Tensor:
        try:
            values = function(logps, ref_logps)
        except Exception as error:  # a user's function may fail in any way
            raise ConfigError(
                f"{name} raised {type(error).__name__}: {error}. {expected}"
            ) from error
        if not isinstance(values, Tensor) or values.shape != logps.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(
                f"{name} must return a tensor of one number a token, of the shape of its "
                f"arguments, {tuple(logps.shape)}; got {got}."
            )
        if not torch.isfinite(values).all():
            raise ConfigError(f"{name} gave NaN or an infinity for finite log-probabilities.")
        if placement == "loss" and not values.requires_grad:
            raise ConfigError(
                f"{name} has no gradient, so it does nothing in the loss. Compute it from logps "
                "without detach, no_grad or NumPy; or use --placement reward."
            )
        return values

    formula = _sampled(checked) if placement == "loss" else _at_rollout(checked)
    return Method(name, "yours", formula, placement)
