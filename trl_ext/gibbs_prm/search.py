"""Search by steps: sample next steps, keep the prefixes that score best, and go on from these."""

import copy
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from trl_ext.gibbs_prm.encoding import Encoded, encode
from trl_ext.gibbs_prm.rollout_checks import check_count, check_ids, check_sampled
from trl_ext.gibbs_prm.scored import GibbsScores
from trl_ext.gibbs_prm.scorer import GibbsScorer
from trl_ext.gibbs_prm.search_arguments import (
    check_prompts,
    check_room,
    check_scorer,
    check_seed,
    check_strings,
    sampler_of,
)
from trl_ext.gibbs_prm.search_results import Draft, Progress, SearchCost, SearchResult
from trl_ext.gibbs_prm.search_steps import NextStep, first_stop

__all__ = ["SearchCost", "SearchResult", "StepSearch"]


class StepSearch:
    """A beam over steps, guided by the score of a Gibbs policy. Equations E23, E24.

    From each of at most `width` prefixes `expand` next steps are sampled; all are scored by
    β·log π(y≤t|x)/π_ref(y≤t|x), and the best `width` stay. A completion that is over stays with
    its score and takes a place; the search ends when all that stay are over. Nothing is scored
    twice: token log-ratios add up. With width and expand 1 it samples from the generator; with one
    round of steps="whole" it is best of n. Source: beam search by verifiers, Snell et al. (2024),
    arXiv 2408.03314.

        search = StepSearch("reference", scorer, max_completion_length=256)
        [found] = search.search(["What is 2 + 2?"])
        found.text, found.cost.tokens_generated

    Args:
        generator: what steps are sampled from: "reference" or "policy" of the scorer, whose weights
            are then there once; a model; or a sampler as `GenerateSampler` and `VLLMSampler`.
        scorer: a `GibbsScorer`.
        width: prefixes that stay, of each prompt.
        expand: next steps that are sampled from each.
        steps: a rule that finds the end of a step: "newline", "sentence", "paragraph", "token",
            {"regex": …}, or "whole". Behind a sentence or a regex sampling cannot stop:
            max_step_tokens are sampled and those behind the step dropped.
        max_completion_length: tokens that a completion has at most; of a sampler, its own.
        max_step_tokens: a longer step is cut there, which the result notes; "whole" has no limit.
        temperature: of sampling; None: 1. Of a sampler, its own.
        stop_token_ids: more tokens that end a completion; of a sampler, its own.
        stop_strings: texts that end a completion, and are part of it.
        batch_size: rows that are sampled together; of a sampler, its own.
        seed: the same prompts, in the same order, give the same results.

    Raises:
        ConfigError: an argument is out of range, or does not go with the generator.
    """

    def __init__(
        self,
        generator: Any,
        scorer: GibbsScorer,
        *,
        width: int = 4,
        expand: int = 4,
        steps: Any = "newline",
        max_completion_length: int | None = None,
        max_step_tokens: int = 128,
        temperature: float | None = None,
        stop_token_ids: Iterable[int] = (),
        stop_strings: Sequence[str] = (),
        batch_size: int | None = None,
        seed: int = 0,
    ):
        self.scorer = check_scorer(scorer)
        self.width = check_count("width", width)
        self.expand = check_count("expand", expand)
        self.next_step = NextStep(steps, scorer.tokenizer)
        self.stop_strings = check_strings(stop_strings)
        self.seed = check_seed(seed)
        options = {
            "max_completion_length": max_completion_length,
            "temperature": temperature,
            "stop_token_ids": check_ids("stop_token_ids", stop_token_ids) or None,
            "batch_size": batch_size,
        }
        given = {name: value for name, value in options.items() if value is not None}
        self.sampler = sampler_of(generator, scorer, given)
        limit = check_count("max_step_tokens", max_step_tokens)
        self.max_step = limit if steps != "whole" else self.sampler.max_completion_length

    def search(self, prompts: Sequence[Any]) -> list[SearchResult]:
        """Search the completions of N prompts, all together.

        Args:
            prompts: N texts or lists of messages.

        Returns:
            N of them.

        Raises:
            ConfigError: a prompt with a completion is longer than what a model reads.
            DataError: a prompt cannot be tokenised.
            RunError: a model gives a token probability 0 or NaN, or the sampler something else than
                it must.
        """
        rows = [
            Progress(prompt, self._encoded(prompt, (), row=row).prompt_ids)
            for row, prompt in enumerate(check_prompts(prompts))
        ]
        check_room(self.sampler, self.scorer, [row.prompt_ids for row in rows])
        seeds = random.Random(self.seed)
        while any(not draft.is_over for row in rows for draft in row.kept):
            for begun, draft in self._extensions(rows, seeds):
                begun.add(draft)
            self._score(rows)
            for row in rows:
                row.prune(self.width)
        return [self._result(row) for row in rows]

    def _extensions(
        self, rows: list[Progress], seeds: random.Random
    ) -> list[tuple[Progress, Draft]]:
        """`expand` next steps of each prefix that is not over, not scored yet."""
        begun = [_Begun(row, draft) for row in rows for draft in row.kept if not draft.is_over]
        found, count = [], self.expand
        while begun:
            sampled = self._sampled(begun, count, seeds.getrandbits(48))
            begun, count = [], 1
            for each in sampled:
                draft = self._settled(each)
                if draft is None:
                    begun.append(each)
                else:
                    found.append((each.row, draft))
        return found

    def _sampled(self, begun: list["_Begun"], count: int, seed: int) -> list["_Begun"]:
        """`count` ways on for each, up to where its step may be over."""
        sampler = copy.copy(self.sampler)
        longest = sampler.max_completion_length
        prefixes = [[*each.row.prompt_ids, *each.ids] for each in begun]
        budgets = [min(self.max_step - len(each.new), longest - len(each.ids)) for each in begun]
        # A sampler knows one length of all completions: some have begun, as seen from there.
        sampler.max_completion_length = max(budgets)
        sampler.end_ids = self.sampler.end_ids | self.next_step.pauses
        lengths = [
            len(prefix) - (max(budgets) - budget)
            for prefix, budget in zip(prefixes, budgets, strict=True)
        ]
        found = sampler.sample(prefixes, count, prompt_lengths=lengths, seed=seed)
        check_sampled(self.sampler, found, count, budgets)
        on = []
        for each, ways in zip(begun, found, strict=True):
            each.row.tokens_generated += sum(map(len, ways))
            on += [_Begun(each.row, each.parent, (*each.new, *tokens)) for tokens in ways]
        return on

    def _settled(self, begun: "_Begun") -> Draft | None:
        """The prefix up to the end of its step, or of all; None: neither is in what there is."""
        parent, ids = begun.parent, begun.ids
        encoded = self._encoded(begun.row.prompt, ids)
        stop = first_stop(encoded, self.stop_strings)
        end = self.next_step.over(
            encoded, parent.step_end, since=len(parent.ids) + 1, upto=stop or len(ids)
        )
        count = end.shown if end else stop or len(ids)
        is_last = ids[count - 1] in self.sampler.end_ids or count in (
            stop,
            self.sampler.max_completion_length,
        )
        if is_last:
            return replace(parent, ids=ids[:count], step_end=count, is_over=True)
        if end:
            return replace(parent, ids=ids[:count], step_end=end.end)
        if len(begun.new) < self.max_step:
            return None
        return replace(parent, ids=ids, step_end=len(ids), cuts=(*parent.cuts, len(ids)))

    def _score(self, rows: list[Progress]) -> None:
        """The log-ratios of the new tokens; those of the prefix are known."""
        fresh = [(row, draft) for row in rows for draft in row.fresh.values()]
        found = self.scorer.token_log_ratios(
            [[*row.prompt_ids, *draft.ids[: len(draft.ratios)]] for row, draft in fresh],
            [draft.ids[len(draft.ratios) :] for _, draft in fresh],
        )
        for (row, draft), ratios in zip(fresh, found, strict=True):
            row.fresh[draft.ids] = replace(draft, ratios=(*draft.ratios, *ratios.tolist()))
            row.tokens_scored += len(ratios)
            row.forward_passes += 2

    def _result(self, row: Progress) -> SearchResult:
        return SearchResult(
            [self._scores(row.prompt, draft) for draft in row.kept],
            [list(draft.ids) for draft in row.kept],
            row.cost,
        )

    def _scores(self, prompt: Any, draft: Draft) -> GibbsScores:
        encoded = self._encoded(prompt, draft.ids)
        text = encoded.text.removesuffix(encoded.end_text)
        completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        ratios = torch.tensor(draft.ratios, dtype=torch.float64)
        scores = self.scorer.of_ratios(prompt, completion, encoded, ratios, self.next_step.steps)
        notes = [
            f"a step had no end within {self.max_step} tokens and was cut at token {count}"
            for count in draft.cuts
        ]
        return replace(scores, notes=[*scores.notes, *notes])

    def _encoded(self, prompt: Any, ids: tuple[int, ...], row: int | None = None) -> Encoded:
        empty = [{"role": "assistant", "content": ""}] if isinstance(prompt, list) else ""
        return encode(prompt, empty, self.scorer.tokenizer, completion_ids=ids, row=row)


class _Begun(NamedTuple):
    """A prefix of a prompt, and new tokens behind it."""

    row: Progress
    parent: Draft
    new: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        return (*self.parent.ids, *self.new)
