"""REINFORCE on top of TRL's generation, reward and logging machinery."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from trl_ext.functional import (
    baseline,
    held_returns,
    importance_weights,
    off_policy_credit,
    reward_to_go,
    score_norms,
)
from trl_ext.policy_config import PolicyConfig
from trl_ext.reinforce.config import ReinforceConfig
from trl_ext.rollout import MicroBatch, Rollout
from trl_ext.trl_adapter import PolicyTrainer


class ReinforceTrainer(PolicyTrainer):
    """Policy gradient with a return for each token: Σ_t ∇log π(y_t|y_<t) (Ψ_t − b_t).

    Source: Williams (1992), "Simple statistical gradient-following algorithms for connectionist
    reinforcement learning"; Equations E32-E38. Ψ_t = Σ_{s≥t} γ^{s−t} r_s is the reward-to-go, r_s
    = −β·KL_s, plus the completion's reward on its last token (`token_rewards`). The loss of a token
    is −(Ψ_t − b_t) log π(y_t), importance-weighted where the rollout is an older policy's; what it
    weighs is then E_π[Σ r] of the rewards as they were given, the KL's among them.

    Differs from `GRPOTrainer`: nothing is normalised or clipped, credit belongs to tokens, and KL
    and reward have one unit, so that β is that of π* ∝ π_ref·exp(r/β).

    Takes the arguments of `trl.GRPOTrainer`, with a `ReinforceConfig`. A reward function may return
    a list of one number a token instead of one number.
    """

    config_class: ClassVar[type[PolicyConfig]] = ReinforceConfig
    args: ReinforceConfig

    _tag_names: ClassVar[list[str]] = ["trl_ext", "reinforce"]
    _name = "REINFORCE"
    _paper: ClassVar[dict[str, str]] = {}

    def assign_credit(self, rollout: Rollout) -> Tensor:
        if not self.model.training:
            return rollout.batch["advantages"]
        rewards = self.token_rewards(rollout)
        to_go = reward_to_go(rewards, rollout.mask, gamma=self.args.gamma)
        scored = ~rollout.rewards_PG.isnan()
        compared_with = rollout.local(self._baseline(to_go, rollout, scored))
        keep = rollout.local(scored)[:, None] * rollout.mask
        # The tensors that a rollout of several steps needs again, with other ratios.
        rollout.batch["token_rewards"] = rewards * keep
        rollout.batch["baseline"] = compared_with[:, : keep.size(1)] * keep
        return (to_go - rollout.batch["baseline"]) * keep

    def needs_every_row(self, batch: Mapping[str, Any]) -> bool:
        # The weights of prefixes make another credit out of token rewards and baseline.
        return self.args.off_policy_correction == "prefix" and "old_per_token_logps" in batch

    def policy_loss(self, micro_batch: MicroBatch) -> Tensor:
        credit = micro_batch.credit
        if "old_per_token_logps" in micro_batch.batch:
            credit = self._corrected(credit, micro_batch)
        return -credit * micro_batch.per_token_logps

    def _corrected(self, credit: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Credit (B, T) times the importance weights of the policy now."""
        how, limit = self.args.off_policy_correction, self.args.off_policy_truncation
        if how == "none":
            return credit
        ratios, mask = micro_batch.log_ratios, micro_batch.mask
        weights = importance_weights(ratios, mask, how, truncation=limit)
        if how != "prefix":
            return weights * credit
        batch = micro_batch.batch
        of_prefixes = partial(off_policy_credit, log_ratios=ratios, mask=mask, truncation=limit)
        credit = of_prefixes(batch["token_rewards"], gamma=self.args.gamma)
        credit = credit - weights * batch["baseline"]
        if "process_rewards" in batch:
            returns = of_prefixes(batch["process_rewards"], gamma=self.args.process_gamma)
            credit = credit + returns - weights * batch["process_baseline"]
        return credit

    def _baseline(self, to_go: Tensor, rollout: Rollout, scored: Tensor) -> Tensor:
        """(P, G, T) over all processes."""
        mask = self.over_groups(rollout.mask, rollout)
        norms = None
        if self.args.baseline == "optimal":
            norms = self.over_groups(
                score_norms(self.sampler_logps(rollout), rollout.mask), rollout
            )
        keep = scored & mask.any(dim=-1)
        returns = held_returns(self.over_groups(to_go, rollout), mask)
        return baseline(returns, self.args.baseline, keep=keep, weights=norms)
