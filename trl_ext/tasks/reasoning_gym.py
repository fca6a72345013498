"""Questions from reasoning-gym: generated, offline, each with a verifier.

`dataset_name: reasoning_gym/<task>` makes rows with the columns

    prompt    text, or messages with `format: chat`
    question  the task's own wording, without worked examples
    answer    the task's own answer; None where a task has no single one
    task      the task's name
    entry     JSON: the metadata and the task's settings, for the verifier

The held-out questions are distinct and drawn first, the training questions avoid them: no question
is in both, and the held-out set does not depend on how much is trained on. Training questions may
repeat, as draws do; `Dataset.info.description` says how often.
"""

import difflib
import json
import logging
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from trl_ext.errors import ConfigError, DataError, MissingDependencyError, UnknownNameError
from trl_ext.tasks.reasoning_gym_options import read_options

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# A task counts as exhausted when this many draws did not give the questions asked for.
DRAWS_PER_QUESTION, LEAST_DRAWS = 20, 1000


def splits(task: str, kwargs: dict[str, Any]) -> "dict[str, Dataset]":
    """The train split, and a test split if `eval_size` asks for one.

    Raises:
        UnknownNameError: if reasoning-gym has no such task.
        ConfigError: if a key is unknown or a value is refused.
        DataError: if the task has too few distinct questions, or cannot be stored in a dataset.
        MissingDependencyError: if reasoning-gym is not installed.
    """
    known = _known_tasks()
    if task not in known:
        raise _unknown_task(task, list(known))
    options, settings = read_options(task, known[task][1], kwargs)
    source = _Source(task, settings)

    examples = source.distinct(options.num_examples, options.examples_seed, taken=())
    if any(example["answer"] is None for example in examples):
        raise ConfigError(
            f"dataset_kwargs: num_examples is {options.num_examples}, but reasoning_gym/{task} "
            "has no answers to show in worked examples; only its verifier knows. Set it to 0."
        )
    taken = {example["question"] for example in examples}
    held_out = source.distinct(options.eval_size, options.eval_seed, taken)
    taken |= {entry["question"] for entry in held_out}
    training = source.any(options.size, options.seed, taken)
    source.check_stored(training[0])

    found = {"train": training, "test": held_out} if held_out else {"train": training}
    return {
        split: source.dataset(
            entries,
            prompts=[options.prompt(entry["question"], examples) for entry in entries],
            description=_description(task, split, entries),
        )
        for split, entries in found.items()
    }


def _known_tasks() -> dict[str, tuple[type, type]]:
    """Task name -> its dataset class and config class."""
    try:
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "dataset_name: reasoning_gym/<task> needs the package reasoning-gym: "
            "pip install reasoning-gym"
        ) from error
    return DATASETS


def _unknown_task(task: str, known: list[str]) -> UnknownNameError:
    close = difflib.get_close_matches(task, known, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return UnknownNameError(
        f"reasoning-gym has no task {task!r}.{hint} It has {len(known)}, among them "
        "letter_counting, syllogism, chain_sum, products, gcd, spell_backward. All of them: "
        "python -c 'from reasoning_gym.factory import DATASETS; print(*DATASETS)'"
    )


def _description(task: str, split: str, entries: list[dict[str, Any]]) -> str:
    """How many questions differ, and what a model scores that always gives the same answer."""
    different = len({entry["question"] for entry in entries})
    text = f"reasoning_gym/{task}, {split}: {len(entries)} questions, {different} of them different"
    answer, times = Counter(entry["answer"] for entry in entries).most_common(1)[0]
    if answer is not None:
        text += f"; always answering {answer!r} would be right for {times / len(entries):.0%}"
    logger.info("%s", text)
    return text


class _Source:
    """One task with its settings: draws entries and makes datasets of them."""

    def __init__(self, task: str, settings: dict[str, Any]):
        self.task = task
        self.settings = settings
        try:
            self._generator(seed=0, size=1)
        except Exception as error:  # each task checks its settings in its own way
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"dataset_kwargs: reasoning_gym/{self.task} refuses the settings {self.settings}: "
            f"{type(error).__name__}: {error}. Correct these, or leave them out for the defaults."
        )

    def _generator(self, *, seed: int, size: int) -> Any:
        from reasoning_gym.factory import create_dataset

        return create_dataset(self.task, **self.settings, seed=seed, size=size)

    def _stream(self, seed: int, chunk: int) -> Iterator[dict[str, Any]]:
        """Endless entries, in chunks because some tasks cannot be asked beyond their size."""
        for number in count():
            generator = self._generator(seed=seed + number * chunk, size=chunk)
            for index in range(chunk):
                try:
                    entry = generator[index]
                except Exception as error:  # of settings that only a draw makes use of
                    raise self._refused(error) from error
                yield entry

    def any(self, size: int, seed: int, taken: Collection[str]) -> list[dict[str, Any]]:
        """`size` entries whose questions are not taken; they may repeat."""
        draws = max(LEAST_DRAWS, DRAWS_PER_QUESTION * size)
        stream = islice(self._stream(seed, size), draws)
        entries = list(islice((entry for entry in stream if entry["question"] not in taken), size))
        if len(entries) < size:
            raise self._exhausted(size, len(entries), draws)
        return entries

    def distinct(self, size: int, seed: int, taken: Collection[str]) -> list[dict[str, Any]]:
        """`size` entries with different questions, none of them taken."""
        if size == 0:
            return []
        found: dict[str, dict[str, Any]] = {}
        draws = max(LEAST_DRAWS, DRAWS_PER_QUESTION * size)
        for entry in islice(self._stream(seed, size), draws):
            if entry["question"] not in taken:
                found.setdefault(entry["question"], entry)
            if len(found) == size:
                return list(found.values())
        raise self._exhausted(size, len(found), draws)

    def _exhausted(self, wanted: int, found: int, draws: int) -> DataError:
        return DataError(
            f"reasoning_gym/{self.task} with the settings {self.settings} gave {found} fresh "
            f"questions in {draws} draws where {wanted} were asked for: it has too few different "
            "ones. Make eval_size or num_examples smaller, or the task larger. No question of the "
            "test split may occur in training."
        )

    def check_stored(self, entry: dict[str, Any]) -> None:
        """Refuse a task whose verifier judges a stored entry differently from the drawn one."""
        judge = self._generator(seed=0, size=1)
        try:
            stored = json.loads(json.dumps(entry))
        except TypeError:
            stored = None
        answer = entry["answer"]
        if stored is None or judge.score_answer(answer, entry) != judge.score_answer(
            answer, stored
        ):
            raise DataError(
                f"reasoning_gym/{self.task} cannot be used: its verifier needs Python objects that "
                "a dataset does not keep (it rejects its own answer once the entry was stored)."
            )

    def dataset(
        self, entries: list[dict[str, Any]], prompts: list[Any], description: str
    ) -> "Dataset":
        """The rows described at the top of this file."""
        from datasets import Dataset

        rows = [
            {
                "prompt": prompt,
                "question": entry["question"],
                "answer": entry["answer"],
                "task": self.task,
                "entry": json.dumps({"metadata": entry["metadata"], "settings": self.settings}),
            }
            for prompt, entry in zip(prompts, entries, strict=True)
        ]
        dataset = Dataset.from_list(rows)
        dataset.info.description = description
        return dataset
