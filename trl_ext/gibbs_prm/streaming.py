"""Score a stream of rows in windows: a window is in memory and sorted by length, the stream not."""

import re
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from trl_ext.errors import ConfigError, DataError, RunError, TrlExtError
from trl_ext.gibbs_prm.files import Row
from trl_ext.gibbs_prm.rows_to_score import Place, places, steps_of
from trl_ext.gibbs_prm.scored_row import ScoredRow, apart
from trl_ext.gibbs_prm.scorer import GibbsScorer

_FIRST_WINDOW = 16  # completions: what a kill may cost before the speed is known


def score_rows(
    scorer: GibbsScorer,
    rows: Iterable[Row],
    steps: Any = None,
    *,
    skip: int = 0,
    window: int = 512,
    seconds: float = 10.0,
    append_eos: bool = False,
) -> Iterator[list[ScoredRow]]:
    """Score every completion of every row, in their order.

    Args:
        scorer: what scores.
        rows: as `read_rows` gives them.
        steps: as `GibbsScorer.score` takes for all completions; "given": those of the rows; None:
            those of the rows where they have some, else "newline".
        skip: completions at the beginning that are scored already.
        window: completions that are sorted by length together, at most.
        seconds: about how long a window may take; the first is small, and the others follow.
        append_eos: as in `GibbsScorer.score`.

    Yields:
        The scored completions of a window.

    Raises:
        DataError: for a row that cannot be scored, with its place; or "given" steps that it lacks.
        ConfigError, RunError: as `GibbsScorer.score`.
    """
    left = islice(places(rows), skip, None)
    size = min(window, _FIRST_WINDOW)
    while part := list(islice(left, size)):
        begin = time.perf_counter()
        cuts = [steps_of(*place, steps) for place in part]
        completions = [row.completions[sample] for _, sample, row in part]
        prompts = [row.prompt for _, _, row in part]
        try:
            scored = scorer.score(prompts, completions, cuts, append_eos=append_eos)
        except (ConfigError, DataError) as error:
            raise _located(scorer, part, cuts, append_eos, error) from error
        except RunError as error:
            raise _of_input(part, error) from error
        taken = max(time.perf_counter() - begin, 1e-6)
        size = max(1, min(window, 2 * size, round(size * seconds / taken)))
        yield [
            ScoredRow(
                number,
                sample,
                scores,
                id=row.id,
                label=_of(row.labels, sample),
                first_error=_of(row.first_errors, sample),
                answer=_of(row.answers, sample),
                columns=apart(row.columns),
            )
            for (number, sample, row), scores in zip(part, scored, strict=True)
        ]


def _of(values: Any, sample: int) -> Any:
    return None if values is None else values[sample]


def _located(
    scorer: GibbsScorer, part: list[Place], cuts: list[Any], append_eos: bool, error: TrlExtError
) -> TrlExtError:
    """The error of a window once more, as that of the row of the input that it is about.

    Rows of a window have numbers of their own in it: each is tried by itself, without a model.
    """
    for (number, sample, row), cut in zip(part, cuts, strict=True):
        try:
            scorer.check([row.prompt], [row.completions[sample]], [cut], append_eos=append_eos)
        except (ConfigError, DataError) as own:
            text = re.sub(r"\ARow 0 has ", "it has ", re.sub(r"\A[Rr]ow 0: ", "", str(own)))
            return type(own)(f"Row {number} of the input, completion {sample}: {text}")
    return error


def _of_input(part: list[Place], error: RunError) -> RunError:
    """What a model could not score, by its place in the input: only the window's is in the text."""
    found = re.match(r"Row (\d+): ", str(error))
    if found is None:
        return error
    number, sample, _ = part[int(found[1])]
    return RunError(f"Row {number} of the input, completion {sample}: {str(error)[found.end() :]}")
