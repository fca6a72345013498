"""The process reward of a reference policy and a reward, estimated from rollouts of prefixes."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl_ext.errors import ConfigError, RewardError
from trl_ext.gibbs_prm.given_rows import each_row
from trl_ext.gibbs_prm.rollout_checks import check_count, check_temperature
from trl_ext.gibbs_prm.rollout_estimates import Estimate, estimated, notes_of
from trl_ext.gibbs_prm.rollout_rewards import RolloutReward
from trl_ext.gibbs_prm.rollout_rows import Key, Row, rows_of
from trl_ext.gibbs_prm.sampling import GenerateSampler, Rollouts
from trl_ext.gibbs_prm.scored import MonteCarloScores
from trl_ext.models.loading import load_causal, open_tokenizer, tokenizer_at


class MonteCarloScorer:
    """Scores each prefix of a completion by rollouts of it. Equations E23, E25.

    The score of a prefix is β·(log (1/K) Σ_k exp(r_k/β) − log Z(x)) over K completions of the
    prefix by the reference h, in units of the reward; log Z(x) is the same of the prompt alone.
    Completions of one prompt share its rollouts, and those of the prefixes that they share. What
    has ended is no estimate: its score is r − β·log Z(x), with its own reward.

        scorer = MonteCarloScorer("outputs/sft", "exact_match", 0.1, 32, max_completion_length=256)
        [scored] = scorer.score(["What is 2 + 2?"], ["2 + 2\\nis 5"], solution=["4"])
        scored.step_rewards, scored.standard_errors, scored.is_believed

    Args:
        model: h: a causal language model, an `Adapter`, or the path, hub id or `bundled:` name of
            one. None with a sampler.
        reward_func: with TRL's signature (prompts, completions, completion_ids, **columns) ->
            numbers, or a recipe's entry. A rollout for which it gives None is left out.
        beta: β > 0, in units of the reward. Where 1/β is large, the estimate lives on the rare
            rollouts with the highest reward: `is_believed` tells when K is too small for that.
        num_rollouts: K ≥ 2, of each prefix.
        tokenizer: an object or a path; None: the one beside a model that is a path.
        sampler: another way to sample than by transformers' `generate`, such as a `VLLMSampler`;
            then the options below are its own.
        max_completion_length: tokens that a completion of h has at most.
        temperature, stop_token_ids, batch_size: see `GenerateSampler`.
        seed: the same scores from the same seed and the same call.

    Raises:
        ConfigError: an argument out of range, missing, or given twice.
        RewardError, UnknownNameError, PluginError: a reward entry that cannot be made.
    """

    def __init__(
        self,
        model: Any,
        reward_func: Any,
        beta: float,
        num_rollouts: int,
        *,
        tokenizer: Any = None,
        sampler: Rollouts | None = None,
        max_completion_length: int | None = None,
        temperature: float | None = None,
        stop_token_ids: Iterable[int] | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ):
        self.beta = _checked_beta(beta)
        if check_count("num_rollouts", num_rollouts) < 2:
            raise ConfigError("num_rollouts is 1; a standard error needs 2 or more.")
        self.num_rollouts = num_rollouts
        self.seed = seed
        options = {
            "max_completion_length": max_completion_length,
            "temperature": None if temperature is None else check_temperature(temperature),
            "stop_token_ids": stop_token_ids,
            "batch_size": batch_size,
        }
        model, self.tokenizer = _opened(model, tokenizer)
        self.sampler = _sampler_of(
            sampler,
            model,
            self.tokenizer,
            {name: value for name, value in options.items() if value is not None},
        )
        self.reward = RolloutReward(reward_func, self.tokenizer)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        steps: Any = "newline",
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        append_eos: bool = False,
        **columns: Sequence[Any],
    ) -> list[MonteCarloScores]:
        """Score the prefixes of N completions.

        Args:
            prompts: N texts or lists of messages.
            completions: N texts, or lists of messages where the prompts are.
            steps: how a completion is cut: see `trl_ext.gibbs_prm.steps.cut`; given for each
                completion, a list of N.
            completion_ids: as generated, in place of tokenising the completions.
            append_eos: end each text with the end-of-sequence token. A completion without it that
                is shorter than max_completion_length is one that h may still continue.
            columns: of the data, N values each, for the reward.

        Raises:
            ConfigError: `steps` is unknown, lists are of different length, or a row is too long.
            DataError: a row cannot be tokenised, its steps are not its text, or others than the
                policy speak in it.
            RewardError: the reward failed, or applies to no rollout of a prefix.
        """
        given = each_row(prompts, completions, steps, completion_ids, columns)
        rows = rows_of(given, self.tokenizer, self.sampler, append_eos)
        if not rows:
            return []
        # First what fails soonest.
        wholes = [self._of_whole(number, row) for number, row in enumerate(rows)]
        estimates = self._estimates(list(dict.fromkeys(k for row in rows for k in row.keys)), rows)
        return [self._scored(*each, estimates) for each in zip(rows, wholes, strict=True)]

    def _estimates(self, keys: list[Key], rows: list[Row]) -> dict[Key, Estimate]:
        prompt_ids = [rows[first].encoded.prompt_ids for first, _ in keys]
        rollouts = self.sampler.sample(
            [[*ids, *begun] for ids, (_, begun) in zip(prompt_ids, keys, strict=True)],
            self.num_rollouts,
            prompt_lengths=[len(ids) for ids in prompt_ids],
            seed=self.seed,
        )
        rewards = [
            self.reward.of_rollouts(
                rows[first].prompt,
                rows[first].encoded.prompt_ids,
                [[*begun, *tokens] for tokens in behind],
                rows[first].columns,
            )
            for (first, begun), behind in zip(keys, rollouts, strict=True)
        ]
        for (first, begun), values in zip(keys, rewards, strict=True):
            if all(value is None for value in values):
                raise RewardError(
                    f"The reward {self.reward.reward_func.__name__!r} gave None, 'does not apply', "
                    f"for all {len(values)} rollouts from {len(begun)} tokens of the completion of "
                    f"row {first}. Leave out the rows that it does not apply to."
                )
        return dict(zip(keys, estimated(rewards, self.beta), strict=True))

    def _scored(
        self, row: Row, whole: Estimate | None, estimates: Mapping[Key, Estimate]
    ) -> MonteCarloScores:
        log_z, *along = [estimates[key] for key in row.keys]
        notes = [*row.found.notes, *([self.sampler.note] if self.sampler.note else [])]
        notes += notes_of(log_z, along)
        if whole is not None:
            along.append(whole)
        return MonteCarloScores(
            prompt=row.prompt,
            completion=row.completion,
            steps=row.found.texts,
            step_ends=row.found.token_ends,
            prefix_scores=[self.beta * (each.value - log_z.value) for each in along],
            beta=self.beta,
            standard_errors=[self.beta * each.error for each in along],
            notes=notes,
            merged_into=row.found.merged_into,
            log_z=log_z.value,
            log_z_standard_error=log_z.error,
            rollout_rewards=[each.rewards for each in along],
            effective_sample_sizes=[each.size for each in along],
            is_believed=[each.is_believed for each in along],
        )

    def _of_whole(self, number: int, row: Row) -> Estimate | None:
        """What has ended has one completion, itself; None for what has not."""
        if not row.is_over:
            return None
        reward = self.reward.of_completion(
            row.prompt,
            row.encoded.prompt_ids,
            row.completion,
            row.encoded.completion_ids,
            row.columns,
        )
        if reward is None:
            raise RewardError(
                f"The reward {self.reward.reward_func.__name__!r} gave None, 'does not apply', for "
                f"the completion of row {number}. Leave the row out."
            )
        return Estimate(reward / self.beta, 0.0, [reward], 1.0, True)


def _checked_beta(beta: Any) -> float:
    is_number = isinstance(beta, int | float) and not isinstance(beta, bool)
    if not (is_number and 0 < beta < float("inf")):
        raise ConfigError(f"beta is {beta!r}; it must be a positive number, in units of reward.")
    return float(beta)


def _opened(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The model and its tokenizer, from their paths where they are given so."""
    path = os.fspath(model) if isinstance(model, os.PathLike) else model
    if isinstance(path, str):
        model = load_causal({"the model": path})["the model"]
        tokenizer = tokenizer_at(path) if tokenizer is None else tokenizer
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = open_tokenizer(os.fspath(tokenizer))
    if tokenizer is None:
        raise ConfigError("There is no tokenizer beside the model. Give one as tokenizer=.")
    return model, tokenizer


def _sampler_of(
    sampler: Rollouts | None, model: Any, tokenizer: Any, options: dict[str, Any]
) -> Rollouts:
    if sampler is None:
        if model is None or "max_completion_length" not in options:
            what = "model" if model is None else "max_completion_length"
            raise ConfigError(f"{what} is missing; only a sampler brings its own. Give one.")
        return GenerateSampler(model, tokenizer, **options)
    given = [*(["model"] if model is not None else []), *options]
    if given:
        raise ConfigError(
            f"A sampler is given, and also {', '.join(given)}, which are the sampler's own "
            "affair. Give them to the sampler alone; the model is then None."
        )
    return sampler
