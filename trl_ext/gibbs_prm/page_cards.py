"""What the page of scores shows of each completion, and on which scales."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from markupsafe import Markup

from trl_ext.errors import DataError
from trl_ext.gibbs_prm.encoding import short
from trl_ext.gibbs_prm.page_drawing import ColourScale, formatted, sparkline
from trl_ext.gibbs_prm.row_values import as_texts
from trl_ext.gibbs_prm.scored import GibbsScores, MonteCarloScores, PrefixScores

_SHORT_PROMPT = 300  # characters of a prompt that is shown without being asked for


class Scales(NamedTuple):
    """The two scales of a page, and whether any of its scores has a standard error."""

    tokens: ColourScale
    steps: ColourScale
    has_errors: bool

    @classmethod
    def of(
        cls, scores: Iterable[PrefixScores], known: Mapping[str, Sequence[Any] | None]
    ) -> "Scales":
        """Read all scores once.

        Raises:
            DataError: if a completion's parts, or what is `known` of all, differ in number.
        """
        tokens, steps = array("d"), array("d")
        has_errors, count = False, 0
        for count, one in enumerate(scores, start=1):
            _check(one, count - 1)
            tokens.extend(_token_scores(one))
            steps.extend(one.step_rewards)
            has_errors = has_errors or one.standard_errors is not None
        for name, values in known.items():
            if values is not None and len(values) != count:
                raise DataError(
                    f"`{name}` has {len(values)} entries for {count} scored completions; pass one "
                    "for each, in the same order, None where it is not known."
                )
        return cls(ColourScale(tokens), ColourScale(steps), has_errors)


class Token(NamedTuple):
    """Its text, its colour, log π − log π_ref in nats, and β times that."""

    text: str
    colour: str
    log_ratio: float
    score: float


class Step(NamedTuple):
    """A step as the page shows it; `number` counts from 0."""

    number: int
    text: str
    tokens: list[Token]
    colour: str
    reward: float
    prefix: float
    error: float | None
    is_believed: bool
    marks: list[str]


@dataclass(frozen=True)
class Card:
    """A completion as the page shows it; all numbers count from 0."""

    number: int
    name: str
    prompt: list[tuple[str, str]]
    steps: list[Step]
    score: float
    facts: list[str]
    label: str
    worst: int | None
    first_error: int | None
    has_errors: bool
    is_coloured_by_step: bool
    has_numbers: bool
    spark: Markup
    notes: list[str]

    @property
    def is_prompt_short(self) -> bool:
        return sum(len(text) for _, text in self.prompt) <= _SHORT_PROMPT


def cards(
    scores: Iterable[PrefixScores], scales: Scales, known: Mapping[str, Sequence[Any] | None]
) -> Iterator[Card]:
    """The cards of a page, each made when it is asked for."""
    for place, one in enumerate(scores):
        known_here = {name: values[place] for name, values in known.items() if values is not None}
        yield _card(place, one, scales, **known_here)


def _card(
    number: int,
    one: PrefixScores,
    scales: Scales,
    labels: bool | float | None = None,
    first_errors: int | None = None,
    ids: object = None,
) -> Card:
    label, error = _label(labels), _first_error(number, one, first_errors)
    facts = [label] if label else []
    facts += ["no step is wrong"] if error == -1 else []
    if isinstance(one, MonteCarloScores):
        precision = formatted(one.log_z_standard_error)
        facts.append(f"log Z {formatted(one.log_z)} ± {precision} nats")
    worst = _worst(one.step_rewards)
    is_marked = {"worst": worst, "first error": error}
    return Card(
        number=number,
        name="" if ids is None else str(ids),
        prompt=_messages(one.prompt),
        steps=list(_steps(one, scales, is_marked)),
        score=one.score,
        facts=facts,
        label=label,
        worst=worst,
        first_error=None if error == -1 else error,
        has_errors=one.standard_errors is not None,
        is_coloured_by_step=not _token_scores(one),
        has_numbers=one.step_ends != list(range(1, len(one.steps) + 1)) or len(one.steps) == 1,
        spark=sparkline(one, worst),
        notes=one.notes,
    )


def _steps(one: PrefixScores, scales: Scales, marked: Mapping[str, int | None]) -> Iterator[Step]:
    scores = _token_scores(one)
    tokens = one.tokens if isinstance(one, GibbsScores) else []
    ratios = one.token_log_ratios if isinstance(one, GibbsScores) else []
    rewards = one.step_rewards
    believed = one.is_believed if isinstance(one, MonteCarloScores) else []
    for place, (begin, end) in enumerate(pairwise([0, *one.step_ends])):
        own = zip(tokens[begin:end], ratios[begin:end], scores[begin:end], strict=True)
        yield Step(
            number=place,
            text=one.steps[place],
            tokens=[Token(text, scales.tokens.colour(s), ratio, s) for text, ratio, s in own],
            colour=scales.steps.colour(rewards[place]),
            reward=rewards[place],
            prefix=one.prefix_scores[place],
            error=one.standard_errors[place] if one.standard_errors is not None else None,
            is_believed=believed[place] if believed else True,
            marks=[mark for mark, step in marked.items() if step == place],
        )


def _token_scores(one: PrefixScores) -> list[float]:
    """β·(log π − log π_ref) of each token, in units of the reward; none without token scores."""
    ratios = one.token_log_ratios if isinstance(one, GibbsScores) else []
    return [one.beta * ratio for ratio in ratios]


def _worst(rewards: Sequence[float]) -> int | None:
    """The first step with the lowest reward; one without a reward is no candidate."""
    numbers = [place for place, reward in enumerate(rewards) if not math.isnan(reward)]
    return min(numbers, key=lambda place: rewards[place], default=None)


def _first_error(number: int, one: PrefixScores, asked: int | None) -> int | None:
    """The step of `one` that the step which was asked for is part of; −1 and None as they are."""
    places = one.merged_into or range(len(one.steps))
    if asked is not None and not -1 <= asked < len(places):
        raise DataError(
            f"The first error of completion {number} is step {asked}, but it has {len(places)} "
            "steps; give a step counted from 0, or -1 for none."
        )
    return asked if asked is None or asked == -1 else places[asked]


def _label(label: bool | float | None) -> str:
    if label is None:
        return ""
    if isinstance(label, bool):
        return "correct" if label else "incorrect"
    if isinstance(label, str):
        raise DataError(
            f"A label is {short(label)}; it must be true, false, a number or None.{as_texts(label)}"
        )
    return f"reward {formatted(label)}"


def _messages(prompt: Any) -> list[tuple[str, str]]:
    """Role and text of each message; a text has no role."""
    if isinstance(prompt, str):
        return [("", prompt)]
    return [
        (str(message["role"]), str(message["content"]))
        if isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        else ("", str(message))
        for message in (prompt if isinstance(prompt, list | tuple) else [prompt])
    ]


def _check(one: PrefixScores, number: int) -> None:
    steps = len(one.steps)
    lengths = {"step ends": len(one.step_ends), "prefix scores": len(one.prefix_scores)}
    if one.standard_errors is not None:
        lengths["standard errors"] = len(one.standard_errors)
    if isinstance(one, MonteCarloScores) and one.is_believed:
        lengths["marks whether they are believed"] = len(one.is_believed)
    wrong = [f"{count} {what}" for what, count in lengths.items() if count != steps]
    if isinstance(one, GibbsScores):
        tokens = one.step_ends[-1] if one.step_ends else 0
        lengths = {"tokens": len(one.tokens), "log-ratios": len(one.token_log_ratios)}
        wrong += [f"{n} {what} up to token {tokens}" for what, n in lengths.items() if n != tokens]
    if wrong:
        raise DataError(
            f"Completion {number} has {steps} steps, but {', '.join(wrong)}; each step needs one "
            "of each, and each token belongs to a step. Pass what a scorer returned."
        )
