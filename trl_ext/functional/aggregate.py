"""Adding up a loss per token: over what the mean is taken."""

from typing import Literal

from torch import Tensor

from trl_ext.functional.masking import masked_mean, masked_sum

TokenAggregation = Literal["completion means", "tokens", "fixed length", "completion sums"]


def aggregate_tokens(
    per_token: Tensor,
    mask: Tensor,
    how: TokenAggregation,
    *,
    count: Tensor | float | None = None,
) -> Tensor:
    """One loss from a loss per token.

    Source: TRL's loss types. "completion means" (grpo): the mean over completions of each one's
    mean; short ones weigh more a token. "tokens" (dapo with the count of the whole batch, bnpo with
    that of the micro-batch): all tokens alike. "fixed length" (dr_grpo): by completions times
    `count` tokens. "completion sums" (luspo): the mean over completions of their sums, as sequence
    log-probabilities and the sequence KL add up.

    Args:
        per_token: (B, T).
        mask: (B, T), 1 or True = keep.
        how: see above.
        count: tokens that "tokens" divides by (None: those of the mask), or the length that
            "fixed length" divides by.

    Returns:
        A scalar in the units of `per_token`; 0 where nothing is kept.
    """
    if how == "completion means":
        return masked_mean(per_token, mask).mean()
    sums = masked_sum(per_token, mask)
    if how == "completion sums":
        return sums.mean()
    if how == "fixed length":
        assert count is not None
        return sums.mean() / count
    kept = mask.bool().sum().clamp(min=1) if count is None else count
    return sums.sum() / kept
