"""PPO where FSDP2 shards the policy: what does not go with it, and the critic's own optimizer."""

from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from trl_ext.errors import ConfigError, RunError

OPTIMIZER = "critic_optimizer.pt"
# Options of an optimizer that is made for the layers of one model (GaLore, APOLLO, LOMO).
_OF_ONE_MODEL = {"params", "model", "optimizer_dict"}


def check_sharding(trainer: Any) -> None:
    """Whether a critic can be beside a policy that is spread over processes.

    Raises:
        ConfigError: if not.
    """
    problem = None
    if trainer.is_deepspeed_enabled:
        problem = "DeepSpeed trains one model alone, and PPO a critic beside it. Use FSDP2 "
        problem += "(accelerate_config=fsdp2), which shards the policy, or DDP."
    elif trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        problem = "PPO's critic goes with FSDP2, and this is FSDP1. Set fsdp_version: 2 in the "
        problem += "Accelerate config, or use DDP."
    elif trainer.is_fsdp_enabled:
        problem = _beside_shards(trainer.args)
    if problem is not None:
        raise ConfigError(problem)


def _beside_shards(args: Any) -> str | None:
    """What of these options does not go with a policy in shards, and what to do."""
    if args.critic == "adapter":
        return (
            "critic='adapter' stands on the policy's frozen weights, and FSDP2 has them in shards. "
            "Use critic='head', or critic='model', which is whole on every card."
        )
    if args.fp16:
        return (
            "fp16=True with FSDP2: the critic has an optimizer of its own there, and the gradient "
            "scaler serves one. Use bf16."
        )
    if not args.learning_rate > 0:
        return (
            f"learning_rate={args.learning_rate!r} with FSDP2: the critic follows its schedule, "
            "and it must be greater than 0. Use a small one, or DDP."
        )
    return None


class CriticOptimizer:
    """Trains the critic beside an optimizer that has shards of the policy.

    Accelerate looks up an optimizer's parameters in the model when it shards them, and what saves
    its state does so too; the critic's are in no model. They are whole on every process, and the
    learning rate has the course of the policy's.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        args = trainer.args
        made_by = trainer.optimizer_cls_and_kwargs
        kind, options = made_by or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        is_kind = isinstance(kind, type) and issubclass(kind, Optimizer)
        if not is_kind or _OF_ONE_MODEL & options.keys():
            raise ConfigError(
                f"optim={args.optim!r} is made for the layers of one model, and with FSDP2 PPO's "
                "critic has an optimizer of its own. Use another, such as adamw_torch."
            )
        options = options | {"lr": args.critic_learning_rate}
        self.optimizer = kind(trainer.critic.trained(), **options)

    def step(self) -> None:
        """One step, where the policy's learning rate is in its schedule."""
        args, policys = self.trainer.args, self.trainer.optimizer.param_groups[0]
        course = policys["lr"] / args.learning_rate
        self.optimizer.param_groups[0]["lr"] = args.critic_learning_rate * course
        self.optimizer.step()

    def save(self, checkpoint: Path) -> None:
        """Write its state, one file of a checkpoint."""
        torch.save(self.optimizer.state_dict(), checkpoint / OPTIMIZER)

    def load(self, checkpoint: Path) -> None:
        """Take over what `save` wrote.

        Raises:
            RunError: if there is no such file.
        """
        if not (checkpoint / OPTIMIZER).is_file():
            raise RunError(
                f"{checkpoint} has no {OPTIMIZER}: it was not written by PPO under FSDP2, or the "
                "file is lost. Resume an older checkpoint, or as the run was started."
            )
        state = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state)
