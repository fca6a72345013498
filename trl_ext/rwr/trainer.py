"""Online reward-weighted regression on top of TRL's generation, reward and logging machinery."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from trl_ext.functional import (
    all_equal,
    effective_sample_size,
    gibbs_weights,
    k1,
    log_mean_exp,
    masked_sum,
    optimism,
    target_log_weights,
    weight_entropy,
    weighted_nll,
)
from trl_ext.policy_config import PolicyConfig
from trl_ext.rollout import MicroBatch, Rollout
from trl_ext.rwr.config import RWRConfig
from trl_ext.trl_adapter import PolicyTrainer


class RWRTrainer(PolicyTrainer):
    """Project the policy onto π* ∝ π_ref·exp(r/β) by weighted regression on its own samples.

    Source: Peters and Schaal (2007), "Reinforcement learning by reward-weighted regression for
    operational space control"; Equations E7-E11. For G completions y_n of a prompt x

        loss(x) = −Σ_n w_n log π(y_n|x),        w = softmax(r(x, y_1..G)/β),

    averaged over the prompts of the batch, dropped ones included. It differs from its parent: no
    advantages that push down, no importance ratio, no clipping; weights are positive and sum to 1
    for each prompt. A completion that no reward function scores has weight 0. With `num_iterations`
    > 1 the regression on one rollout goes on, towards the projection itself. Completions by vLLM
    are weighed by exp(r/β)·π/μ, μ being vLLM's probability of them.

    Takes the arguments of `trl.GRPOTrainer`, with an `RWRConfig`.
    """

    config_class: ClassVar[type[PolicyConfig]] = RWRConfig
    args: RWRConfig

    _tag_names: ClassVar[list[str]] = ["trl_ext", "rwr"]
    _name = "RWR"
    _paper: ClassVar[dict[str, str]] = {}

    def uses_reference(self, args: PolicyConfig) -> bool:
        assert isinstance(args, RWRConfig)
        return args.log_kl or args.reference == "fixed"

    @property
    def reads_ref_logps(self) -> bool:
        return self.args.reference == "fixed"

    def score_completions(self, score_once: Callable[[], Tensor]) -> Tensor:
        samples = torch.stack([score_once() for _ in range(self.args.reward_samples)])
        if self.args.reward_samples > 1 and self.args.beta > 0:
            summed = (samples * self.reward_weights.to(samples.device)).nansum(dim=-1)
            scored = ~samples.isnan().all(dim=-1).any(dim=0)
            inflation = optimism(summed[:, scored].T, self.args.beta)
            self.log_metric("rwr/optimism", inflation.mean().item())
        return samples.nanmean(dim=0)

    def assign_credit(self, rollout: Rollout) -> Tensor:
        scores, beta = rollout.rewards_PG, self.args.beta
        # mask_truncated_completions empties masks: such a completion cannot carry weight.
        keep = (
            self.over_groups(rollout.batch["completion_mask"].any(dim=1), rollout) & ~scores.isnan()
        )
        uniform = all_equal(scores, keep)
        if self.args.reference == "fixed":
            log_ratios = -self._sampler_log_ratio(rollout)
            scores, beta = target_log_weights(scores, log_ratios, beta), 1.0
            uniform = all_equal(scores, keep)
        elif "importance_sampling_ratio" in rollout.batch and beta > 0:
            # Samples of vLLM's μ, weighed as those of π: (B, 1), as TRL truncates or masks it.
            ratios = self.over_groups(rollout.batch["importance_sampling_ratio"], rollout)[..., 0]
            keep = keep & (ratios > 0)
            scores, beta = target_log_weights(scores, ratios.log(), beta), 1.0
        weights = gibbs_weights(scores, beta, mask=keep)
        self._log_weights(scores, beta, weights, keep, uniform)
        if self.args.drop_uniform_groups:
            weights = weights.masked_fill(uniform.unsqueeze(1), 0.0)
        return rollout.local(weights)

    def needs_every_row(self, batch: Mapping[str, Any]) -> bool:
        return False

    def policy_loss(self, micro_batch: MicroBatch) -> Tensor:
        nll = weighted_nll(
            micro_batch.per_token_logps,
            micro_batch.credit,
            micro_batch.mask,
            token_reduction=self.args.token_reduction,
        )
        # The weights of a prompt sum to 1 over its G rows: a mean over rows times G is the mean
        # over prompts.
        return nll.mean() * self.group_size

    def _sampler_log_ratio(self, rollout: Rollout) -> Tensor:
        """(P, G) log π/π_ref of each completion under the policy that sampled it, nats."""
        per_token = k1(self.sampler_logps(rollout), rollout.batch["ref_per_token_logps"])
        return self.over_groups(masked_sum(per_token, rollout.mask), rollout)

    def _log_weights(
        self, scores: Tensor, beta: float, weights: Tensor, keep: Tensor, uniform: Tensor
    ) -> None:
        self.log_metric("rwr/uniform_groups", uniform.float().mean().item())
        # Dropped groups teach nothing: what the others weigh says whether β suits the reward.
        used = weights[~uniform] if self.args.drop_uniform_groups else weights
        if len(used):
            self.log_metric("rwr/effective_sample_size", effective_sample_size(used).mean().item())
            self.log_metric("rwr/weight_entropy", weight_entropy(used).mean().item())
        if beta > 0:
            self.log_metric("rwr/log_z", log_mean_exp(scores, beta, mask=keep).nanmean().item())
