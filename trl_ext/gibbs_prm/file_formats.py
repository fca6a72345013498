"""What a row of a file says, in each of the formats that are read: plain and two benchmarks'."""

from dataclasses import dataclass, field
from typing import Any

from trl_ext.errors import DataError
from trl_ext.gibbs_prm.encoding import short
from trl_ext.gibbs_prm.row_values import (
    ANSWERS,
    KINDS,
    LABELS,
    RATED,
    SAID,
    STEPS,
    are_rated,
    is_bool,
    is_count,
    is_list_of,
    is_object,
    is_said,
    is_text,
    take,
)

_JOINT = "\n\n"  # between the steps of ProcessBench and PRM800K, in the completion made of them


@dataclass(frozen=True)
class Row:
    """A prompt with its completions, as a file has them.

    Attributes:
        prompt: a text or messages.
        completions: at least one, of the same kind.
        steps: of each completion, its texts or character ends; None: the file has none.
        labels: of each completion, whether it is right, or its reward; None: the file has none.
        first_errors: of each completion, the first wrong step, from 0, or −1: none is wrong; None:
            the file does not say.
        id: of the row; None: it has none.
        answers: of each completion, its final answer; None: the file has none.
        columns: everything else that the row has, to be written through.
    """

    prompt: Any
    completions: list[Any]
    steps: list[list[Any]] | None = None
    labels: list[Any] | None = None
    first_errors: list[int] | None = None
    id: Any = None
    answers: list[Any] | None = None
    columns: dict[str, Any] = field(default_factory=dict)


def _plain(row: dict[str, Any], where: str) -> Row:
    prompt = take(row, "prompt", where, is_said, SAID)
    several = row.get("completions") is not None
    if several and row.get("completion") is not None:
        raise DataError(f'{where}: the row has "completion" and "completions"; leave one out.')
    if several:
        completions = take(row, "completions", where, is_list_of(is_said), f"a list, {SAID}")
    else:
        completions = [take(row, "completion", where, is_said, SAID)]
    if any(isinstance(c, str) != isinstance(prompt, str) for c in completions):
        raise DataError(
            f"{where}: of prompt and completion one is a text and the other is a list of messages. "
            "Write both in one way."
        )
    number = len(completions) if several else None
    used = {"prompt", "completion", "completions", "id"}
    steps, labels, answers = (
        _of_each(row, keys, where, number, used) for keys in (STEPS, LABELS, ANSWERS)
    )
    columns = {key: value for key, value in row.items() if key not in used}
    return Row(prompt, completions, steps, labels, None, row.get("id"), answers, columns)


def _of_each(
    row: dict[str, Any], keys: tuple[str, ...], where: str, number: int | None, used: set[str]
) -> list[Any] | None:
    """What the first of the keys that the row has says of each completion; number: of these."""
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        return None
    used.add(key)
    is_right, allowed = KINDS[key]
    if number is None:
        return [take(row, key, where, is_right, allowed)]
    values = take(row, key, where, is_list_of(is_right), f"a list: for each completion {allowed}")
    if len(values) != number:
        raise DataError(
            f"{where}: {key} has {len(values)} entries, and there are {number} completions. Write "
            "one for each."
        )
    return values


def _processbench(row: dict[str, Any], where: str) -> Row:
    problem = take(row, "problem", where, is_text, "a text")
    steps = take(row, "steps", where, is_list_of(is_text), "a list of at least one text")
    is_right = take(row, "final_answer_correct", where, is_bool, "true or false")
    label = take(
        row,
        "label",
        where,
        lambda value: is_count(value) and -1 <= value < len(steps),
        f"the first wrong step, from 0 to {len(steps) - 1}, or -1: none is wrong",
    )
    used = ("problem", "steps", "final_answer_correct", "label", "id")
    columns = {key: value for key, value in row.items() if key not in used}
    return Row(
        problem, [_JOINT.join(steps)], [steps], [is_right], [label], row.get("id"), None, columns
    )


def _prm800k(row: dict[str, Any], where: str) -> Row:
    question = take(row, "question", where, is_object, "an object")
    problem = take(question, "problem", where, is_text, "a text", "question.")
    label = take(row, "label", where, is_object, "an object")
    steps, first_error = [], -1
    marked = take(label, "steps", where, lambda v: isinstance(v, list), "a list", "label.")
    for index, step in enumerate(marked):
        text, rating, goes_on = _chosen(step, where, f"label.steps[{index}]")
        if text is not None:
            steps.append(text)
        if rating == -1 and first_error == -1:
            first_error = index
        if not goes_on:
            break
    finish = label.get("finish_reason")
    columns = {key: value for key, value in row.items() if key not in ("question", "label", "id")}
    columns |= {"question": {k: v for k, v in question.items() if k != "problem"}}
    columns |= {"finish_reason": finish}
    labels = None if finish is None else [finish == "solution"]
    return Row(
        problem, [_JOINT.join(steps)], [steps], labels, [first_error], row.get("id"), None, columns
    )


def _chosen(step: Any, where: str, name: str) -> tuple[str | None, int | None, bool]:
    """Text and rating of a step, and whether the solution goes on behind it."""
    if not is_object(step):
        raise DataError(f"{where}: {name} is {short(step)}; it must be an object.")
    found = take(step, "completions", where, are_rated, RATED, f"{name}.")
    chosen, human = step.get("chosen_completion"), step.get("human_completion")
    if chosen is not None:
        take(
            step,
            "chosen_completion",
            where,
            lambda value: is_count(value) and 0 <= value < len(found),
            f"the number of one of the {len(found)} completions, from 0, or null",
            f"{name}.",
        )
        return found[chosen]["text"], found[chosen].get("rating"), True
    text = human.get("text") if isinstance(human, dict) else human
    if isinstance(text, str):
        return text, None, True
    wrong = next((c["text"] for c in found if c.get("rating") == -1), None)
    return wrong, None if wrong is None else -1, False


MAKERS = {"plain": _plain, "processbench": _processbench, "prm800k": _prm800k}
