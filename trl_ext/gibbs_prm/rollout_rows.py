"""The completions to score by rollouts, and which of their prefixes to sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.encoding import Encoded, encode
from trl_ext.gibbs_prm.sampling import Rollouts
from trl_ext.gibbs_prm.steps import Cut, cut

Key = tuple[int, tuple[int, ...]]
"""A prefix: the first row with its prompt, and the tokens of the completion so far."""


@dataclass(frozen=True)
class Row:
    """A completion of a prompt.

    Attributes:
        prompt, completion, columns: as they were given.
        encoded: their tokens.
        found: the steps.
        first: the first row that has the same prompt and columns: their rollouts are alike.
        is_over: it has ended, by an end token or by its length.
    """

    prompt: Any
    completion: Any
    encoded: Encoded
    found: Cut
    columns: dict[str, Any]
    first: int
    is_over: bool

    @property
    def keys(self) -> list[Key]:
        """The prefixes to complete: the empty one, and each step's end but that of one's own."""
        ends = self.found.token_ends[:-1] if self.is_over else self.found.token_ends
        return [(self.first, tuple(self.encoded.completion_ids[:end])) for end in (0, *ends)]


def rows_of(
    given: Sequence[Mapping[str, Any]], tokenizer: Any, sampler: Rollouts, append_eos: bool
) -> list[Row]:
    """Completions in tokens and steps.

    Args:
        given: as `trl_ext.gibbs_prm.given_rows.each_row` gives them.
        tokenizer: of the policy.
        sampler: which says where completions end.
        append_eos: end each text with the end-of-sequence token.

    Raises:
        ConfigError, DataError: as `MonteCarloScorer.score`.
    """
    rows: list[Row] = []
    of_prompt: dict[tuple[int, ...], list[Row]] = {}
    for number, values in enumerate(given):
        prompt, columns = values["prompt"], values["columns"]
        encoded = encode(
            prompt,
            values["completion"],
            tokenizer,
            completion_ids=values["completion_ids"],
            append_eos=append_eos,
            row=number,
        )
        _check_can_be_rolled_out(number, encoded, sampler)
        before = of_prompt.setdefault(tuple(encoded.prompt_ids), [])
        alike = (r.first for r in before if _same(r.prompt, prompt) and _same(r.columns, columns))
        row = Row(
            prompt=prompt,
            completion=values["completion"],
            columns=columns,
            encoded=encoded,
            found=cut(encoded, values["steps"]),
            first=next(alike, number),
            is_over=_is_over(encoded.completion_ids, sampler),
        )
        before.append(row)
        rows.append(row)
    return rows


def _is_over(ids: list[int], sampler: Rollouts) -> bool:
    has_ended = len(ids) > 0 and ids[-1] in sampler.end_ids
    return has_ended or len(ids) == sampler.max_completion_length


def _check_can_be_rolled_out(number: int, encoded: Encoded, sampler: Rollouts) -> None:
    ids, most = encoded.completion_ids, sampler.max_completion_length
    if not all(encoded.is_own):
        raise DataError(
            f"Row {number}: others than the policy speak in the completion, and rollouts cannot "
            "speak for them. Give the messages before the policy's last as the prompt."
        )
    if len(ids) > most:
        raise ConfigError(
            f"Row {number} has a completion of {len(ids)} tokens, and max_completion_length is "
            f"{most}. Raise it to what the policy may write, or leave the row out."
        )
    ended = [place for place, token in enumerate(ids[:-1]) if token in sampler.end_ids]
    if ended:
        raise DataError(
            f"Row {number}: token {ended[0]} (from 0) of the completion, {ids[ended[0]]}, ends a "
            f"completion, and {len(ids) - 1 - ended[0]} more follow. Cut it there."
        )


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal and say so; arrays answer with an array, and count as unlike."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    equal = one is other or one == other
    return equal if isinstance(equal, bool) else False
