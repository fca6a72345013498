"""Products of experts over a vocabulary, token by token. All logarithms are natural."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trl_ext.functional.masking import at_least_float32


def product_of_experts(logps: Tensor | Sequence[Tensor], weights: Tensor) -> Tensor:
    """log Π_k p_k(v)^{w_k} / Z: the product of experts, normalised over the vocabulary.

    Equation E14, for two experts with weights α and 1 − α. A weight of 0 leaves its expert out. A
    token that an expert of positive weight forbids (−inf) is forbidden.

    Args:
        logps: (K, …, V) log-probabilities of K experts, or K tensors (…, V); unnormalised scores,
            such as a reward of each token, are allowed.
        weights: (K,), or (K, …) with a weight for each position. Negative ones push away.

    Returns:
        (…, V) log-probabilities, nats, float32 (float64 for float64 input).

    Raises:
        ValueError: if the shapes do not fit, a weight is not finite, or all are 0.
    """
    return weighted_scores(logps, weights).log_softmax(-1)


def weighted_scores(
    logps: Tensor | Sequence[Tensor], weights: Tensor, keep: Tensor | None = None
) -> Tensor:
    """Σ_k w_k log p_k(v): the product before it is normalised.

    Its log Σ_v exp is log Z(x_≤t) of Equation E14. For weights α and 1 − α in (0, 1), −log Z is 0
    where the experts agree and grows with their disagreement: (1 − α) times the Rényi divergence of
    order α between them.

    Args:
        logps: as for `product_of_experts`.
        weights: as there.
        keep: (…, V) bool, tokens that may be chosen; the others get −inf.

    Returns:
        (…, V) nats, float32 (float64 for float64 input). inf where a negative weight meets a token
        that its expert forbids and none of positive weight does.

    Raises:
        ValueError: as there.
    """
    columns = _columns(logps, weights)
    forbidden = torch.zeros((), dtype=torch.bool, device=columns[0].device)
    for column, scores in zip(columns, logps, strict=True):
        forbidden = forbidden | ((column > 0) & scores.isneginf())
    if keep is not None:
        forbidden = forbidden | ~keep
    total = torch.zeros((), device=columns[0].device)
    for column, scores in zip(columns, logps, strict=True):
        # 0·inf and inf − inf are NaN.
        unused = forbidden | (column == 0)
        total = total + torch.where(unused, 0.0, column * at_least_float32(scores))
    return total.masked_fill(forbidden, -torch.inf)


def entropy_weights(
    logps: Tensor | Sequence[Tensor], weights: Tensor, prior_entropies: Tensor
) -> Tensor:
    """Weights that move to the experts which know more here: the generalised product.

    Equation E20; source: Cao and Fleet (2014), "Generalized product of experts". The weight of
    expert k is w_k·max(0, H_k⁰ − H(p_k)), by how much it lowers the entropy below its prior's H_k⁰,
    scaled so that Σ|weights| stays Σ|w|. Where none lowers it, the weights are w.

    Args:
        logps: (K, …, V) normalised log-probabilities, or K tensors (…, V).
        weights: (K,) the weights w of experts that know equally much.
        prior_entropies: (K,) nats, at least 0; log V for an expert without a prior.

    Returns:
        (K, …) weights, float32 (float64 for float64 input).

    Raises:
        ValueError: if there is not one weight and one prior entropy an expert.
    """
    if not len(logps) == len(weights) == len(prior_entropies):
        raise ValueError(
            f"{len(logps)} experts need as many weights and prior entropies, got {len(weights)} "
            f"and {len(prior_entropies)}."
        )
    gains = torch.stack(
        [
            (prior - entropy(scores)).clamp(min=0)
            for prior, scores in zip(prior_entropies, logps, strict=True)
        ]
    )
    base = weights.to(gains).reshape(-1, *(1,) * (gains.dim() - 1))
    grown = base * gains
    total, wanted = grown.abs().sum(0), base.abs().sum(0)
    return torch.where(total > 0, grown * (wanted / torch.where(total > 0, total, 1.0)), base)


def entropy(logps: Tensor) -> Tensor:
    """−Σ_v p(v) log p(v) over the vocabulary.

    Source: Shannon.

    Args:
        logps: (…, V) normalised log-probabilities, nats; −inf counts as 0.

    Returns:
        (…) nats, between 0 and log V.
    """
    logps = at_least_float32(logps)
    return -torch.where(logps.isneginf(), 0.0, logps.exp() * logps).sum(-1)


def plausible(logps: Tensor, cutoff: float) -> Tensor:
    """Which tokens have at least `cutoff` times the probability of the likeliest.

    Source: Li et al. (2023), "Contrastive decoding", Equation 2 (arXiv:2210.15097). Where a
    negative weight takes one expert's probabilities out of another's, tokens that both hold
    improbable would win by their ratio; they are left out.

    Args:
        logps: (…, V) log-probabilities of the expert that judges, nats.
        cutoff: 0 < cutoff ≤ 1; 1 keeps the likeliest only.

    Returns:
        (…, V) bool; the likeliest token is always kept.

    Raises:
        ValueError: if the cut-off lies outside.
    """
    if not 0 < cutoff <= 1:
        raise ValueError(f"cutoff must be greater than 0 and at most 1, got {cutoff}.")
    return logps >= logps.amax(-1, keepdim=True) + math.log(cutoff)


def _columns(logps: Tensor | Sequence[Tensor], weights: Tensor) -> Tensor:
    """(K, …, 1) weights that multiply scores (…, V)."""
    if len(logps) == 0:
        raise ValueError("A product of experts needs at least one expert, got none.")
    positions = logps[0].shape[:-1]
    if len(weights) != len(logps) or weights.shape[1:] not in ((), positions):
        raise ValueError(
            f"{len(logps)} experts over {tuple(positions)} positions take weights ({len(logps)},) "
            f"or {(len(logps), *positions)}, got {tuple(weights.shape)}."
        )
    if any(scores.shape != logps[0].shape for scores in logps):
        shapes = ", ".join(str(tuple(scores.shape)) for scores in logps)
        raise ValueError(f"Experts must have scores of one shape (…, V), got {shapes}.")
    if not weights.isfinite().all() or not weights.any():
        raise ValueError(
            f"weights must be finite and not all 0, got {weights.tolist()}: they sum to nothing."
        )
    return weights.to(logps[0].device)[..., None]
