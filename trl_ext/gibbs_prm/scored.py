"""What a scorer says of a completion: a score for each of its prefixes, a reward for each step."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class PrefixScores:
    """The K steps of one completion, scored. Equations E23, E24.

    The score of a prefix is β·(log E_h[exp(r/β) | prefix] − log Z(x)), in units of the reward: how
    much more exponentiated reward the reference would still collect behind it than from the
    prompt. The empty prefix has 0; differences within a prompt need no Z.

    Attributes:
        prompt: as it was given, a text or messages.
        completion: as it was given.
        steps: K texts; joined they are the completion's text.
        step_ends: K numbers of tokens: step k ends with token step_ends[k] − 1 of the completion.
        prefix_scores: K scores, of the prefix that ends with each step.
        beta: β, in units of the reward.
        standard_errors: of each prefix score, from a finite sample; None: it is no estimate.
        notes: what the reader of the scores should know, such as steps that were rounded to whole
            tokens.
        merged_into: for each step that was asked for, the step here that it is part of: boundaries
            within one token make one step of two. Empty where nothing says.
    """

    prompt: Any
    completion: Any
    steps: list[str]
    step_ends: list[int]
    prefix_scores: list[float]
    beta: float
    standard_errors: list[float] | None = None
    notes: list[str] = field(default_factory=list)
    merged_into: list[int] = field(default_factory=list)

    @property
    def step_rewards(self) -> list[float]:
        """K differences of neighbouring prefix scores; they add up to the last of these."""
        return [after - before for before, after in pairwise([0.0, *self.prefix_scores])]

    @property
    def worst_step(self) -> int | None:
        """The step, counted from 0, with the lowest reward; the first of equals; None of none."""
        rewards = self.step_rewards
        return rewards.index(min(rewards)) if rewards else None

    @property
    def score(self) -> float:
        """The score of the whole completion; 0 for an empty one."""
        return self.prefix_scores[-1] if self.prefix_scores else 0.0


@dataclass(frozen=True)
class GibbsScores(PrefixScores):
    """What a `GibbsScorer` reads off two models.

    Attributes:
        tokens: the T tokens of the completion as text; joined they are its text.
        token_log_ratios: T numbers log π(y_t|·) − log π_ref(y_t|·), nats; 0 for a token that the
            policy did not write, such as a user's turn within the completion.
    """

    tokens: list[str] = field(default_factory=list)
    token_log_ratios: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class MonteCarloScores(PrefixScores):
    """What a `MonteCarloScorer` estimates from rollouts. Equation E25.

    Attributes:
        log_z: log (1/K) Σ exp(r/β) over rollouts of the prompt alone, nats: what the scores are
            relative to.
        log_z_standard_error: of `log_z`, nats. It is common to all prefixes of the prompt, and
            no part of `standard_errors`.
        rollout_rewards: for each prefix, the rewards of its rollouts.
        effective_sample_sizes: for each prefix, of the weights exp(r/β).
        is_believed: for each prefix, whether its standard error may be believed.
    """

    log_z: float = 0.0
    log_z_standard_error: float = 0.0
    rollout_rewards: list[list[float]] = field(default_factory=list)
    effective_sample_sizes: list[float] = field(default_factory=list)
    is_believed: list[bool] = field(default_factory=list)
