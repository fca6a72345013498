"""What a checkpoint holds beside TRL's: the rollout under way, KL controller, callbacks."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerState
from trl.trainer.utils import split_tensor_dict

from trl_ext.errors import RunError
from trl_ext.trl_adapter.loss import Loss


class Checkpoints(Loss):
    """Goes on in the middle of a rollout, as if it had never been stopped."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._train_sampler: Any = None
        super().__init__(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers; one that learns process rewards to `process_reward/scorer`."""
        self.phase = "save"
        super().save_model(output_dir, _internal_call)
        if self.process_reward is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            self.process_reward.save(folder / "process_reward")

    def save_policy(self, folder: Path) -> None:
        """Save the policy as `save_model`, and push it nowhere."""
        self.save_model(str(folder), _internal_call=True)

    def restore_callbacks(self, checkpoint: Path) -> None:
        """Load what a checkpoint keeps of the callbacks that have an `extra_state`."""
        # A checkpoint without its file is refused once its rollout is read.
        if os.path.isfile(self._rollout_file(str(checkpoint))):
            kept = self._read_rollout(str(checkpoint)).get("callbacks", {})
            for callback in self._keeping():
                if type(callback).__name__ in kept:
                    callback.load_extra_state(kept[type(callback).__name__])

    def restore_all(self, checkpoint: Path) -> None:
        """Load what `save_model` added to a checkpoint: a trainer's own, and a process reward."""
        self.restore(checkpoint)
        if self.process_reward is not None:
            self.process_reward.restore(checkpoint / "process_reward")

    def _save_rng_state(self, output_dir):
        # A checkpoint may fall between two uses of one rollout; TRL would generate anew on resume.
        super()._save_rng_state(output_dir)
        rollout = {
            "step": self._step,
            "steps_per_generation": self.args.steps_per_generation,
            "num_processes": self.accelerator.num_processes,
            "buffered_inputs": self._unused_rollout(),
            "kl": self.kl.state(),
            "is_spent": self._rollout_is_spent,
            "extra": self.extra_state(),
            "callbacks": {type(each).__name__: each.extra_state() for each in self._keeping()},
            "process_reward": self.process_reward and self.process_reward.state(),
        }
        torch.save(rollout, self._rollout_file(output_dir))
        # The first process now writes the file that marks a checkpoint as complete.
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            if not os.path.isfile(self._rollout_file(checkpoint)):
                raise RunError(
                    f"{checkpoint} has no {os.path.basename(self._rollout_file(checkpoint))}, "
                    "which says how far a rollout has been used and where beta is: it was not "
                    "written by this trainer on as many processes, or a file is lost."
                )
            rollout = self._read_rollout(checkpoint)
            if rollout["num_processes"] != self.accelerator.num_processes:
                raise RunError(
                    f"{checkpoint} was written by {rollout['num_processes']} processes and cannot "
                    f"be resumed by {self.accelerator.num_processes}: each holds its share of a "
                    f"rollout. Set num_processes={rollout['num_processes']}."
                )
            self._take_rollout(rollout)
            self.kl.load_state(rollout["kl"])
            self._rollout_is_spent = rollout["is_spent"]
            self.load_extra_state(rollout["extra"])
            if not self._replaces_loss:
                self.beta = self.kl.beta
            self.restore_all(Path(checkpoint))
            if self.process_reward is not None:
                self.process_reward.load_state(rollout["process_reward"])

    def _take_rollout(self, rollout: dict[str, Any]) -> None:
        """The rollout under way; in smaller micro-batches, if there are more of them now."""
        now = self._steps_per_generation
        then = rollout.get("steps_per_generation", now)
        if now % then:
            raise RunError(
                f"The checkpoint's rollouts are in {then} micro-batches, and cannot be shared out "
                f"to {now}: take a multiple. (per_device_train_batch_size goes down as "
                "gradient_accumulation_steps goes up.)"
            )
        buffered = rollout["buffered_inputs"]
        self._step = rollout["step"] * (now // then)
        self._buffered_inputs = buffered and [
            part for batch in buffered for part in split_tensor_dict(batch, now // then)
        ]

    def _read_rollout(self, checkpoint: str) -> dict[str, Any]:
        # The second CPU process has the device "cpu:1", which torch.load does not know.
        device = self.args.device if self.args.device.type != "cpu" else "cpu"
        return torch.load(self._rollout_file(checkpoint), map_location=device, weights_only=True)

    def _keeping(self) -> list[Any]:
        """The callbacks of which a checkpoint keeps something."""
        return [each for each in self.callback_handler.callbacks if hasattr(each, "extra_state")]

    def _unused_rollout(self) -> list[dict[str, Any]] | None:
        """The buffered micro-batches if a later step still trains on them."""
        return self._buffered_inputs if self._step % self._generate_every else None

    def _rollout_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"rollout_{self.accelerator.process_index}.pt")

    def _load_best_model(self):
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self.restore_all(Path(self.state.best_model_checkpoint))

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        # TRL's sampler draws the order of each epoch from one generator: on resume, draw those of
        # the epochs that are over.
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            self.restore_callbacks(Path(resume_from_checkpoint))
        if self._train_sampler is not None:
            for _ in range(epochs_trained):
                next(iter(self._train_sampler), None)
        return epochs_trained, steps_trained


def load_weights(trainer: Trainer, folder: Path) -> None:
    """Put the weights that a run saved in `folder` in the place of the trainer's own.

    Raises:
        RunError: if there are none, or they do not fit.
    """
    try:
        trainer._load_from_checkpoint(str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"The weights in {folder} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error


def end_training(trainer: Trainer) -> None:
    """End a run of one process or several, after the last use of the trainer.

    The data-parallel wrapper must go before its process group: as its last owner it would wait,
    with Python's lock in hand, for a gloo thread that waits for that lock.
    """
    trainer.accelerator.wait_for_everyone()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.end()


def load_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """The weights and the state of a checkpoint, for a run that has nothing left to train."""
    trainer._load_from_checkpoint(str(checkpoint))
    if isinstance(trainer, Checkpoints):
        trainer.restore_all(checkpoint)
        trainer.restore_callbacks(checkpoint)
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
