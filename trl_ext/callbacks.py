"""What `trl_ext train` adds to a trainer: the record of a run, and an orderly Ctrl-C."""

import math
import signal
import sys
from types import FrameType
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback

from trl_ext.errors import RunError
from trl_ext.record import EVALUATIONS, METRICS, RunRecord
from trl_ext.trl_adapter import PolicyTrainer


class RecordMetrics(TrainerCallback):
    """A line of metrics a log step, and the reward of every held-out completion an evaluation."""

    def __init__(self, record: RunRecord, trainer: Trainer):
        self.record = record
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = {name: _number(value) for name, value in (logs or {}).items()}
        self.record.append(METRICS, {"step": state.global_step, **numbers})

    def on_evaluate(self, args, state, control, **kwargs):
        if isinstance(self.trainer, PolicyTrainer):
            rewards = self.trainer.evaluation_rewards()
            self.record.append(EVALUATIONS, {"step": state.global_step, "rewards": rewards})


class ShortProgress(ProgressCallback):
    """The bar of transformers, with one short line a log step; `metrics.jsonl` has every number."""

    shown = (
        "loss",
        "eval_loss",
        "reward",
        "eval_reward",
        "accuracy",
        "eval_accuracy",
        "rewards/accuracies",
        "eval_rewards/accuracies",
        "rwr/uniform_groups",
        "kl/sequence",
        "entropy",
        "step_time",
    )

    def close(self) -> None:
        """End the bars' lines, so that what is printed next begins a new one."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            named = {name: value for name, value in (logs or {}).items() if name in self.shown}
            numbers = [f"{name} {value:.4g}" for name, value in named.items() if value is not None]
            if numbers:
                self.training_bar.write(f"step {state.global_step}: " + ", ".join(numbers))


class StopOnDivergence(TrainerCallback):
    """A gradient that is no number ends training before it reaches the weights."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise RunError(
                f"The gradient of step {state.global_step + 1} is not finite; the weights are as "
                "they were before it. A lower learning_rate is the usual cure; a reward or a beta "
                "of extreme size is another cause."
            )


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends training after the step under way and saves; the second at once.

    Attributes:
        interrupted: whether training ended that way.
        stepped: whether a step was begun at all.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self.stepped = False
        self._previous: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._previous = signal.signal(signal.SIGINT, self._ask_to_stop)

    def on_step_begin(self, args, state, control, **kwargs):
        self.stepped = True

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # One process may hear of it a step before another; all must stop after the same.
            heard = torch.tensor(float(self.interrupted), device=args.device)
            torch.distributed.all_reduce(heard)
            self.interrupted = heard.item() > 0
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Give Ctrl-C back to whoever had it."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self.restore()
        print(
            "\nCtrl-C: finishing this step and saving a checkpoint. Once more stops at once.",
            file=sys.stderr,
        )


def _number(value: Any) -> Any:
    """JSON has no NaN; a metric that nothing was measured for is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
