"""Which KL penalties are sound: what the expected gradient of each combination is, and why not.

The penalty meant is β·KL(π‖π_ref) of sequences. `trl_ext kl-table` shows all of this in numbers,
and a contract test holds the two together. Plain data: nothing is imported to check a recipe.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

PLACEMENTS = ("loss", "reward", "both", "none")
# Estimators that look at the whole vocabulary at each prefix, and not at the sampled token alone.
OVER_THE_VOCABULARY = ("exact", "topk")
CONTROLLERS = ("constant", "adaptive", "proportional")

# (estimator, placement, importance ratio) -> what its expected gradient is, on-policy. "whole":
# ∇KL of sequences. "per step": each step's own KL; its effect on later prefixes is missing.
GRADIENTS = {
    ("k1", "reward", False): "whole",
    ("k1", "loss", True): "per step",
    ("k2", "loss", False): "per step",
    ("k2", "loss", True): "per step",
    ("k3", "loss", True): "per step",
    ("exact", "loss", False): "per step",
    ("exact", "both", False): "whole",
}
# The others: why not, and what to do instead.
UNSOUND = {
    ("k1", "loss", False): (
        "its expected gradient is zero, so it penalises nothing",
        "kl_is_correction: true, or kl_placement: reward",
    ),
    ("k3", "loss", False): (
        "its expected gradient is that of KL(π_ref‖π), the other way round",
        "kl_is_correction: true",
    ),
    ("k2", "reward", False): (
        "as a reward its expectation is not the KL, and a step's own part is lost",
        "kl_estimator: k1, or kl_placement: loss",
    ),
    ("k3", "reward", False): (
        "as a reward it loses each step's own part, which only k1 carries",
        "kl_estimator: k1, or kl_placement: loss with kl_is_correction: true",
    ),
    ("exact", "reward", False): (
        "as a reward it carries what follows a token, and each step's own part is lost",
        "kl_placement: both, which differentiates that part",
    ),
    ("topk", "loss", False): (
        "it is the KL with all but the likeliest tokens merged, a lower bound, and so is its "
        "gradient",
        "kl_estimator: exact, which takes as long",
    ),
}

# What `poe_alpha` does not go with: option, its values that are right, why others are not, what
# to set it to.
_AGAINST_ALPHA = (
    ("kl_controller", ("constant",), "moves beta, which 1/poe_alpha holds", "constant"),
    ("kl_placement", ("loss", "reward", "both"), "leaves no penalty for beta to scale", "reward"),
    (
        "scale_rewards",
        ("none", False),
        "divides rewards by their standard deviation, so that beta is in other units",
        "none",
    ),
    (
        "multi_objective_aggregation",
        ("sum_then_normalize",),
        "divides rewards by their standard deviation, so that beta is in other units",
        "sum_then_normalize",
    ),
    (
        "reference",
        ("fixed",),
        "tilts the policy once more with every rollout, so that it passes the product",
        "fixed",
    ),
)


def kl_findings(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with the KL options of a policy trainer: (option, why and what to do).

    Args:
        values: the options that start with `kl_`, `allow_biased_kl` and `beta`, defaults included.
    """
    found = [
        (name, f"got {values[name]!r}; allowed: {', '.join(allowed)}.")
        for name, allowed in (("kl_placement", PLACEMENTS), ("kl_controller", CONTROLLERS))
        if values[name] not in allowed
    ]
    found += _numbers(values) + _controller(values)
    if not found and values["beta"] and values["kl_placement"] != "none":
        found += _soundness(values)
    return found


def beta_of_alpha(alpha: Any, beta: Any, default: Any) -> Any:
    """β of a config: 1/α where `poe_alpha` is given and `beta` is not (it is at its default)."""
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        return beta
    if not 0 < alpha < math.inf or beta not in (default, 1 / alpha):
        return beta
    return 1 / alpha


