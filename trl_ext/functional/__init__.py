"""Pure tensor mathematics: every formula of trl_ext, once, in torch alone."""

from trl_ext.functional.gibbs import (
    effective_sample_size,
    gibbs_weights,
    log_mean_exp,
    optimism,
    prefix_log_ratio,
    weight_entropy,
)
from trl_ext.functional.kl import k1, k2, k3
from trl_ext.functional.masking import masked_mean, masked_sum
from trl_ext.functional.policy_loss import weighted_nll

__all__ = [
    "effective_sample_size",
    "gibbs_weights",
    "k1",
    "k2",
    "k3",
    "log_mean_exp",
    "masked_mean",
    "masked_sum",
    "optimism",
    "prefix_log_ratio",
    "weight_entropy",
    "weighted_nll",
]
