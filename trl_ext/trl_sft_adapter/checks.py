"""What would lose a weight, or train on something else than what was sampled."""

import logging
from typing import Any

import pyarrow.compute
from datasets import Dataset

from trl_ext.errors import ConfigError, DataError
from trl_ext.trl_sft_adapter.weights import IGNORED

logger = logging.getLogger(__name__)


def check_rows_stay_whole(plan: Any) -> None:
    """Whether all tokens of a row are on one process, given Accelerate's `ParallelismConfig`.

    Raises:
        ConfigError: if not.
    """
    if plan is not None and (plan.cp_enabled or plan.sp_enabled):
        raise ConfigError(
            "Context and sequence parallelism cut rows, and tokens lose their weights. Use "
            "cp_size=1 and sp_size=1."
        )


def check_same_tokenizer(dataset: Any, tokenizer: Any, rows: int = 8) -> None:
    """Whether the ids of the first rows read, with this tokenizer, as their completions.

    Raises:
        DataError: if not: they are of another tokenizer.
    """
    for number, row in enumerate(dataset.take(rows)):
        text = row["completion"]
        if isinstance(text, list):
            text = text[-1].get("content")
        if not isinstance(text, str):  # a turn that only calls tools
            continue
        ids = row["completion_ids"]
        read = []
        if max([*ids, *row["prompt_ids"]]) < len(tokenizer):
            read = [tokenizer.decode(ids, skip_special_tokens=skip) for skip in (False, True)]
        if not any(text.strip() in one for one in read):
            shown = f"they read {read[0][:80]!r}" if read else "some are out of its vocabulary"
            raise DataError(
                f"Row {number}: its completion_ids are of another tokenizer: with that of the "
                f"model, {tokenizer.name_or_path!r}, {shown}, and the completion is "
                f"{text[:80]!r}. Remove the columns prompt_ids and completion_ids, so that the "
                "texts are tokenised anew."
            )


def attention_of(model: Any) -> str | None:
    return model.config._attn_implementation


def check_predicted(prepared: Dataset, name: str) -> None:
    """Whether the first token of every completion is predicted from something."""
    compute: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers
    first = compute.list_element(prepared.data.column("labels"), 0)
    unpredicted = compute.sum(compute.not_equal(first, IGNORED)).as_py()
    if unpredicted:
        raise DataError(
            f"The {name} dataset: {unpredicted} of {len(prepared)} completions have no token in "
            "front of them, so that nothing predicts their first one. Begin their prompts with "
            "one, such as the tokenizer's end token."
        )


def check_cut(before: int, after: int, max_length: int | None, name: str) -> None:
    """TRL drops rows of which max_length leaves no token of the completion."""
    if not after:
        raise DataError(
            f"The {name} dataset: max_length={max_length} leaves no token of any completion. Raise "
            "max_length."
        )
    if after < before:
        logger.warning(
            "The %s dataset: max_length=%s leaves no token of %d of %d completions. They are "
            "dropped, and the others of their group carry the weight that they have.",
            name,
            max_length,
            before - after,
            before,
        )
