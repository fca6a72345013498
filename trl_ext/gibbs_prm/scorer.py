"""The Gibbs policy as a process reward model: every prefix scored by one pass of two models."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl_ext.errors import ConfigError, RunError
from trl_ext.functional import prefix_log_ratio
from trl_ext.gibbs_prm.encoding import Encoded, encode, short
from trl_ext.gibbs_prm.given_rows import each_row
from trl_ext.gibbs_prm.pair import POLICY, REFERENCE, open_pair
from trl_ext.gibbs_prm.scored import GibbsScores
from trl_ext.gibbs_prm.steps import check_steps, cut
from trl_ext.models.log_probs import TokenIds, check_rows, token_log_probs


class GibbsScorer:
    """Scores each prefix of a completion by β·log π(y≤t|x)/π_ref(y≤t|x). Equations E22-E24.

    For a policy π that was trained towards π* ∝ π_ref·exp(r/β) that is β·(log E_ref[exp(r/β) | y≤t,
    x] − log Z(x)): how much exponentiated reward the reference would still collect behind the
    prefix, in units of the reward. Scores of one prompt are compared without Z. Source: the
    implicit process reward of Yuan et al. (2024), arXiv 2412.01981.

        scorer = GibbsScorer("outputs/quickstart")
        [scored] = scorer.score(["What is 2 + 2?"], ["2 + 2\\nis 5"])
        scored.step_rewards, scored.worst_step

    Args:
        policy: π: a causal language model, a `PeftModel` (its active adapter), an `Adapter`, or the
            path, hub id or `bundled:` name of one. In the `output_dir` of a run, its recipe tells
            β, the temperature and the reference.
        reference: π_ref: likewise, or the name of an adapter of the policy's `PeftModel`. None: the
            model that the run began with, or for an adapter the model without it, whose weights are
            then there once.
        tokenizer: an object or a path. None: the one beside the policy.
        beta: β, in units of the reward. None: from the run's recipe.
        temperature: the logits are divided by it. None: the run's, or 1.
        dtype: of what is opened here. The score is a small difference of large numbers: bfloat16
            halves the memory and adds noise to each token.
        device: of what is opened here; a GPU by default if there is one.
        max_tokens: of a batch, padding included.

    Attributes:
        notes: what makes the score something else than r − β log Z, from the run's recipe.

    Raises:
        ConfigError: if a model cannot be opened, the tokenizers differ, there is no reference, or
            nothing tells β.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any = None,
        tokenizer: Any = None,
        beta: float | None = None,
        *,
        temperature: float | None = None,
        dtype: str = "float32",
        device: Any = None,
        max_tokens: int = 4096,
    ):
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens!r}; it must be a whole number from 1.")
        for name, value in (("beta", beta), ("temperature", temperature)):
            _check_positive(name, value)
        pair = open_pair(policy, reference, tokenizer, dtype=dtype, device=device)
        of_run = pair.run and pair.run.beta
        if beta is None and of_run is None:
            raise ConfigError(
                f"beta is not known: {_why_unknown(pair.run)}. Give beta=, the β of π* ∝ "
                "π_ref·exp(r/β) that the policy was trained towards (--beta of the command line); "
                "ranks do not depend on it."
            )
        self.policy = pair.policy
        self.reference = pair.reference
        self.tokenizer = pair.tokenizer
        self.names = pair.names
        self.beta = float(beta if beta is not None else of_run or 0.0)
        self.temperature = float(temperature or (pair.run.temperature if pair.run else 1.0))
        self.notes = pair.run.notes if pair.run and beta is None else []
        self.max_tokens = max_tokens

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        steps: Any = "newline",
        *,
        completion_ids: TokenIds | None = None,
        append_eos: bool = False,
    ) -> list[GibbsScores]:
        """Score the prefixes of N completions, in one forward pass of each model.

        Args:
            prompts: N texts or lists of messages.
            completions: N texts, or lists of messages where the prompts are.
            steps: how a completion is cut: see `trl_ext.gibbs_prm.steps.cut`; given for each
                completion, a list of N.
            completion_ids: as generated, in place of tokenising the completions.
            append_eos: end each text with the end-of-sequence token, so that the decision to stop
                there is scored with its last step.

        Raises:
            ConfigError: if a row is longer than what the models read, or `steps` is unknown.
            DataError: if a row cannot be tokenised, or its steps are not its text.
            RunError: if a model gives a token probability 0 or NaN.
        """
        of_row, encoded = self._encoded(prompts, completions, steps, completion_ids, append_eos)
        ratios = self.token_log_ratios(
            [each.prompt_ids for each in encoded], [each.completion_ids for each in encoded]
        )
        rows = zip(prompts, completions, encoded, ratios, of_row, strict=True)
        return [self.of_ratios(*row) for row in rows]

    def check(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        steps: Any = "newline",
        *,
        completion_ids: TokenIds | None = None,
        append_eos: bool = False,
    ) -> None:
        """Whether `score` can score these: without a model, at the cost of tokenising.

        Raises:
            ConfigError, DataError: as `score`.
        """
        of_row, encoded = self._encoded(prompts, completions, steps, completion_ids, append_eos)
        for each, how in zip(encoded, of_row, strict=True):
            cut(each, how)
        for model in (self.policy, self.reference):
            check_rows(model, [e.prompt_ids for e in encoded], [e.completion_ids for e in encoded])

    def _encoded(
        self, prompts: Any, completions: Any, steps: Any, completion_ids: Any, append_eos: bool
    ) -> tuple[list[Any], list[Encoded]]:
        """How each row is cut, and each row in tokens."""
        rows = each_row(prompts, completions, steps, completion_ids, {})
        for each in (row["steps"] for row in rows) if isinstance(steps, list | tuple) else [steps]:
            check_steps(each)
        return [row["steps"] for row in rows], [
            encode(
                row["prompt"],
                row["completion"],
                self.tokenizer,
                completion_ids=row["completion_ids"],
                append_eos=append_eos,
                row=number,
            )
            for number, row in enumerate(rows)
        ]

    def token_log_ratios(self, prompt_ids: TokenIds, completion_ids: TokenIds) -> list[Tensor]:
        """log π(y_t|·) − log π_ref(y_t|·) of each token of N completions.

        Returns:
            N tensors (T_n,), nats, float32, on the CPU.

        Raises:
            ConfigError, RunError: as `score`.
        """
        # The policy's pass checks them for the policy; the reference must not fail behind it.
        check_rows(self.reference, prompt_ids, completion_ids)
        of_policy, of_reference = (
            token_log_probs(
                model,
                prompt_ids,
                completion_ids,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
            )
            for model in (self.policy, self.reference)
        )
        self._check_finite(POLICY, of_policy, completion_ids)
        self._check_finite(REFERENCE, of_reference, completion_ids)
        return [p - q for p, q in zip(of_policy, of_reference, strict=True)]

    def token_rewards(self, prompt_ids: TokenIds, completion_ids: TokenIds) -> list[list[float]]:
        """β·log-ratio of each token, in units of the reward: a dense reward for a trainer."""
        ratios = self.token_log_ratios(prompt_ids, completion_ids)
        return [(self.beta * each).tolist() for each in ratios]

    def of_ratios(
        self, prompt: Any, completion: Any, encoded: Encoded, ratios: Tensor, steps: Any
    ) -> GibbsScores:
        """The scores of a completion from the log-ratios (T,) of its tokens, nats."""
        own = torch.tensor(encoded.is_own, dtype=torch.bool)
        ratios = ratios.double().masked_fill(~own, 0.0)
        along = prefix_log_ratio(ratios[None], torch.zeros_like(ratios)[None], own[None])[0]
        if not (self.beta * along).isfinite().all():
            raise RunError(
                f"beta is {self.beta:g}, with which the scores are beyond the largest number. Give "
                "a smaller one."
            )
        found = cut(encoded, steps)
        return GibbsScores(
            prompt=prompt,
            completion=completion,
            steps=found.texts,
            step_ends=found.token_ends,
            prefix_scores=[self.beta * along[end - 1].item() for end in found.token_ends],
            beta=self.beta,
            notes=found.notes,
            merged_into=found.merged_into,
            tokens=encoded.tokens,
            token_log_ratios=ratios.tolist(),
        )

    def _check_finite(self, name: str, scores: list[Tensor], ids: TokenIds) -> None:
        for row, values in enumerate(scores):
            if values.isfinite().all():
                continue
            place = int((~values.isfinite()).nonzero()[0])
            is_zero = values[place] == -torch.inf
            says = "gives probability 0 to" if is_zero else f"gives {values[place].item()} for"
            raise RunError(
                f"Row {row}: {name} ({self.names[name]}) {says} token {ids[row][place]} "
                f"({self.tokenizer.decode([ids[row][place]])!r}), number {place} of the "
                "completion: there is no finite log-ratio. Load the model in float32, and look at "
                f"its weights and at the temperature, {self.temperature:g}."
            )


def _check_positive(name: str, value: Any) -> None:
    if value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Whole numbers have any size, floats have not.
    if not (is_number and 0 < value <= sys.float_info.max):
        raise ConfigError(f"{name} is {short(value)}; it must be a finite number greater than 0.")


def _why_unknown(run: Any) -> str:
    if run is None:
        return "no recipe.yaml of a run lies beside the policy"
    recipe = run.folder / "recipe.yaml"
    return f"{recipe} names a trainer without one or that is not installed, or beta: 0"
