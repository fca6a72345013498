"""The longest possible batch, before the first: what does not fit fails in the first minute."""

import copy
import random
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from trl_ext.errors import ConfigError
from trl_ext.trl_adapter.trainer import PolicyTrainer


@dataclass(frozen=True)
class Probe:
    """What the longest batch took.

    Attributes:
        rows: of this process.
        longest: tokens of its longest row; of a policy trainer, of its prompt and completion.
        seconds: of generating, scoring and training on one micro-batch.
        peak_bytes: allocated on the GPU at the worst moment; without one, of the whole process.
        total_bytes: memory of the GPU; None without one.
    """

    rows: int
    longest: int
    seconds: float
    peak_bytes: int
    total_bytes: int | None

    def __str__(self) -> str:
        peak = f"{self.peak_bytes / 2**30:.2f}"
        of = "" if self.total_bytes is None else f" of the GPU's {self.total_bytes / 2**30:.2f}"
        return (
            f"The longest batch fits: {self.rows} rows of up to {self.longest} tokens took "
            f"{self.seconds:.1f} s and {peak}{of} GiB."
        )


class LongestBatchFirst(TrainerCallback):
    """Runs `probe` when training begins, and prints what it took."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        check_can_probe(trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        took = probe(self.trainer)
        if state.is_world_process_zero:
            print(took, file=sys.stderr)


def check_can_probe(trainer: Trainer) -> None:
    """Whether `probe` can leave a trainer as it was.

    Raises:
        ConfigError: if not.
    """
    why = None
    if not isinstance(trainer.train_dataset, Dataset):
        why = "the rows of a stream are not known beforehand. Give a dataset of known length"
    elif trainer.is_deepspeed_enabled:
        why = "DeepSpeed keeps gradients of its own, which a probe would leave behind"
    elif getattr(trainer.args, "process_learning_rate", None) is not None:
        why = "process_learning_rate trains the scorer on each rollout, the longest one too"
    if why is not None:
        raise ConfigError(f"--probe cannot run the longest batch first: {why}. Remove --probe.")


def probe(trainer: Trainer) -> Probe:
    """Train on the longest possible micro-batch, and leave everything as it was.

    A policy trainer generates completions of `max_completion_length` for its longest prompts, and
    scores them with the reward functions; the others take their longest rows. Then one backward
    pass, and the optimizer's states are made and dropped. Parameters, optimizer, random numbers,
    metrics and the rollout under way stay; what the reward functions do elsewhere does not. With
    vLLM its own random numbers go on.

    Raises:
        ConfigError: as `check_can_probe`.
    """
    check_can_probe(trainer)
    running: Any = trainer
    on_gpu = trainer.args.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with _as_it_was(trainer):
        is_policy = isinstance(trainer, PolicyTrainer)
        rows, longest = _longest_prompts(trainer) if is_policy else _longest_rows(trainer)
        batch = rows if is_policy else trainer.data_collator(rows)
        began = time.perf_counter()
        with _whole_completions(trainer) if is_policy else nullcontext():
            while not _has_gradient(trainer):  # a policy trainer may have no rows for some
                running.training_step(running.model_wrapped, batch, _items(batch))
        for optimizer in _optimizers(trainer):
            _make_states(optimizer)
        seconds = time.perf_counter() - began
    if not on_gpu:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Probe(len(rows), longest, seconds, peak, None)
    total = torch.cuda.get_device_properties(trainer.args.device).total_memory
    return Probe(len(rows), longest, seconds, torch.cuda.max_memory_allocated(), total)


def _has_gradient(trainer: Trainer) -> bool:
    model: Any = trainer.model
    return any(parameter.grad is not None for parameter in model.parameters())


def _longest_prompts(trainer: PolicyTrainer) -> tuple[list[dict[str, Any]], int]:
    """This process's rows of a rollout of the longest prompts, and tokens of the longest row."""
    dataset: Any = trainer.train_dataset
    args: Any = trainer.args
    lengths: list[int] = []
    for begin in range(0, len(dataset), 1000):
        prompts = dataset[begin : begin + 1000]["prompt"]
        lengths += [len(ids) for ids in trainer._tokenize_prompts(prompts)[0]]
    wanted = args.generation_batch_size // trainer.group_size
    indices = sorted(range(len(lengths)), key=lambda row: -lengths[row])[:wanted]
    rows = [dict(dataset[index]) for index in indices for _ in range(trainer.group_size)]
    local = args.per_device_train_batch_size * args.steps_per_generation
    first = trainer.accelerator.process_index * local
    return rows[first : first + local], max(lengths) + args.max_completion_length


