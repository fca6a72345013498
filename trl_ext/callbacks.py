"""What `trl_ext train` adds to a trainer: the record, checkpoints that last, an orderly stop."""

import errno
import math
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

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
        if state.is_world_process_zero:
            named = {name: value for name, value in (logs or {}).items() if name in self.shown}
            numbers = [f"{name} {value:.4g}" for name, value in named.items() if value is not None]
            if numbers:
                # The evaluation after training is logged when its bar is closed and gone.
                tqdm.write(f"step {state.global_step}: " + ", ".join(numbers))


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


class DurableCheckpoints(TrainerCallback, ExportableState):
    """A checkpoint is whole and on the disk before it counts as complete; then an older one goes.

    Each process writes its own random state, and transformers marks the checkpoint without waiting
    for the others': resumed from it, a process without one silently draws other numbers. And it
    leaves it to the system when a file reaches the disk: after a power cut the mark of a complete
    checkpoint (`trainer_state.json`) could be there and the weights not. What an earlier, killed
    attempt at a step left is removed before the step is taken again, since its mark would vouch for
    files that are being replaced.
    """

    def __init__(self) -> None:
        self._limit: int | None = None
        self._checkpoint: Path | None = None
        self._saved = -1

    def state(self) -> dict[str, Any]:
        """Nothing; transformers asks for it when all is written but the mark."""
        if self._checkpoint is not None:
            # The processes that write no mark come to `on_save` when their files are written.
            PartialState().wait_for_everyone()
            sync_files(self._checkpoint)
            sync_files(self._checkpoint.parent)
        return {"args": {}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        # The checkpoint of a run without this callback does not name it; transformers looks it up.
        named: Any = state.stateful_callbacks
        named.setdefault(type(self).__name__, {})
        # transformers would remove the older one before the new one's mark is on the disk.
        self._limit, args.save_total_limit = args.save_total_limit, None

    def on_step_begin(self, args, state, control, **kwargs):
        self._checkpoint = Path(args.output_dir or ".") / f"checkpoint-{state.global_step + 1}"
        # No process saves before all have been through this step's gradients.
        if args.should_save and self._checkpoint.exists():
            remove_checkpoint(self._checkpoint)

    def on_epoch_end(self, args, state, control, **kwargs):
        # A stop in the middle of an epoch has saved this step; writing over it could only break it.
        if self._saved == state.global_step:
            control.should_save = False

    def on_save(self, args, state, control, **kwargs):
        self._saved = state.global_step
        if not args.should_save:
            PartialState().wait_for_everyone()
            return
        assert self._checkpoint is not None
        try:
            sync_files(self._checkpoint)
        except OSError:
            remove_checkpoint(self._checkpoint)
            raise
        rotate_checkpoints(
            str(self._checkpoint.parent),
            self._limit,
            state.best_model_checkpoint,
            use_mtime=True,
        )

    def on_train_end(self, args, state, control, **kwargs):
        args.save_total_limit = self._limit


def sync_files(folder: Path) -> None:
    """Wait until a folder and what is in it is on the disk; folders in it only if checkpoints'."""
    is_checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
    inside = folder.rglob("*") if is_checkpoint else (p for p in folder.iterdir() if p.is_file())
    for path in (*inside, folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some file systems have no such call for folders.
            if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
                raise
        finally:
            os.close(descriptor)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; killed in the middle of it, none is left that looks complete."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


class Stopped(KeyboardInterrupt):
    """A signal asked training to end, and it has, with a checkpoint of its last step.

    Attributes:
        signal: which.
    """

    def __init__(self, number: int):
        super().__init__()
        self.signal = signal.Signals(number)


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM ends training after the step under way and saves.

    A second Ctrl-C ends it at once. A second SIGTERM does not: launchers and batch systems both
    send one, and SIGKILL when they lose patience.

    Attributes:
        signal: the number of the signal that ended training; 0: none did.
        stepped: whether a step was begun at all.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.stepped = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._ask_to_stop)

    def on_step_begin(self, args, state, control, **kwargs):
        self.stepped = True

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # One process may hear of it a step before another; all must stop after the same.
            heard = torch.tensor(self.signal, device=args.device)
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
            self.signal = int(heard.item())
        if self.signal:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number in list(self._previous):
            signal.signal(number, self._previous.pop(number))

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            return
        self.signal = number
        once_more = ""
        if number == signal.SIGINT:
            signal.signal(number, self._previous.pop(number))
            once_more = " Once more stops at once."
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(f"\n{name}: finishing this step and saving a checkpoint.{once_more}", file=sys.stderr)


def _number(value: Any) -> Any:
    """JSON has no NaN; a metric that nothing was measured for is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
