"""What a search by steps hands back, and what it keeps of a prompt until then."""

import math
from dataclasses import dataclass, field
from typing import Any

from trl_ext.gibbs_prm.scored import GibbsScores


@dataclass(frozen=True)
class SearchCost:
    """What the search for one prompt took, to compare it with best of n at equal cost.

    Attributes:
        tokens_generated: sampled, those included that were dropped behind the end of a step or as
            part of a duplicate.
        tokens_scored: whose log-ratio was computed: each once, whatever prefixes it is in.
        forward_passes: of one sequence through the policy or the reference, to score it; sampling
            takes one more a token.
    """

    tokens_generated: int
    tokens_scored: int
    forward_passes: int


@dataclass(frozen=True)
class SearchResult:
    """What a search found for one prompt.

    Attributes:
        ranked: the completions kept, the highest score first; `notes` of each name the steps that
            were cut for their length.
        completion_ids: their tokens, end tokens included.
        cost: what it took.
    """

    ranked: list[GibbsScores]
    completion_ids: list[list[int]]
    cost: SearchCost

    @property
    def text(self) -> str:
        """The chosen completion, without the tokens that end it."""
        completion = self.ranked[0].completion
        return completion if isinstance(completion, str) else completion[-1]["content"]

    @property
    def ids(self) -> list[int]:
        """The tokens of the chosen completion."""
        return self.completion_ids[0]


@dataclass(frozen=True)
class Draft:
    """A completion begun, or one that is over.

    Attributes:
        ids: its tokens.
        ratios: of its first tokens, log π − log π_ref, nats; of all once it is scored.
        step_end: tokens of its whole steps; behind them another may have begun.
        is_over: nothing is to follow.
        cuts: numbers of tokens at which a step was cut for its length.
    """

    ids: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()
    step_end: int = 0
    is_over: bool = False
    cuts: tuple[int, ...] = ()

    @property
    def log_ratio(self) -> float:
        """Of its whole steps, nats."""
        return math.fsum(self.ratios[: self.step_end])


@dataclass
class Progress:
    """The search for one prompt, as far as it is.

    Attributes:
        prompt: as it was given.
        prompt_ids: its tokens.
        kept: prefixes that stay, scored.
        fresh: tokens -> the completion that begins with them, new in this round.
        tokens_generated, tokens_scored, forward_passes: see `SearchCost`.
    """

    prompt: Any
    prompt_ids: list[int]
    kept: list[Draft] = field(default_factory=lambda: [Draft()])
    fresh: dict[tuple[int, ...], Draft] = field(default_factory=dict)
    tokens_generated: int = 0
    tokens_scored: int = 0
    forward_passes: int = 0

    @property
    def cost(self) -> SearchCost:
        """Up to now."""
        return SearchCost(self.tokens_generated, self.tokens_scored, self.forward_passes)

    def add(self, draft: Draft) -> None:
        """Take it up for this round, unless it is there."""
        if draft.ids not in [other.ids for other in self.kept if other.is_over]:
            self.fresh.setdefault(draft.ids, draft)

    def prune(self, width: int) -> None:
        """Keep the best of what is over and what is new; of equals the first."""
        pool = [*(draft for draft in self.kept if draft.is_over), *self.fresh.values()]
        self.kept = sorted(pool, key=lambda draft: -draft.log_ratio)[:width]
        self.fresh = {}
