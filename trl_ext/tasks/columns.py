"""What a dataset must look like for a trainer that samples its own completions."""

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trl_ext.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Columns by which TRL tells its other dataset types, and what such a dataset is for. TRL would
# drop `completion` without a word before it calls a reward.
OTHER_TYPES = {
    "completion": "a prompt-completion dataset, for supervised fine-tuning (trainer: sft)",
    "chosen": "a preference dataset, for reward models and DPO",
    "rejected": "a preference dataset, for reward models and DPO",
    "messages": "a language-modelling dataset, for supervised fine-tuning (trainer: sft)",
}
# What TRL hands every reward beside the dataset's columns: a column of that name would clash with
# it, or never arrive.
TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
A_PROMPT = "A prompt is a text that is not empty, or a list of messages {role, content}."
NEXT_STEP = "Write the right answers, if there are any, into another column, such as 'answer'."


def check_prompt_only(dataset: "Dataset | IterableDataset", name: str) -> None:
    """Refuse a dataset that a prompt-only trainer cannot use.

    Every row of a map-style dataset is looked at, and the first row of a streamed one.

    Args:
        dataset: what the trainer would get.
        name: what to call it in the error.

    Raises:
        DataError: if it is no `datasets.Dataset`, is empty, has no `prompt` column, is of another
            type, has a column that TRL's rewards have no room for, or holds a prompt that is
            neither text nor messages, or not what the first one is.
    """
    _check_type(dataset, name)
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"The dataset {name} is empty: it has no row to train on.")
    _check_columns(sorted(dataset.column_names or first), name)
    _check_rows(dataset, first, name)


def _check_type(dataset: Any, name: str) -> None:
    from datasets import Dataset, IterableDataset

    if isinstance(dataset, Dataset | IterableDataset):
        return
    if isinstance(dataset, Mapping):
        step = "Take one of its splits, or Dataset.from_dict(columns)."
    else:
        step = "Dataset.from_list(rows) makes one of a list of rows."
    raise DataError(
        f"{name} is a {type(dataset).__name__}; it must be a datasets.Dataset or a "
        f"datasets.IterableDataset. {step}"
    )


def _check_columns(columns: list[str], name: str) -> None:
    for column, kind in OTHER_TYPES.items():
        # Beside a prompt only `completion` is in the way; TRL hands the others to the rewards.
        if column in columns and (column == "completion" or "prompt" not in columns):
            raise DataError(
                f"The dataset {name} has the column {column!r}, which makes it {kind}. Columns: "
                f"{', '.join(columns)}. This trainer samples completions itself and needs prompts "
                f"only. {NEXT_STEP}"
            )
    if "prompt" not in columns:
        close = difflib.get_close_matches("prompt", columns, n=1)
        hint = f" Did you mean to rename {close[0]!r}?" if close else ""
        raise DataError(
            f"The dataset {name} has no column 'prompt'; its columns are {', '.join(columns)}."
            f"{hint} A prompt is a text, or a list of messages with role and content."
        )
    taken = [column for column in columns if column in TAKEN]
    if taken:
        raise DataError(
            f"The dataset {name} has the column {taken[0]!r}: TRL hands every reward something of "
            "its own under that name. Rename the column, as with "
            f"dataset.rename_column({taken[0]!r}, 'my_{taken[0]}')."
        )


def _check_rows(dataset: "Dataset | IterableDataset", first: dict[str, Any], name: str) -> None:
    prompts = dataset["prompt"] if hasattr(dataset, "__len__") else [first["prompt"]]
    for index, prompt in enumerate(prompts):
        wrong = _wrong_with(prompt)
        if wrong:
            raise DataError(
                f"The dataset {name}, row {index}: the prompt {_short(prompt)} {wrong}. {A_PROMPT}"
            )
        if isinstance(prompt, str) != isinstance(first["prompt"], str):
            kinds = ("a text", "a list of messages")
            this, other = kinds if isinstance(prompt, str) else kinds[::-1]
            raise DataError(
                f"The dataset {name}, row {index}: the prompt {_short(prompt)} is {this}, and that "
                f"of row 0 is {other}. Write all prompts of a dataset in one way."
            )


def _wrong_with(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return None if prompt else "is empty"
    if not isinstance(prompt, list):
        return f"is a {type(prompt).__name__}"
    if not prompt:
        return "is empty"
    return next(filter(None, map(_wrong_with_message, prompt)), None)


def _wrong_with_message(message: Any) -> str | None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return "has a message without role and content"
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        return f"has a message whose role is {role!r}, which is no text"
    # A turn that only calls tools says nothing.
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return None
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") for p in content):
        return None
    return (
        f"has a message whose content is {_short(content)}; it must be a text, or a list of parts "
        "such as {'type': 'text', 'text': ...}"
    )


def _short(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_datasets(train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse what has no prompts; an evaluation set may be several by name, as in TRL.

    Raises:
        DataError: as `check_prompt_only`.
    """
    several = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    named = {f"eval_dataset {name}".strip(): dataset for name, dataset in several.items()}
    for name, dataset in ({"train_dataset": train_dataset} | named).items():
        if dataset is not None:
            check_prompt_only(dataset, name)


def check_size(prompts: int, generation_batch_size: int, num_generations: int) -> None:
    """A generation batch takes whole groups of different prompts; TRL drops what does not fill one.

    Raises:
        DataError: if no step could be taken.
    """
    needed = generation_batch_size // num_generations
    if prompts < needed:
        raise DataError(
            f"The train dataset has {prompts} prompts, and one generation batch takes {needed} "
            f"(generation_batch_size {generation_batch_size} / num_generations "
            f"{num_generations}): no step could be taken. Give more prompts, a larger "
            "num_generations, or a smaller per_device_train_batch_size, "
            "gradient_accumulation_steps or steps_per_generation."
        )
