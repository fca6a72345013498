"""The head of a reward model with an adapter: trained, in float32, and saved."""

import copy
from typing import Any

from peft import PeftModel, TaskType
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from trl_ext.errors import ConfigError


def with_head(peft_config: Any) -> Any:
    """An adapter's config for a model whose head is new: peft then trains and saves the head.

    Raises:
        ConfigError: if it is for another task than a causal language model's or a classifier's.
    """
    task = getattr(peft_config, "task_type", None)
    if peft_config is None or task == TaskType.SEQ_CLS:
        return copy.deepcopy(peft_config)  # peft adds the head to a list of the config's
    if task not in (None, TaskType.CAUSAL_LM):
        raise ConfigError(
            f"The adapter's task_type is {str(task)!r}; a reward model is a sequence classifier. "
            "Use task_type='SEQ_CLS' (lora_task_type in a recipe)."
        )
    own = copy.deepcopy(peft_config)
    own.task_type = TaskType.SEQ_CLS
    return own


def keep_head(model: PeftModel) -> None:
    """Train and save the head in float32, whatever the states are that it reads.

    A step of a head in bfloat16 may round to nothing, and so do differences of the rewards. TRL
    makes it bfloat16 beside quantised weights, where it would not fit float32 states.

    Raises:
        ConfigError: if it would not be saved, and the adapter be opened again with a random one.
    """
    heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    for head in heads:
        for module in head.modules_to_save.float().values():
            module.register_forward_pre_hook(_in_float32)
    if heads:
        return
    heads = [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 1
    ]
    raise ConfigError(
        "The adapter does not train and save the model's head, which turns hidden states into a "
        "reward: opened again, it would judge by random numbers. Give modules_to_save in the LoRA "
        f"config (lora_modules_to_save in a recipe), here {heads or 'the name of its module'}."
    )


def _in_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.float() for each in inputs)
