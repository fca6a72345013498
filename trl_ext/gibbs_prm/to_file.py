"""Score rows into a file, so that a kill loses little: what `trl_ext score` does, in Python."""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigError, DataError
from trl_ext.gibbs_prm.files import Row, read_rows
from trl_ext.gibbs_prm.rows_to_score import check_first
from trl_ext.gibbs_prm.scored_file import ScoredFile, check_output
from trl_ext.gibbs_prm.scored_row import ScoredRow
from trl_ext.gibbs_prm.scorer import GibbsScorer
from trl_ext.gibbs_prm.streaming import score_rows
from trl_ext.models.adapter import inner_model


def score_to_file(
    scorer: GibbsScorer,
    rows: str | Path | Sequence[Row],
    output: str | Path,
    steps: Any = None,
    *,
    format: str = "auto",
    append_eos: bool = False,
    force: bool = False,
    watch: Callable[[list[ScoredRow], int], None] | None = None,
) -> Path:
    """Score every completion of every row into a file; after a kill the same call goes on.

    Until all is scored the rows are in `<output>.partial`, each window on disk before the next is
    scored. The same call (the same input, models, β, temperature, dtype and steps) counts them and
    goes on behind them; another one is refused. Models given as objects are known by the path that
    they were loaded from: whoever trains them in between deletes the .partial file, or sets
    `force`. `read_scored` reads the output, and `trl_ext rank` judges it. Equations E22-E24.

        score_to_file(GibbsScorer("outputs/mine"), "answers.jsonl", "scored.jsonl")

    Args:
        scorer: what scores.
        rows: the path of a file that `read_rows` reads, or a list of its rows.
        output: a path that ends in .jsonl or .parquet.
        steps: as `score_rows` takes it.
        format: of the file, as `read_rows` takes it.
        append_eos: as in `GibbsScorer.score`.
        force: replace what is at `output`, and begin anew what is under way there.
        watch: is told what the file has got and how many completions it has now, after each
            window; before the first one that there are [] new ones.

    Returns:
        The path of the output.

    Raises:
        ConfigError: output is there, cannot be written, or is under way with something else; or as
            `GibbsScorer.score`.
        DataError: a row is none, or cannot be scored; with its place.
        RunError: output is being written by another process, the disk is full, or as
            `GibbsScorer.score`.
    """
    if not isinstance(scorer, GibbsScorer):
        raise ConfigError(f"scorer is a {type(scorer).__name__}; it must be a GibbsScorer.")
    output = Path(output).expanduser()
    check_output(output, force)
    check_first(_again(rows, format), steps)
    about = _about(scorer, rows, steps) | {"append_eos": append_eos, "format": format}
    file = ScoredFile(output, about, force=force)
    try:
        if watch:
            watch([], file.done)
        again = _again(rows, format)
        for part in score_rows(scorer, again, steps, skip=file.done, append_eos=append_eos):
            file.write(part)
            if watch:
                watch(part, file.done)
        file.finish()
    finally:
        file.close()
    return output


def _again(rows: Any, format: str) -> Any:
    """The rows from the first on, as often as asked for."""
    if isinstance(rows, str | Path):
        return read_rows(rows, format=format)
    if not isinstance(rows, Sequence):
        raise ConfigError(
            f"rows is a {type(rows).__name__}, which may be gone through only once. Give the path "
            "of a file, or a list."
        )
    wrong = next((row for row in rows if not isinstance(row, Row)), None)
    if wrong is not None:
        raise DataError(
            f"rows holds a {type(wrong).__name__}; each must be a Row(prompt, completions), as "
            "read_rows gives them."
        )
    return rows


def _about(scorer: GibbsScorer, rows: Any, steps: Any) -> dict[str, Any]:
    """What makes two scorings one."""
    models = {"policy": scorer.policy, "reference": scorer.reference}
    if isinstance(steps, re.Pattern):
        steps = {"regex": steps.pattern, "flags": int(steps.flags)}
    return {
        **scorer.names,
        "tokenizer": str(getattr(scorer.tokenizer, "name_or_path", "")),
        "beta": scorer.beta,
        "temperature": scorer.temperature,
        "dtype": {name: str(inner_model(model).dtype) for name, model in models.items()},
        "steps": steps,
        "input": _digest(rows),
    }


def _digest(rows: Any) -> str:
    if not isinstance(rows, str | Path):
        said = repr(list(rows)).encode("utf-8", "backslashreplace")
        return f"rows, sha256 {hashlib.sha256(said).hexdigest()}"
    path = Path(rows).expanduser()
    try:
        with path.open("rb") as file:
            return f"{rows}, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise DataError(
            f"{rows} cannot be read: {error.strerror}. Give a file that you may read."
        ) from error
