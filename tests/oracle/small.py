"""A policy of 15 completions with an arbitrary reward, on which trainers are judged."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.tiny import QUIET
from trl_ext.oracle import Enumeration, TabularLM, TabularLMConfig, tabular_tokenizer
from trl_ext.trl_adapter import PolicyTrainer

Kind = TypeVar("Kind", bound=PolicyTrainer)

SHAPE = TabularLMConfig(vocab_size=3, max_completion_length=3, initializer_range=0.7)

# One prompt, no clipping, no decay: what an oracle's gradient is compared with.
PLAIN: dict[str, Any] = QUIET | {
    "max_completion_length": SHAPE.max_completion_length,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "max_grad_norm": 0.0,
    "logging_steps": 10**6,
}


def reward_of(prompt: int, completion: list[int]) -> float:
    """Arbitrary but fixed: distinct values in [0, 4] for the 15 completions."""
    return 4 * (sum((token + 1) * 0.37 ** (i + 1) for i, token in enumerate(completion)) % 1.0)


def reward(completion_ids, **kwargs) -> list[float]:
    """`reward_of` as trainers call it."""
    return [reward_of(1, ids) for ids in completion_ids]


def save_reference(folder: Path) -> str:
    """The policy before training, on disk, as TRL wants its reference."""
    torch.manual_seed(1)
    TabularLM(SHAPE).save_pretrained(folder)
    tabular_tokenizer(SHAPE.vocab_size).save_pretrained(folder)
    return str(folder)


def make_trainer(
    kind: type[Kind], start: str, rows: int, callbacks=None, reward_funcs: Any = reward, **options
) -> Kind:
    """A trainer of the policy in `start`: `rows` completions of its prompt in a step, one group."""
    settings: dict[str, Any] = PLAIN | {
        "output_dir": start + "-trained",
        "num_generations": rows,
        "per_device_train_batch_size": rows,
        "loss_type": "luspo",
    }
    return kind(
        model=start,
        reward_funcs=reward_funcs,
        args=kind.config_class(**(settings | options)),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 512}),
        callbacks=callbacks,
    )


def move_away(trainer: PolicyTrainer) -> None:
    """Change the policy, so that its KL to the reference is not 0."""
    torch.manual_seed(2)
    table = trainer.model.model.table.weight
    with torch.no_grad():
        table += 0.6 * torch.randn_like(table)


def every_completion(policy, reference, space: Enumeration) -> dict[str, torch.Tensor]:
    """All completions of the prompt as TRL's rollout of `policy` would hold them."""
    return {
        "completion_ids": space.tokens,
        "completion_mask": space.mask.long(),
        "old_per_token_logps": space.token_logps(policy)[0].detach(),
        "ref_per_token_logps": space.token_logps(reference)[0].detach(),
        "advantages": torch.zeros(len(space)),
    }


class KeepGradients(TrainerCallback):
    """The gradient of every optimizer step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.gradients.append(model.model.table.weight.grad.clone().double())
