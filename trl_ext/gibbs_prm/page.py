"""Scores as a page for people: one HTML file that shows where completions went wrong."""

import base64
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from trl_ext.errors import ConfigError
from trl_ext.gibbs_prm.page_cards import Card, Scales, cards
from trl_ext.gibbs_prm.page_drawing import ColourScale, formatted
from trl_ext.gibbs_prm.scored import PrefixScores

_FOLDER = Path(__file__).parent / "page_template"

# What would break the page, hide in it or rearrange it: control characters other than tab and line
# feed, embeddings and overrides of the direction of text, and halves of surrogate pairs, which no
# file in UTF-8 can hold.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BRIEF = 160  # characters of a step in a table; its card has all of them


def write_page(
    scores: Iterable[PrefixScores],
    path: str | os.PathLike[str],
    *,
    title: str = "Where completions went wrong",
    about: Mapping[str, Any] | None = None,
    labels: Sequence[bool | float | None] | None = None,
    first_errors: Sequence[int | None] | None = None,
    ids: Sequence[object] | None = None,
) -> Path:
    """Write one HTML file, complete in itself, with a card for each completion.

    Tokens have the colour of β·(log π − log π_ref), the tokens' part of the score of Equation E23;
    steps that have no token scores have the colour of their reward. Orange is below 0, blue above,
    and the two ends of the scale are ± a high quantile of |score| over the page.

    The page needs no network and no JavaScript; with JavaScript it also has a table of all steps,
    to sort and to filter. A view of it has an address: `#sort=reward,ascending`, with a column's
    key (completion, step, reward, prefix, error, label, text) and a direction.

    Args:
        scores: `GibbsScores` and `MonteCarloScores`. They are walked twice, first for the scale; an
            iterator, which can be walked once, is held in memory.
        path: of the file. An older one is replaced once the new one is complete.
        title: of the page.
        about: what the page is made from, such as the models, β and the file of completions.
        labels: of each completion, whether it is correct, or its reward; None: not known.
        first_errors: of each completion, the first wrong step, counted from 0 among the steps that
            were asked for (see `PrefixScores.merged_into`); −1: none is wrong; None: not known.
        ids: of each completion, how its reader knows it.

    Returns:
        The path.

    Raises:
        ConfigError: if `path` is a folder.
        DataError: if what a completion is said to have does not fit together, such as more prefix
            scores than steps, or a first error that is none of its steps; or if `labels`,
            `first_errors` or `ids` are more or fewer than `scores`.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"The page cannot be written to {path}, which is a folder; name a file.")
    if isinstance(scores, Iterator):
        scores = list(scores)
    known = {"labels": labels, "first_errors": first_errors, "ids": ids}
    scales = Scales.of(scores, known)
    content = {"title": title, "about": about or {}, "tokens": scales.tokens, "steps": scales.steps}
    columns = _columns(scales, labels)
    _write_whole(path, _chunks(cards(scores, scales, known), columns=columns, **content))
    return path


def _columns(scales: Scales, labels: object) -> list[tuple[str, str]]:
    """Key, as in the page's address, and heading of each column of the table of all steps."""
    columns = [("completion", "Completion"), ("step", "Step"), ("reward", "Reward")]
    columns.append(("prefix", "Prefix score"))
    if scales.has_errors:
        columns.append(("error", "Standard error"))
    if labels is not None:
        columns.append(("label", "Label"))
    return [*columns, ("text", "Text")]


def _chunks(cards: Iterator[Card], **content: Any) -> Iterator[str]:
    """The page, piece by piece; no more than one card is held at a time."""
    style = _colour_rules() + (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    content |= {"style": Markup(style), "script": Markup(script)}
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'"
    )
    return (
        _environment().get_template("page.html.j2").generate(cards=cards, policy=policy, **content)
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else _clean(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"number": _number, "exact": _exact, "shown": _shown, "brief": _brief}
    return environment


def _write_whole(path: Path, chunks: Iterable[str]) -> None:
    """Write beside `path` and rename: an interrupted write leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        file = Path(scratch) / path.name
        with file.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(chunks)
        os.replace(file, path)


def _colour_rules() -> str:
    """A class for each colour of the scale: more of it the farther from the middle."""
    middle = len(ColourScale.NAMES) // 2
    return "".join(
        f".{name}{{background:rgba(var(--{'up' if place > middle else 'down'}),"
        f"{abs(place - middle) / middle:g})}}\n"
        for place, name in enumerate(ColourScale.NAMES)
    )


def _digest(text: str) -> str:
    """What a content security policy knows a script or a style by."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _clean(text: str) -> str:
    return _UNSHOWN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def _shown(text: str) -> Markup:
    """Text as it is, its line ends marked by what is not copied along with it."""
    return escape(_clean(text)).replace("\n", Markup("<b></b>\n"))


def _brief(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _BRIEF else f"{text[:_BRIEF]}…"


def _number(value: float) -> Markup:
    return Markup(formatted(value))


def _exact(value: float) -> Markup:
    """A number that JavaScript reads, to sort by."""
    if math.isinf(value):
        return Markup("Infinity" if value > 0 else "-Infinity")
    return Markup("NaN" if math.isnan(value) else repr(float(value)))
