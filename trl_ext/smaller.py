"""The same batch in smaller micro-batches, for a run that is out of memory."""

from typing import Any

from trl_ext.recipe import Recipe

# Where fewer rows at a time take less memory. A rollout is generated whole.
BY_MICRO_BATCH = ("score", "train")
# Phase of a run -> the keys of a recipe that its memory depends on.
KEYS = {
    "load": "load_in_4bit=true, dtype=bfloat16, use_peft=true",
    "generate": "fewer gradient_accumulation_steps or num_generations (a rollout is generated "
    "whole), max_completion_length, use_vllm=true",
    "reward": "what the reward functions load",
    "score": "per_device_train_batch_size, max_completion_length",
    "train": "per_device_train_batch_size, gradient_checkpointing=true, max_completion_length "
    "(max_length of logged data), use_peft=true, optim=paged_adamw_8bit",
    "save": "save_only_model=true",
}
# They share out one batch: none of them alone says what is learned.
SHARED_OUT = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
)


def batches_of(settings: dict[str, Any]) -> dict[str, int]:
    """The micro-batch of a recipe's settings, and how many make a step and a rollout."""
    rows, steps = (settings.get(key) for key in SHARED_OUT[:2])
    found = {SHARED_OUT[0]: 8 if rows is None else rows, SHARED_OUT[1]: steps or 1}
    rollout = settings.get("steps_per_generation")
    return found if rollout is None else found | {SHARED_OUT[2]: rollout}


def smaller_batches(recipe: Recipe) -> dict[str, int] | None:
    """Settings with half the rows in a micro-batch and twice as many of them.

    An odd number of rows goes to its largest divisor.

    Returns:
        None where a micro-batch is one row already.
    """
    known = {key: value for key, value in recipe.defaults().items() if key in SHARED_OUT}
    now = batches_of(known | recipe.values)
    rows = now.pop("per_device_train_batch_size")
    if rows == 1:
        return None
    times = next(n for n in range(2, rows + 1) if rows % n == 0)
    return {
        "per_device_train_batch_size": rows // times,
        **{key: steps * times for key, steps in now.items()},
    }


def is_same_batch(began: dict[str, Any], goes_on: dict[str, Any]) -> bool:
    """Whether two recipes' settings differ in how they share out a batch, not in the batch."""
    batches = []
    for settings in (began, goes_on):
        rows, *steps = batches_of(settings).values()
        batches.append([rows * each for each in steps])
    return batches[0] == batches[1]
