"""Completions, their rewards and their credit."""

from typing import Any

import torch
from torch import Tensor

from trl_ext.errors import ConfigError
from trl_ext.rewards.columns import with_columns
from trl_ext.rollout import Rollout
from trl_ext.trl_adapter.passes import Passes


class Rollouts(Passes):
    """Has TRL generate and score, and puts the hooks' scores and credit in the place of TRL's."""

    _given_rewards: list[Any]
    _asked_for: frozenset[str]

    def __init__(self, *args: Any, **kwargs: Any):
        self._rewards_per_func: Tensor | None = None
        self._evaluation_rewards: list[Tensor] = []
        self._prompt_ids: list[list[int]] = []
        self._rollout_is_spent = False
        self._is_first_sample = True
        super().__init__(*args, **kwargs)

    @property
    def completion_ids(self) -> list[list[int]]:
        """Token ids of the completions of the rollout under way, those of this process."""
        return self._to_score[3]

    @property
    def prompt_ids(self) -> list[list[int]]:
        """Token ids of their prompts, one list a completion."""
        return self._prompt_ids

    def sample_and_score(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`num_generations_eval` completions of each prompt and their rewards; nothing is trained.

        Log-probabilities are those at the sampling `temperature`, before top_p, top_k, min_p and a
        repetition penalty.

        Args:
            rows: of this process, each with a `prompt`; as many of them on every process.

        Returns:
            A mapping a completion, those of the first row first: `completion` (text or messages),
            `reward` (the weighted sum; None if no function scored it), `rewards` (one of each
            function, or None), `prompt_ids`, `completion_ids`, `logp` (Σ_t log π, nats, under the
            policy that sampled), `ref_logp` (the same under the reference) where one is loaded,
            and `is_truncated`.

        Raises:
            ConfigError: if the completions hold what the policy did not write, as tools do.
        """
        if self._is_first_sample:
            # As evaluation does: mixed precision is what this puts around the model.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            self._is_first_sample = False
        self.model.eval()
        rollout = self._rollout([dict(row) for row in rows for _ in range(self.group_size)])
        if "tool_mask" in rollout.batch:
            raise ConfigError(
                "The completions hold answers of tools or of an environment, which are no samples "
                "of the policy: they cannot be collected. Leave out tools, environment_factory and "
                "rollout_func."
            )
        columns = self._sampled_columns(rollout)
        self._forget_passes()
        self._metrics["eval"].clear()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _sampled_columns(self, rollout: Rollout) -> dict[str, list[Any]]:
        assert self._rewards_per_func is not None
        _, _, texts, ids = self._to_score
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        columns = {
            "completion": texts,
            "reward": _with_none(rollout.local(rollout.rewards_PG)),
            "rewards": [_with_none(row) for row in self._rewards_per_func[rollout.local_rows]],
            "prompt_ids": self._prompt_ids,
            "completion_ids": ids,
            "logp": _sums(self.sampler_logps(rollout), rollout.mask),
        }
        if "ref_per_token_logps" in rollout.batch:
            columns["ref_logp"] = _sums(rollout.batch["ref_per_token_logps"], rollout.mask)
        return columns | {"is_truncated": [row[-1] not in ends for row in ids]}

    def _generate(self, prompts):
        self.phase = "generate"
        result = super()._generate(prompts)
        self._prompt_ids = result[0]
        return result

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.phase = "reward"
        self._to_score = inputs, prompts, completions, completion_ids_list
        inputs = with_columns(inputs, self._offered_columns(completion_ids_list))

        def score_once() -> Tensor:
            # One row a completion in the completions table, however often a completion is scored.
            self._pending_extra_logs.clear()
            return super(Rollouts, self)._calculate_rewards(
                inputs, prompts, completions, completion_ids_list
            )

        self._rewards_per_func = self.score_completions(score_once)
        return self._rewards_per_func

    def _offered_columns(self, completion_ids: list[list[int]]) -> dict[str, list]:
        """The columns that a reward function asks for, a row a local completion."""
        columns: dict[str, list] = {}
        if "prompt_ids" in self._asked_for:
            columns["prompt_ids"] = self._prompt_ids
        if "ref_per_token_logps" in self._asked_for:
            # TRL scores under the old policy, then under the reference, then calls the rewards.
            self._shown_ref_logps = self._scored[-1][0]
            columns["ref_per_token_logps"] = [
                row[: len(ids)]
                for row, ids in zip(self._shown_ref_logps.tolist(), completion_ids, strict=True)
            ]
        return columns

    def _generate_and_score_completions(self, inputs):
        rollout = self._rollout(inputs)
        batch = rollout.batch
        batch["advantages"] = self.assign_credit(rollout)
        if self.process_reward is not None and self.model.training:
            batch["advantages"] = self.process_reward.added(batch["advantages"], rollout)
        self._show_credit(batch["advantages"])
        if not self.model.training:
            self._evaluation_rewards.append(rollout.rewards_PG)
        elif self.kl.enters("reward") and not self._replaces_loss:
            batch["advantages"] = self.kl.minus_to_go(batch["advantages"], rollout)
        self._tell("on_rollout", rollout=rollout)
        self._forget_passes()
        return batch

    def _rollout(self, inputs) -> Rollout:
        """Completions as TRL generates and scores them, before a hook gives them credit."""
        if self.model.training:
            completions = len(inputs) * self.accelerator.num_processes
            if self.kl.adapt(completions) and not self._replaces_loss:
                self.beta = self.kl.beta
            self._rollout_is_spent = False
        self._scored = []
        # A KL over the vocabulary runs the reference itself, where it has the policy's states.
        asked = "ref_per_token_logps" in self._asked_for
        unused = self.kl.over_vocabulary and not self.reads_ref_logps and not asked
        with self._trl_beta(0.0 if unused else self.beta or float(asked)):
            batch = super()._generate_and_score_completions(inputs)
        assert not asked or self._shown_ref_logps is batch["ref_per_token_logps"]
        first = self.accelerator.process_index * len(inputs)
        local_rows = slice(first, first + len(inputs))
        assert self._rewards_per_func is not None
        rewards_PG = self._summed(self._rewards_per_func).view(-1, self.group_size)
        return Rollout(rewards_PG, batch, local_rows)

    def end_rollout(self) -> None:
        """Take no more steps on this rollout: parameters stay until the next one is generated."""
        self._rollout_is_spent = True

    def _summed(self, rewards_per_func: Tensor) -> Tensor:
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        return rewards.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)

    def _show_credit(self, credit: Tensor) -> None:
        """Put the credit where TRL's table of completions has group-normalised advantages.

        That of tokens by its sum.
        """
        credit = credit.sum(dim=1) if credit.dim() > 1 else credit
        shown, column = self.accelerator.gather(credit).tolist(), self._logs["advantages"]
        for _ in range(min(len(shown), len(column))):
            column.pop()
        column.extend(shown)

    def _stop_at(self, strings: list[str]) -> None:
        if not strings:
            return
        vocabulary = self._tokenizer.batch_decode(
            [[token] for token in range(len(self._tokenizer))]
        )
        stops = [
            token
            for token, text in enumerate(vocabulary)
            if any(string in text for string in strings)
        ]
        if not stops:
            raise ConfigError(
                f"stop_strings={strings!r}: no token of {self._tokenizer.name_or_path!r} "
                "contains any of them, so no completion could end there. Give strings of one "
                "token, such as a newline or a full stop."
            )
        self.eos_token_ids = [
            *self.eos_token_ids,
            *(t for t in stops if t not in self.eos_token_ids),
        ]
        if self.use_vllm:
            vllm = self.vllm_generation
            given = vllm.generation_kwargs.get("stop_token_ids") or []
            stops = [*self.eos_token_ids, *(t for t in given if t not in self.eos_token_ids)]
            vllm.generation_kwargs = vllm.generation_kwargs | {"stop_token_ids": stops}
        else:
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids
            self.generation_config.eos_token_id = self.eos_token_ids


def _with_none(rewards: Tensor) -> list[float | None]:
    """Each number as the shortest text of its float32 reads; None for NaN."""
    return [None if reward.isnan() else float(str(reward.numpy())) for reward in rewards.cpu()]


def _sums(per_token: Tensor, mask: Tensor) -> list[float]:
    return (per_token.double() * mask).sum(dim=1).tolist()
