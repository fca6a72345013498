"""Pure tensor mathematics: every formula of trl_ext, once, in torch alone."""

from trl_ext.functional.advantages import (
    gae,
    importance_weights,
    next_values,
    off_policy_credit,
    reward_to_go,
)
from trl_ext.functional.aggregate import TokenAggregation, aggregate_tokens
from trl_ext.functional.baselines import Baseline, baseline, held_returns, score_norms
from trl_ext.functional.calibration import (
    Binning,
    Reliability,
    brier,
    expected_calibration_error,
    reliability,
    success_probability,
)
from trl_ext.functional.ensemble import ensemble_score, ensemble_spread
from trl_ext.functional.experts import (
    entropy,
    entropy_weights,
    plausible,
    product_of_experts,
    weighted_scores,
)
from trl_ext.functional.gibbs import (
    clip_weights,
    effective_sample_size,
    gibbs_weights,
    log_mean_exp,
    optimism,
    prefix_log_ratio,
    target_log_weights,
    weight_entropy,
)
from trl_ext.functional.kl import exact_forward_kl, exact_kl, k1, k2, k3, topk_kl
from trl_ext.functional.masking import all_equal, masked_mean, masked_moments, masked_sum
from trl_ext.functional.monte_carlo import (
    log_mean_exp_standard_error,
    standard_error_is_believed,
)
from trl_ext.functional.policy_loss import clipped_surrogate, value_loss, weighted_nll
from trl_ext.functional.preference_loss import (
    centering_loss,
    pairwise_loss,
    plackett_luce_loss,
    preference_margins,
)
from trl_ext.functional.ranking import (
    kendall_tau_b,
    mean_ranks,
    pairwise_differences,
    probability_greater,
    spearman,
)
from trl_ext.functional.selection import best_of_n_accuracy, majority_accuracy

__all__ = [
    "Baseline",
    "Binning",
    "Reliability",
    "TokenAggregation",
    "aggregate_tokens",
    "all_equal",
    "baseline",
    "best_of_n_accuracy",
    "brier",
    "centering_loss",
    "clip_weights",
    "clipped_surrogate",
    "effective_sample_size",
    "ensemble_score",
    "ensemble_spread",
    "entropy",
    "entropy_weights",
    "exact_forward_kl",
    "exact_kl",
    "expected_calibration_error",
    "gae",
    "gibbs_weights",
    "held_returns",
    "importance_weights",
    "k1",
    "k2",
    "k3",
    "kendall_tau_b",
    "log_mean_exp",
    "log_mean_exp_standard_error",
    "majority_accuracy",
    "masked_mean",
    "masked_moments",
    "masked_sum",
    "mean_ranks",
    "next_values",
    "off_policy_credit",
    "optimism",
    "pairwise_differences",
    "pairwise_loss",
    "plackett_luce_loss",
    "plausible",
    "preference_margins",
    "prefix_log_ratio",
    "probability_greater",
    "product_of_experts",
    "reliability",
    "reward_to_go",
    "score_norms",
    "spearman",
    "standard_error_is_believed",
    "success_probability",
    "target_log_weights",
    "topk_kl",
    "value_loss",
    "weight_entropy",
    "weighted_nll",
    "weighted_scores",
]
