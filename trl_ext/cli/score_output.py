"""What `trl_ext score` shows: steps of a few completions, a summary of many, a page."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_ext.errors import ConfigError

if TYPE_CHECKING:
    from trl_ext.gibbs_prm.scored_row import ScoredRow
    from trl_ext.gibbs_prm.scorer import GibbsScorer

_WORST = 5
HOW_TO_READ = (
    "score: beta*log(policy/reference) up to there, 0 at the prompt; reward: what the step adds to "
    "it.\nBelow 0 less reward is to be expected behind it than from the prompt on. Compare within "
    "one prompt."
)


class StoredRows:
    """The rows of a scored file, to be gone through as often as one likes."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> "Iterator[ScoredRow]":
        from trl_ext.gibbs_prm.scored_file import read_scored

        return read_scored(self.path)


class Progress:
    """A bar that tells how many completions are scored so far, and in the end how fast that was."""

    def __init__(self) -> None:
        self.done = self.completions = self.tokens = 0

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        self.begin = time.perf_counter()
        self.bar = tqdm(desc="scored", unit=" completions", disable=not sys.stderr.isatty())
        return self

    def __call__(self, part: "list[ScoredRow]", done: int) -> None:
        """Take in a window of scored rows; there are `done` of them now."""
        if done and not part:
            print(f"going on behind the {done} completions that are scored already")
        self.completions += len(part)
        self.tokens += sum(len(row.scores.tokens) for row in part)
        self.bar.update(done - self.done)
        self.done = done

    def __exit__(self, kind: object, *_: object) -> None:
        self.bar.close()
        if kind is None:
            seconds = time.perf_counter() - self.begin
            print(
                f"scored {self.completions:,} completions, {self.tokens:,} tokens, in "
                f"{seconds:.1f} s ({self.tokens / seconds:,.0f} tokens/s)"
            )


def check_all(*checks: Callable[[], object]) -> None:
    """Run checks that each find one thing, and tell of all that is found at once.

    Raises:
        ConfigError: if one of them does.
    """
    found: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            found.append(str(error))
    if found:
        raise ConfigError("\n".join(found))


def check_apart(names: "Mapping[str, str | Path | None]") -> None:
    """Whether the files of a command are different ones: none may replace another.

    Args:
        names: what errors call each -> its path; None: there is none.

    Raises:
        ConfigError: if two are one.
    """
    places: dict[str, str] = {}
    for option, name in names.items():
        place = None if name is None else os.path.realpath(name)
        if place in places:
            raise ConfigError(
                f"{places[place]} and {option} are one file, {name}: one would replace the other. "
                f"Give {option if option.startswith('-') else places[place]} another name."
            )
        if place is not None:
            places[place] = option


def visible(text: str) -> Text:
    """Text for a terminal, which must not obey what a model writes: control characters as ␛."""
    return Text("".join(c if c >= " " or c in "\t\n" else chr(0x2400 + ord(c)) for c in text))


def print_tables(rows: "Sequence[ScoredRow]") -> None:
    """Each completion with its steps."""
    console = Console(highlight=False)
    for row in rows:
        scores = row.scores
        console.print(f"completion {row.sample}: score {scores.score:+.3f}")
        table = Table("step", "reward", "score", "text")
        for column in table.columns[:3]:
            column.justify = "right"
        for index, text in enumerate(scores.steps):
            style = "bold" if index == scores.worst_step and len(scores.steps) > 1 else ""
            table.add_row(
                str(index),
                f"{scores.step_rewards[index]:+.3f}",
                f"{scores.prefix_scores[index]:+.3f}",
                visible(text.rstrip("\n")),
                style=style,
            )
        console.print(table)
        for note in scores.notes:
            console.print(f"note: {note}", markup=False)


def print_summary(rows: "Iterable[ScoredRow]") -> None:
    """Mean scores by label, and the worst steps."""
    console = Console(highlight=False)
    by_label: dict[str, list[float]] = {}
    worst: list[tuple[float, int, int, int, str]] = []
    rounded = 0
    for row in rows:
        scores = row.scores
        by_label.setdefault(_label(row.label), []).append(scores.score)
        rounded += bool(scores.notes)
        if (step := scores.worst_step) is not None:
            worst.append((scores.step_rewards[step], row.row, row.sample, step, scores.steps[step]))
            worst = sorted(worst)[:_WORST]
    for label, values in sorted(by_label.items()):
        console.print(f"{label}: {len(values)} completions, mean score {fmean(values):+.4f}")
    if rounded:
        console.print(f"{rounded} completions have notes, such as on steps rounded to tokens")
    table = Table("row", "sample", "step", "reward", "text", title="the lowest step rewards")
    for reward, number, sample, step, text in worst:
        brief = " ".join(text.split())
        brief = brief if len(brief) <= 60 else brief[:57] + "..."
        table.add_row(str(number), str(sample), str(step), f"{reward:+.3f}", visible(brief))
    if worst:
        console.print(table)


def _label(label: Any) -> str:
    if label is None:
        return "all"
    if isinstance(label, bool):
        return "right" if label else "wrong"
    return "right" if label >= 1 else "wrong" if label <= 0 else "between"


def page(
    rows: "Iterable[ScoredRow]",
    path: Path,
    scorer: "GibbsScorer",
    source: str | None,
    most: int,
) -> None:
    """Write the page of the first `most` completions."""
    from trl_ext.gibbs_prm.page import write_page

    known: list[tuple[Any, Any, str]] = [
        (row.label, row.first_error, f"row {row.row}, sample {row.sample}")
        for row in islice(rows, most + 1)
    ]
    if len(known) > most:
        print(f"--html: the page shows the first {most} completions")
        known = known[:most]
    labels: list[Any] = [label for label, _, _ in known]
    first_errors: list[Any] = [first_error for _, first_error, _ in known]
    about = {**scorer.names, "beta": f"{scorer.beta:g}"} | ({"file": source} if source else {})
    write_page(
        _First(rows, most),
        path,
        about=about,
        labels=labels if any(each is not None for each in labels) else None,
        first_errors=first_errors if any(e is not None for e in first_errors) else None,
        ids=[name for _, _, name in known],
    )
    print(f"{path}: written")


class _First:
    """The scores of the first rows, walked twice by the page."""

    def __init__(self, rows: "Iterable[ScoredRow]", most: int):
        self.rows = rows
        self.most = most

    def __iter__(self) -> Iterator[Any]:
        return (row.scores for row in islice(self.rows, self.most))
