"""What would leave the watch nothing to measure."""

import logging
from typing import Any

import torch
from accelerate.utils import is_peft_model

from trl_ext.errors import RewardError
from trl_ext.watch.measures import Completions

logger = logging.getLogger(__name__)

# With fewer, a test over prompts says nothing.
LEAST_PROMPTS = 10


NO_START = (
    "The gold reward is compared with that of the policy before training, which "
    "eval_on_start=False does not evaluate. Set eval_on_start=True. (A resumed run may leave it "
    "out, if its config says resume_from_checkpoint.)"
)
NO_REFERENCE = (
    "the KL to the policy before training is not measured: no reference is loaded. A beta above 0 "
    "(with rwr, log_kl=True) loads one, and a new adapter (peft_config) needs none"
)


def what_is_missing(trainer: Any, kl_budget: float | None) -> list[str]:
    """What a trainer that has just been built lacks for a watch; nothing where all is there.

    Args:
        trainer: a `PolicyTrainer`.
        kl_budget: of the watch, nats per completion, or None.
    """
    found = _wrong_with_prompts(trainer.eval_dataset, trainer.args.eval_strategy)
    args = trainer.args
    # With gold_reward_funcs the config has looked, and a recipe that is resumed unsets it after.
    may_be_unset = args.gold_reward_funcs is not None or args.resume_from_checkpoint
    if not args.eval_on_start and not may_be_unset:
        found.append(NO_START)
    # Whether an adapter begins as its base is known at the first evaluation.
    has_no_reference = trainer.ref_model is None and not is_peft_model(trainer.model)
    if kl_budget is not None and has_no_reference:
        found.append(without_reference(kl_budget))
    return found


def without_reference(kl_budget: float) -> str:
    """What is wrong with a KL budget where there is no reference."""
    return f"A KL budget of {kl_budget:g} cannot be kept: {NO_REFERENCE}."


def _wrong_with_prompts(given: Any, eval_strategy: Any) -> list[str]:
    if given is None or eval_strategy == "no":
        said = "eval_dataset=None" if given is None else "eval_strategy='no'"
        return [
            f"The gold reward is measured on held-out prompts, and with {said} there are none: "
            "give an eval_dataset, and eval_strategy='steps' with eval_steps. In a recipe "
            "dataset_kwargs.eval_size or dataset_test_split makes them."
        ]
    if isinstance(given, dict):
        return [
            "The gold reward is measured on one set of held-out prompts, and eval_dataset has "
            f"{len(given)}: {', '.join(given)}. Give one."
        ]
    if hasattr(given, "__len__") and len(given) < LEAST_PROMPTS:
        return [
            f"eval_dataset has {len(given)} prompts; a test over prompts needs {LEAST_PROMPTS} or "
            "more, and hundreds to see a small fall of the gold reward."
        ]
    return []


def check_gold(seen: Completions, *, is_first: bool) -> None:
    """Whether the gold reward measures anything, and anything else than the proxy.

    Raises:
        RewardError: if it scored nothing.
    """
    gold, proxy = seen.gold_PG, seen.proxy_PG
    assert gold is not None
    if gold.isnan().all():
        raise RewardError(
            f"The gold reward is None for all {gold.numel()} held-out completions: nothing is "
            "measured. Return a number for each, or at least for some."
        )
    varies = len(set(proxy[~proxy.isnan()].tolist())) > 1
    if is_first and varies and torch.equal(gold.nan_to_num(), proxy.nan_to_num()):
        logger.warning(
            "Reward-hacking watch: gold and proxy reward are equal on all %d held-out completions. "
            "If they are one and the same, it measures nothing held out.",
            gold.numel(),
        )
