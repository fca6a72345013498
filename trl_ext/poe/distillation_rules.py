"""Which options of distilling a product go together. Plain data: recipes are checked with it."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
EXPERT_DTYPES = ("float32", "bfloat16", "float16")
# λ of the Jensen-Shannon divergence where none is given.
EVEN = 0.5


def distillation_findings(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with these options: name of the option, problem.

    Args:
        options: experts, expert_weights, expert_dtype, plausibility, divergence, jsd_weight,
            temperature; the first two may be None where the experts are given as an object.
    """
    return [
        *_of_choices(options),
        *_of_temperature(options["temperature"]),
        *_of_divergence(options),
        *_of_plausibility(options),
        *_of_experts(options["experts"]),
        *_of_weights(options),
    ]


def _of_choices(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, f"got {options[name]!r}; it must be one of {', '.join(allowed)}.")
        for name, allowed in (("divergence", DIVERGENCES), ("expert_dtype", EXPERT_DTYPES))
        if options[name] not in allowed
    ]


def _of_temperature(temperature: Any) -> list[tuple[str, str]]:
    if _is_number(temperature) and 0 < temperature < math.inf:
        return []
    return [
        (
            "temperature",
            f"got {temperature!r}; it must be a number greater than 0: the student samples, and "
            "both distributions are compared, at it.",
        )
    ]


def _of_divergence(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    weight, divergence = options["jsd_weight"], options["divergence"]
    if weight is None:
        return []
    if divergence != "jsd":
        return [
            (
                "jsd_weight",
                f"got {weight!r}, which does nothing with divergence: {divergence}. Remove it, or "
                "set divergence: jsd.",
            )
        ]
    if not _is_number(weight) or not 0 < weight < 1:
        return [
            (
                "jsd_weight",
                f"got {weight!r}; it must lie between 0 and 1, both excluded: at 0 the divergence "
                "is forward_kl and at 1 reverse_kl, which have names of their own.",
            )
        ]
    return []


def _of_plausibility(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    cutoff = options["plausibility"]
    if cutoff is None:
        return []
    if not _is_number(cutoff) or not 0 < cutoff <= 1:
        return [
            ("plausibility", f"got {cutoff!r}; it must be greater than 0 and at most 1, or null.")
        ]
    if options["divergence"] == "reverse_kl":
        return [("plausibility", NO_ZEROS.format(what=f"got {cutoff!r}, which"))]
    return []


NO_ZEROS = (
    "{what} gives tokens probability 0, and KL(student‖product), divergence: reverse_kl, is then "
    "infinite. Use divergence: forward_kl or jsd."
)


def _of_experts(experts: Any) -> list[tuple[str, str]]:
    if experts is None:
        return []
    if not isinstance(experts, Mapping):
        return [
            ("experts", f"got a {type(experts).__name__}; it must map names to paths or hub ids.")
        ]
    if not experts:
        return [("experts", "names no expert; a product needs at least one, name: path or hub id.")]
    return [
        ("experts", f"the expert {name!r} lies at {path!r}; give a path, a hub id or bundled:name.")
        for name, path in experts.items()
        if not isinstance(path, str) or not path
    ]


def _of_weights(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    experts, weights = options["experts"], options["expert_weights"]
    if experts is None and weights is None:
        return []
    if experts is None:
        return [("expert_weights", "given without experts: name the experts that they weigh.")]
    if not isinstance(experts, Mapping) or not experts:
        return []
    if not isinstance(weights, Mapping):
        got = "missing" if weights is None else f"got a {type(weights).__name__}"
        return [("expert_weights", f"{got}; give each expert a number: {', '.join(experts)}.")]
    unknown = [name for name in weights if name not in experts]
    found = [("expert_weights", _unknown(name, list(experts))) for name in unknown]
    missing = [name for name in experts if name not in weights]
    found += [("expert_weights", f"has no weight for the expert {name!r}.") for name in missing]
    wrong = {n: w for n, w in weights.items() if not _is_number(w) or not math.isfinite(w)}
    found += [
        ("expert_weights", f"the weight of {name!r} is {weight!r}; it must be a finite number.")
        for name, weight in wrong.items()
    ]
    return found or _of_sum(weights, options["plausibility"])


def _of_sum(weights: Mapping[str, float], plausibility: float | None) -> list[tuple[str, str]]:
    total = sum(weights.values())
    shown = ", ".join(f"{name}={weight:g}" for name, weight in weights.items())
    if not any(weights.values()):
        return [("expert_weights", f"all are 0 ({shown}): the product would know nothing.")]
    if total <= 0 and plausibility is None:
        return [
            (
                "expert_weights",
                f"sum to {total:g} ({shown}), and must sum to more than 0, or the product is no "
                "distribution that the experts would recognise. A contrast needs plausibility: "
                "0.1, which cuts it off, and divergence: forward_kl or jsd.",
            )
        ]
    return []


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"names {name!r}, which is no expert.{hint} The experts: {', '.join(known)}."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
