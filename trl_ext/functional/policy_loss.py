"""Losses of a policy, per sequence or per token; the caller takes the mean and says over what."""

from typing import Literal

from torch import Tensor

from trl_ext.functional.masking import masked_mean, masked_sum


def weighted_nll(
    per_token_logps: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    token_reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """−w_n·log π(y_n|x): one completion's term of reward-weighted regression.

    Σ_n of it is the plug-in estimate, Equation E8, of the forward projection ℓ(θ) = −E_{π*}[log π]
    + const, Equation E7, if the y_n are samples of π_ref and w = gibbs_weights(r, β). The weights
    are constants: no gradient flows through them.

    Args:
        per_token_logps: (B, T) log-probabilities of the completion tokens under π, nats.
        weights: (B,) non-negative; those of one prompt sum to 1.
        mask: (B, T), 1 or True = keep.
        token_reduction: "sum" is log π(y_n|x), as derived; "mean" divides it by the number of kept
            tokens, which gives each completion the same say per token and is no longer a projection
            of π*.

    Returns:
        (B,) nats per sequence (per token with "mean"); 0 for a completion with no kept token.
    """
    reduce = {"sum": masked_sum, "mean": masked_mean}[token_reduction]
    return -weights.detach() * reduce(per_token_logps, mask)