def _longest_rows(trainer: Trainer) -> tuple[list[dict[str, Any]], int]:
    """The rows that hold the most token ids, a micro-batch of them, and their number."""
    dataset: Any = trainer.train_dataset
    ids = [name for name in dataset.column_names if name.endswith("input_ids") or "_ids" in name]
    if not ids:
        raise ConfigError(
            "--probe cannot run the longest batch first: this trainer makes its tokens while it "
            f"trains (the columns are {', '.join(dataset.column_names)}). Remove --probe."
        )
    lengths = [sum(map(_count, row.values())) for row in dataset.select_columns(ids)]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    rows = [dataset[row] for row in order[: trainer.args.per_device_train_batch_size]]
    return rows, max(lengths)


def _count(value: Any) -> int:
    return sum(map(_count, value)) if isinstance(value, list) else 1


def _items(batch: Any) -> Any:
    """What transformers gives a loss that is divided by the tokens of all micro-batches."""
    labels = batch.get("labels") if isinstance(batch, dict) else None
    return None if labels is None else (labels != -100).sum()


@contextmanager
def _whole_completions(trainer: PolicyTrainer) -> Iterator[None]:
    """No completion ends before `max_completion_length`, or is left out for want of credit."""
    least, args = trainer.max_completion_length, trainer.args
    skips, args.skip_zero_credit = args.skip_zero_credit, False
    mixed, args.min_mixed_groups = args.min_mixed_groups, None
    if trainer.use_vllm:
        vllm = trainer.vllm_generation
        kept, vllm.generation_kwargs = (
            vllm.generation_kwargs,
            vllm.generation_kwargs | {"min_tokens": least},
        )
        yield
        vllm.generation_kwargs = kept
    else:
        kept, trainer.generation_config = (
            trainer.generation_config,
            copy.deepcopy(trainer.generation_config),
        )
        trainer.generation_config.min_new_tokens = least
        yield
        trainer.generation_config = kept
    args.skip_zero_credit, args.min_mixed_groups = skips, mixed


# What trainers count and keep while they train.
_KEPT = (
    "_buffered_inputs",
    "_current_train_step_time",
    "_judged",
    "_logs",
    "_metrics",
    "_prompt_ids",
    "_rollout_is_spent",
    "_step",
    "_total_train_tokens",
    "current_gradient_accumulation_steps",
)


@contextmanager
def _as_it_was(trainer: Trainer) -> Iterator[None]:
    """Afterwards no gradient, number or random state shows that anything was run."""
    anything: Any = trainer
    seen = trainer.state.num_input_tokens_seen
    kept: dict[str, Any] = {
        name: copy.deepcopy(getattr(trainer, name)) for name in _KEPT if hasattr(trainer, name)
    }
    anything.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    policy = trainer if isinstance(trainer, PolicyTrainer) else None
    learned = policy and copy.deepcopy((policy.kl.state(), policy.extra_state()))
    if policy:  # callbacks are told of rollouts that are trained on
        anything._tell = lambda event, **given: None
    with _random_states_kept():
        yield
    if policy and learned:
        del anything._tell
        policy.kl.load_state(learned[0])
        policy.load_extra_state(learned[1])
    anything.model_wrapped.zero_grad(set_to_none=True)
    for optimizer in _optimizers(trainer):
        optimizer.zero_grad(set_to_none=True)
    trainer.state.num_input_tokens_seen = seen
    for name, value in kept.items():
        setattr(trainer, name, value)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numbers)


def _optimizers(trainer: Trainer) -> list[Any]:
    """torch's own: that of the trainer, and of a critic beside a policy in shards."""
    known = (trainer.optimizer, getattr(trainer, "critic_optimizer", None))
    return [getattr(each, "optimizer", each) for each in known if each is not None]


def _make_states(optimizer: Any) -> None:
    """Let a fresh optimizer make its states, with gradients of 0: the parameters stay."""
    if optimizer.state:  # of a checkpoint: they are there
        return
    decays = [group.get("weight_decay") for group in optimizer.param_groups]
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        if decay is not None:
            group["weight_decay"] = 0.0
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.zero_()
    # The scheduler counts the steps of the object's own method.
    type(optimizer).step(optimizer)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        if decay is not None:
            group["weight_decay"] = decay
    optimizer.state.clear()
