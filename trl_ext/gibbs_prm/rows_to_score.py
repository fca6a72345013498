"""The completions of rows one by one, each with how it is cut, and what shows without a model."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.encoding import Encoded
from trl_ext.gibbs_prm.file_formats import Row
from trl_ext.gibbs_prm.given_steps import check_in_text
from trl_ext.gibbs_prm.row_values import line_of
from trl_ext.gibbs_prm.said import check_said
from trl_ext.gibbs_prm.scored_row import apart
from trl_ext.gibbs_prm.steps import check_steps, cut

GIVEN = "given"
Place = tuple[int, int, Row]
"""The number of a row of the input, that of a completion in it (both from 0), and the row."""


def places(rows: Iterable[Row]) -> Iterator[Place]:
    """Every completion of every row, in their order."""
    for number, row in enumerate(rows):
        for sample in range(len(row.completions)):
            yield number, sample, row


def steps_of(number: int, sample: int, row: Row, steps: Any) -> Any:
    """How a completion is cut: `steps`, or its own where these are asked for.

    Raises:
        DataError: they are asked for, and there are none.
    """
    given = None if row.steps is None else row.steps[sample]
    if steps == GIVEN and given is None:
        raise DataError(
            f"row {number} has no steps of its own, and steps is {GIVEN!r}. Give the row the key "
            "'steps', or a rule such as newline."
        )
    if steps is None or steps == GIVEN:
        return "newline" if given is None else given
    return steps


def check_first(
    rows: Iterable[Row], steps: Any = None, *, count: int = 512, is_written: bool = True
) -> None:
    """Whether the first completions can be scored and written, as far as shows without a model.

    A mistake in a file then costs no loading of models. What only their tokenizer or their context
    length decides is seen when they are scored.

    Args:
        rows: as `read_rows` gives them; no more of them are read.
        steps: as `score_rows` takes it.
        count: of completions that are looked at.
        is_written: their rows are to be in a file, so that other columns must fit in JSON.

    Raises:
        ConfigError: steps is no way to cut.
        DataError: there is no completion, or one cannot be scored; with its place.
    """
    if steps is not None and steps != GIVEN:
        check_steps(steps)
    place = None
    for place in islice(places(rows), count):
        _check(place, steps)
        if is_written:
            line_of({"row": place[0], **apart(place[2].columns)})
    if place is None:
        raise DataError("There is no completion to score. Give at least one row.")


def _check(place: Place, steps: Any) -> None:
    number, sample, row = place
    where = f"Row {number} of the input, completion {sample}: "
    completion, how = row.completions[sample], steps_of(*place, steps)
    check_said(row.prompt, completion, where)
    try:
        if isinstance(completion, str):
            _check_cut(completion, how)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{where}{error}") from error


def _check_cut(text: str, steps: Any) -> None:
    if isinstance(steps, list | tuple):
        # Whether they reach its end depends on which of its characters are special tokens.
        check_in_text(text, steps)
    elif text:
        cut(Encoded([0], [0], text, [text], [len(text)], [True], []), steps)
