"""Held-out accuracy of a reward model before and after training, for the terminal."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

# `eval_accuracy`, or `eval_NAME_accuracy` of one of several evaluation sets.
_ACCURACY = re.compile(r"eval_(.+_)?accuracy")


def accuracy_table(logs: Sequence[Mapping[str, Any]], eval_dataset: Any) -> str:
    """The share of held-out pairs that are ordered as the raters did, before and after.

    Args:
        logs: of the run, as `trainer.state.log_history`, each with its `step`.
        eval_dataset: of the trainer, for its number of rows.

    Returns:
        A table for the terminal; empty where there is no evaluation before training or none after.
    """
    compared = {}
    for name in dict.fromkeys(name for log in logs for name in log if _ACCURACY.fullmatch(name)):
        found = [log for log in logs if name in log]
        if found[0]["step"] == 0 < found[-1]["step"]:
            compared[name] = found[0][name], found[-1][name], found[-1]["step"]
    if not compared:
        return ""
    width = max(map(len, compared)) - len("eval_")
    lines = ["Held-out comparisons, which training never saw"]
    lines.append(f"  {'':{width}}   before    after     gain")
    for name, (before, after, _) in compared.items():
        shown = name.removeprefix("eval_")
        lines.append(f"  {shown:{width}}  {before:7.3f}  {after:7.3f}  {after - before:+7.3f}")
    step = max(step for _, _, step in compared.values())
    counted = hasattr(eval_dataset, "__len__") and not isinstance(eval_dataset, Mapping)
    rows = f"on {len(eval_dataset)} rows; " if counted else ""
    return "\n".join([*lines, f"  {rows}after = step {step}"])
