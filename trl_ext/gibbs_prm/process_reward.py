"""A reward for each token in training: what a policy trainer's options `process_` stand for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from trl_ext.errors import ConfigError
from trl_ext.functional import Baseline, baseline, held_returns, reward_to_go
from trl_ext.functional.process_credit import at_step_ends
from trl_ext.gibbs_prm.online import OnlineScorer
from trl_ext.gibbs_prm.process_given import asked, check_sums, checked
from trl_ext.gibbs_prm.process_models import open_frozen
from trl_ext.gibbs_prm.process_steps import check_training_steps, step_ends
from trl_ext.models.loading import tokenizer_at
from trl_ext.models.vocabulary import check_vocabularies
from trl_ext.policy_config import PolicyConfig
from trl_ext.rollout import Rollout

# Where a scorer that learns is kept, in the folder `process_reward` beside the policy.
SCORER = "scorer"


@dataclass(frozen=True)
class Rows:
    """The completions of this process as token ids, without padding."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "Rows":
        """Those of a rollout; a completion that is masked as a whole is empty."""
        return cls(*(_unpadded(batch, name) for name in ("prompt", "completion")))


class ProcessReward:
    """Adds the credit of a reward for each token to what a trainer assigned. Equations E23, E24.

    Token t of a completion gets w·(Σ_{s≥t} γ^{s−t} ρ_s − b_t): ρ_s is the scorer's reward of token
    s, w `process_weight`, γ `process_gamma`, and b the `process_baseline` of these returns, as in
    REINFORCE. At `process_level` "step" the rewards of a step lie on its last token
    (`trl_ext.gibbs_prm.process_steps`).

    A `GibbsScorer` gives ρ_s = Φ(y≤s) − Φ(y<s), with the potential Φ = β log π*/π_ref of a prefix:
    with γ = 1 they add up to r(y) − β log Z(x), wherever they lie. Trained under a penalty β' KL by
    a reward of weight v and them, the policy goes to π_ref·exp((v + w) r/β')/Z: what they reward
    is the outcome, earlier. Source: Ng et al. (1999) for rewards that are differences of a
    potential; Cui et al. (2025), arXiv 2502.01456, for these.

    Nothing is added in evaluation, nor to what no reward function scored. Logged: the means over
    completions `process/reward_mean`, and over prompts whose rewards differ `process/score_of_best`
    and `process/score_of_worst`, the scores (sums of ρ) of those with the highest and the lowest
    reward; `OnlineScorer` adds its own.

    Args:
        args: the options.
        scorer: an object with `token_rewards(prompt_ids, completion_ids)`; None: as the options
            say.
        model: the policy as it was given to the trainer.

    Raises:
        ConfigError: if these do not go together.
    """

    def __init__(self, args: PolicyConfig, scorer: Any, model: Any):
        findings = args.process_findings(is_on=True)
        if scorer is not None:
            findings += _against_scorer(args, scorer)
        if findings:
            raise ConfigError("\n".join(["The process reward:", *findings]))
        if args.process_level == "step":
            check_training_steps(args.process_steps)
        if args.process_reward is None and scorer is None and isinstance(model, PeftModel):
            raise ConfigError(
                "process_learning_rate without process_reward trains a scorer that begins as the "
                "policy does, and that was given as a PeftModel, which has no path. Set "
                "process_reward to the path of a model or an adapter."
            )
        self.args = args
        self.scorer: Any = scorer
        self.trainer: Any = None
        self.tokenizer: Any = None

    def set_up(self, trainer: Any) -> None:
        """Open the scorer, once the policy is there.

        Raises:
            ConfigError: if it cannot be opened, or has another tokenizer than the policy.
        """
        self.trainer = trainer
        processing = trainer.processing_class
        self.tokenizer = getattr(processing, "tokenizer", processing)
        if self.scorer is not None:
            _check_tokenizers(self.tokenizer, getattr(self.scorer, "tokenizer", None))
            return
        for path in (self.args.process_reward, self.args.process_reference):
            _check_tokenizers(self.tokenizer, tokenizer_at(path) if path else None)
        if self.args.process_learning_rate is not None:
            self.scorer = OnlineScorer(trainer, self.tokenizer)
        else:
            self.scorer = open_frozen(trainer, self.tokenizer)

    def added(self, credit: Tensor, rollout: Rollout) -> Tensor:
        """Credit (B,) or (B, T) -> (B, T), that of the process reward added. May train the scorer.

        Raises:
            ConfigError: the prompts have images.
            RewardError: the scorer gave something else than a finite number a token, or learns
                from rewards that are no labels.
        """
        if "pixel_values" in rollout.batch:
            raise ConfigError("A process reward reads text alone, and these prompts have images.")
        mask = rollout.mask.bool()
        scored = ~rollout.rewards_PG.isnan()
        keep = mask & rollout.local(scored).to(mask.device)[:, None]
        rewards = self._token_rewards(rollout) * mask
        self._log(rewards.sum(1), rollout)
        if self.args.process_level == "step":
            rewards = at_step_ends(rewards, self._step_ends(rollout), mask)
        to_go = reward_to_go(rewards, mask, gamma=self.args.process_gamma)
        compared_with = rollout.local(self._baseline(to_go, rollout, scored))[:, : mask.size(1)]
        weight = self.args.process_weight
        # The tensors that a rollout of several steps needs again, with other ratios.
        rollout.batch["process_rewards"] = weight * rewards * keep
        rollout.batch["process_baseline"] = weight * compared_with * keep
        credit = credit[:, None] * mask if credit.dim() == 1 else credit
        own = weight * (to_go - compared_with) * keep
        check_sums(own)
        return credit + own

    def save(self, folder: Path) -> None:
        """Write a scorer that learns; another one is where it was.

        A folder deeper: an adapter right below a checkpoint is one of the policy's to transformers.
        """
        if isinstance(self.scorer, OnlineScorer):
            self.scorer.save(folder / SCORER)

    def restore(self, folder: Path) -> None:
        """Take over the scorer that `save` wrote."""
        if isinstance(self.scorer, OnlineScorer):
            self.scorer.restore(folder / SCORER)

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps beside it: its optimizer's state."""
        return self.scorer.optimizer.state_dict() if isinstance(self.scorer, OnlineScorer) else None

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take over what `state` gave."""
        if isinstance(self.scorer, OnlineScorer):
            assert state is not None
            self.scorer.optimizer.load_state_dict(state)

    def _token_rewards(self, rollout: Rollout) -> Tensor:
        """(B, T), float32, on the device of the batch."""
        rows = Rows.of(rollout.batch)
        if isinstance(self.scorer, OnlineScorer):
            given = self.scorer.learn(rows.prompt_ids, rows.completion_ids, rollout)
        else:
            given = asked(self.scorer, rows.prompt_ids, rows.completion_ids)
        numbers = checked(given, [len(ids) for ids in rows.completion_ids])
        rewards = torch.zeros(rollout.mask.shape)
        for row, each in enumerate(numbers):
            rewards[row, : len(each)] = each
        return rewards.to(rollout.mask.device)

    def _step_ends(self, rollout: Rollout) -> Tensor:
        """(B, T) bool."""
        rows = Rows.of(rollout.batch)
        ends = torch.zeros(rollout.mask.shape, dtype=torch.bool)
        for row, ids in enumerate(zip(rows.prompt_ids, rows.completion_ids, strict=True)):
            for end in step_ends(*ids, self.args.process_steps, self.tokenizer):
                ends[row, end - 1] = True
        return ends.to(rollout.mask.device)

    def _baseline(self, to_go: Tensor, rollout: Rollout, scored: Tensor) -> Tensor:
        """(P, G, T) over all processes."""
        mask = self.trainer.over_groups(rollout.mask, rollout)
        returns = held_returns(self.trainer.over_groups(to_go, rollout), mask)
        how = cast(Baseline, self.args.process_baseline)
        return baseline(returns, how, keep=scored.to(mask.device) & mask.any(dim=-1))

    def _log(self, scores: Tensor, rollout: Rollout) -> None:
        scores_PG = self.trainer.over_groups(scores, rollout).cpu()
        self.trainer.log_metric("process/reward_mean", scores_PG.mean().item())
        rewards_PG = rollout.rewards_PG.cpu()
        least, most = rewards_PG.nan_to_num(torch.inf), rewards_PG.nan_to_num(-torch.inf)
        differ = most.amax(1) > least.amin(1)
        if differ.any():
            rows = torch.arange(len(scores_PG))
            best, worst = scores_PG[rows, most.argmax(1)], scores_PG[rows, least.argmin(1)]
            self.trainer.log_metric("process/score_of_best", best[differ].mean().item())
            self.trainer.log_metric("process/score_of_worst", worst[differ].mean().item())


def _against_scorer(args: PolicyConfig, scorer: Any) -> list[str]:
    """Options that would say a second time what the scorer is, or an object that is none."""
    names = ("process_reward", "process_reference", "process_beta", "process_learning_rate")
    found = [
        f"  {name}={getattr(args, name)!r} beside a scorer that is given as an object. Remove one "
        "of the two."
        for name in names
        if getattr(args, name) is not None
    ]
    if not callable(getattr(scorer, "token_rewards", None)):
        found.append(
            f"  a {type(scorer).__name__} was given; it must have a method "
            "token_rewards(prompt_ids, completion_ids) -> a list of one number a token for each "
            "completion, as a GibbsScorer has. A path goes into the option process_reward."
        )
    return found


def _check_tokenizers(of_policy: Any, of_scorer: Any) -> None:
    if of_scorer is not None:
        check_vocabularies({"the policy": of_policy, "the process reward": of_scorer})


def _unpadded(batch: Mapping[str, Any], name: str) -> list[list[int]]:
    pairs = zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]
