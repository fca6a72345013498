"""What a dataset must look like for a trainer that samples its own completions."""

import difflib
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
NEXT_STEP = "Write the right answers, if there are any, into another column, such as 'answer'."


def check_prompt_only(dataset: "Dataset | IterableDataset", name: str) -> None:
    """Refuse a dataset that a prompt-only trainer cannot use.

    Every row of a map-style dataset is looked at, and the first row of a streamed one.

    Args:
        dataset: what the trainer would get.
        name: what to call it in the error.

    Raises:
        DataError: if it is empty, has no `prompt` column, is of another type, or holds a prompt
            that is neither text nor messages.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"The dataset {name} is empty: it has no row to train on.")
    columns = sorted(dataset.column_names or first)
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
    _check_rows(dataset, first, name)


def _check_rows(dataset: "Dataset | IterableDataset", first: dict[str, Any], name: str) -> None:
    prompts = dataset["prompt"] if hasattr(dataset, "__len__") else [first["prompt"]]
    for index, prompt in enumerate(prompts):
        wrong = _wrong_with(prompt)
        if wrong:
            raise DataError(
                f"The dataset {name}, row {index}: the prompt {_short(prompt)} {wrong}. "
                "A prompt is a text that is not empty, or a list of messages {role, content}."
            )


def _wrong_with(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return None if prompt else "is empty"
    if not isinstance(prompt, list):
        return f"is a {type(prompt).__name__}"
    if not prompt:
        return "is empty"
    for message in prompt:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return "has a message without role and content"
    return None


def _short(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 80 else f"{text[:77]}..."