def alpha_findings(values: Mapping[str, Any], refused: Collection[str]) -> list[tuple[str, str]]:
    """What keeps a trainer with `poe_alpha` from its target: (option, why and what to do).

    Of several rewards any may be the log-ratio, so that their weights are left alone: its own must
    be 1, and each of the others tilts the product by exp(poe_alpha·weight·reward).

    Args:
        values: the options of the trainer, defaults included, `beta` as `beta_of_alpha` has it.
        refused: options that the trainer does not have a use for.
    """
    alpha = values["poe_alpha"]
    if alpha is None:
        return []
    if not 0 < alpha < math.inf or math.isinf(1 / alpha):
        return [
            (
                "poe_alpha",
                f"got {alpha!r}; it must be greater than 0, and finite: the weight of the second "
                "model, 1 for that model alone (above 1 extrapolates).",
            )
        ]
    if not math.isclose(values["beta"], 1 / alpha, rel_tol=1e-6):
        return [
            (
                "poe_alpha",
                f"poe_alpha={alpha!r} sets beta to 1/{alpha!r} = {1 / alpha:g}, and beta is given "
                f"as {values['beta']!r}. Remove one of the two.",
            )
        ]
    found = [
        ("poe_alpha", f"{name}={values[name]!r} {why}. Set {name}={instead!r}.")
        for name, wanted, why, instead in _AGAINST_ALPHA
        if name in values and name not in refused and values[name] not in wanted
    ]
    weights = values.get("reward_weights")
    if isinstance(weights, list | tuple) and len(weights) == 1 and weights[0] != 1:
        found.append(
            (
                "poe_alpha",
                f"reward_weights={weights!r} multiplies the only reward, so that {alpha!r} times "
                f"{weights[0]!r} would take the place of poe_alpha. Remove reward_weights, and "
                "give poe_alpha alone.",
            )
        )
    return found


def _soundness(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    estimator, placement = values["kl_estimator"], values["kl_placement"]
    corrected = values["kl_is_correction"]
    if placement == "both" and estimator not in OVER_THE_VOCABULARY:
        return [
            (
                "kl_placement",
                f"both is for kl_estimator: exact; {estimator} in the reward carries a step's own "
                "part already. Use kl_placement: reward.",
            )
        ]
    if estimator in OVER_THE_VOCABULARY and corrected:
        return [
            (
                "kl_is_correction",
                f"{estimator} is an expectation over the token, so that its ratio would only add "
                "variance. Set it to false.",
            )
        ]
    if placement == "reward" and corrected:
        return [
            (
                "kl_is_correction",
                "is for kl_placement: loss; in the reward, the surrogate's own ratio weighs the "
                "penalty. Set it to false.",
            )
        ]
    if (estimator, placement, corrected) in GRADIENTS or values["allow_biased_kl"]:
        return []
    where = "reward and the loss" if placement == "both" else placement
    combination = f"{estimator} in the {where}{', corrected' if corrected else ''}"
    unknown = (
        "nothing is known of its gradient",
        f"`trl_ext kl-table --method {estimator} --placement {placement}` to see what it does",
    )
    # The top k are no better where they enter by the reward.
    known = ("topk", "loss", False) if estimator == "topk" else (estimator, placement, corrected)
    why, instead = UNSOUND.get(known, unknown)
    return [
        (
            "kl_estimator",
            f"{combination}: {why}. Use {instead}; or allow_biased_kl: true to have it all the "
            "same.",
        )
    ]


def _numbers(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [
        (name, f"got {values[name]!r}; it must be greater than 0, and finite.")
        for name in ("kl_clamp", "kl_target", "kl_horizon", "kl_topk")
        if values[name] is not None and not 0 < values[name] < math.inf
    ]
    if values["kl_placement"] != "none" and not 0 <= values["beta"] < math.inf:
        found.append(("beta", f"got {values['beta']!r}; it must be from 0 on, and finite."))
    return found


def _controller(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    adapts = values["kl_controller"] in ("adaptive", "proportional")
    if adapts and values["kl_target"] is None:
        return [("kl_target", f"kl_controller: {values['kl_controller']} needs a target, in nats.")]
    if adapts and values["kl_placement"] == "none":
        return [("kl_controller", "scales a penalty, and kl_placement: none has none.")]
    if adapts and not values["beta"]:
        return [("beta", "a KL controller scales beta: it must start above 0.")]
    if not adapts and values["kl_target"] is not None:
        return [("kl_target", "does nothing with kl_controller: constant. Use adaptive.")]
    return []
