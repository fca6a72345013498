"""Several rewards as one: their mean, their worst, or their mean less their disagreement."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from trl_ext.errors import ConfigError
from trl_ext.functional import ensemble_score, ensemble_spread
from trl_ext.functional.ensemble import Combine
from trl_ext.rewards.build import build_rewards
from trl_ext.rewards.guard import guarded, is_async


class RewardEnsemble:
    """A reward function out of several, combined for each completion by `ensemble_score`.

    The metric `reward_ensemble/disagreement` is the members' standard deviation, mean over the
    completions. A member that does not apply to a completion (None) is left out there; a member's
    list of one number a token counts by its sum.

    Args:
        members: entries as in `reward_funcs`, or reward functions.
        combine: "mean", "min" (the most pessimistic member), or "uncertainty" (mean − penalty times
            the standard deviation over the members).
        penalty: of "uncertainty", at least 0.

    Raises:
        ConfigError: if there are no members, one is asynchronous, or the penalty is no such number.
        TrlExtError: what making a member raises.
    """

    def __init__(self, members: Sequence[Any], combine: Combine = "mean", penalty: float = 1.0):
        self.__name__ = "reward_ensemble"
        check_combination(self.__name__, combine, penalty)
        if isinstance(members, str | Mapping) or not isinstance(members, Sequence) or not members:
            raise ConfigError(
                f"reward_ensemble: members is {members!r}; it must be a list of rewards, such as "
                "[exact_match, {name: reward_model, model: outputs/reward}]."
            )
        self.combine: Combine = combine
        self.penalty = penalty
        made = [m if callable(m) else build_rewards([m])[0] for m in members]
        self.members = [_guarded(member, place) for place, member in enumerate(made)]
        self.asks_for = set().union(*(member.asks_for for member in self.members))
        # A trainer calls these where a member has them: it checks the policy against its own model.
        self.check_policy = _each(self.members, "check_policy")
        self.check_tokenizer = _each(self.members, "check_tokenizer")

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """As TRL calls a reward function."""
        rows = [member(prompts, completions, **columns) for member in self.members]
        scores = torch.tensor(
            [[math.nan if value is None else value for value in row] for row in rows],
            dtype=torch.float64,
        )
        log_disagreement(scores, self.__name__, columns.get("log_metric"))
        return combined(scores, self.combine, self.penalty)


def combined(scores: Tensor, combine: Combine, penalty: float) -> list[float | None]:
    """(K, B) scores of K members -> one number a completion; None where no member has one."""
    values = ensemble_score(scores, combine, penalty=penalty).tolist()
    return [None if math.isnan(value) else value for value in values]


def log_disagreement(
    scores: Tensor, name: str, log_metric: Callable[[str, float], None] | None
) -> None:
    """Log the (K, B) scores' standard deviation over members, mean over completions with one."""
    if log_metric is not None:
        spread = ensemble_spread(scores).nanmean().item()
        if not math.isnan(spread):
            log_metric(f"{name}/disagreement", spread)


def check_combination(name: str, combine: Any, penalty: Any) -> None:
    """Whether `ensemble_score` takes these.

    Raises:
        ConfigError: if not.
    """
    if isinstance(penalty, bool) or not isinstance(penalty, int | float):
        raise ConfigError(f"{name}: penalty is {penalty!r}; it must be a number, 0 or more.")
    if combine not in get_args(Combine):
        allowed = " or ".join(get_args(Combine))
        raise ConfigError(f"{name}: combine is {combine!r}; it must be {allowed}.")
    try:
        ensemble_score(torch.zeros(1, 1), combine, penalty=penalty)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _guarded(member: Any, place: int) -> Any:
    name = getattr(member, "__name__", type(member).__name__)
    if is_async(member):
        raise ConfigError(
            f"reward_ensemble takes no asynchronous reward, and its member {name!r} is one. Give "
            "its synchronous form, or set isolated: true on it."
        )
    return guarded(member, f"reward_ensemble member {place} ({name})")


def _each(members: list[Any], method: str) -> Callable[[Any], None] | None:
    """Call that method of every member that has it; None where none has."""
    checks = [check for check in (getattr(m, method, None) for m in members) if check is not None]

    def check_all(shown: Any) -> None:
        for check in checks:
            check(shown)

    return check_all if checks else None
