"""What a process reward that was given as an object gives, checked."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl_ext.errors import RewardError, TrlExtError
from trl_ext.rewards.guard import raised

_WANTED = "It must give a list of one list a completion, one number a token."
_SHOWN = 80  # characters


def asked(scorer: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Any:
    """What the scorer gives; it gets lists of its own, which it may change.

    Raises:
        RewardError: it raised something that is no `TrlExtError`.
    """
    own = ([list(ids) for ids in each] for each in (prompt_ids, completion_ids))
    try:
        return scorer.token_rewards(*own)
    except TrlExtError:
        raise
    except Exception as error:
        raise RewardError(
            f"The process reward {type(scorer).__name__} raised {raised(error)}. Mend its "
            "token_rewards, or let it give 0 where it cannot score."
        ) from error


def checked(given: Any, wanted: list[int]) -> list[Tensor]:
    """What it gave as a tensor (t,) a completion, float32.

    Args:
        given: by the scorer.
        wanted: the number of tokens of each completion.

    Raises:
        RewardError: it is something else than a finite number a token.
    """
    if not isinstance(given, list | tuple | Tensor | np.ndarray):
        raise RewardError(f"The process reward gave {_short(given)}. {_WANTED}")
    numbers = [_numbers(row, each) for row, each in enumerate(given)]
    lengths = [len(each) for each in numbers]
    if lengths != wanted:
        raise RewardError(
            f"The process reward gave lists of {lengths} numbers for completions of {wanted} "
            f"tokens. {_WANTED}"
        )
    for row, each in enumerate(numbers):
        if not each.isfinite().all():
            place = int((~each.isfinite()).nonzero()[0])
            raise RewardError(
                f"The process reward of token {place} of completion {row} is "
                f"{each[place].item()}; each must be a finite number."
            )
    return numbers


def _numbers(row: int, given: Any) -> Tensor:
    """What it gave for one completion, (t,) float32."""
    problem = "has more dimensions than one, or none"
    try:
        numbers = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        numbers, problem = None, str(error)
    if numbers is not None and (numbers.dtype == torch.bool or numbers.is_complex()):
        numbers, problem = None, "its entries are no numbers"
    if numbers is None or numbers.dim() != 1:
        raise RewardError(
            f"The process reward gave {_short(given)} for completion {row}: {problem}. {_WANTED}"
        )
    return numbers.detach().float()


def check_sums(credit: Tensor) -> None:
    """Refuse credit (B, T) that overflows.

    Raises:
        RewardError: they do.
    """
    if not credit.isfinite().all():
        row = (~credit.isfinite()).any(1).nonzero()[0].item()
        raise RewardError(
            f"The process rewards of completion {row} add up to no finite number. Give smaller "
            "ones, in the units of the reward, or lower process_weight."
        )


def _short(given: Any) -> str:
    said = repr(given)
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…"
