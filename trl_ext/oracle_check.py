"""Train policy trainers side by side on a language that can be enumerated, and measure exactly.

The policy is one table of logits. Reference, reward, β, completions and schedule are the same for
all; what differs is the trainer. The completions are sampled; what is reported of a policy is not:
every completion is counted with its probability.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from trl_ext.errors import ConfigError
from trl_ext.oracle import (
    Enumeration,
    TabularLM,
    TabularLMConfig,
    expected_reward,
    gibbs_logps,
    kl_divergence,
    regularised_reward,
    tabular_tokenizer,
)
from trl_ext.oracle.prefixes import END
from trl_ext.registry import TRAINERS
from trl_ext.trl_adapter import PolicyTrainer, end_training

# 15 completions of one prompt; the table of the reference is drawn below, from a seed of its own.
SHAPE = TabularLMConfig(vocab_size=3, max_completion_length=3, initializer_range=0.0)
COMPLETIONS = 256  # a rollout, one group
CLOSE = 1e-2  # nats of KL(π‖π*)
EVERY = 2  # rollouts between two looks at the policy
_REFERENCE_SD = 0.7

# What a trainer needs for π* to be its fixed point, and learning rates that suit 300 rollouts.
SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {
        "learning_rate": 0.05,
        "kl_estimator": "k1",
        "kl_placement": "reward",
        "kl_is_correction": False,
        "scale_rewards": "none",
        "loss_type": "luspo",
    },
    "reinforce": {"learning_rate": 0.05, "loss_type": "luspo"},
    "ppo": {
        "learning_rate": 0.05,
        "critic_learning_rate": 0.1,
        "num_iterations": 2,
        "whiten_advantages": False,
        "loss_type": "luspo",
    },
    "rwr": {"learning_rate": 0.05, "reference": "fixed"},
}

_COMMON: dict[str, Any] = {
    "learning_rate": 0.05,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.0,
    "num_generations": COMPLETIONS,
    "per_device_train_batch_size": COMPLETIONS,
    "max_completion_length": SHAPE.max_completion_length,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "report_to": "none",
    "save_strategy": "no",
}


def reward_of(prompt: int, completion: list[int]) -> float:
    """Arbitrary but fixed: the 15 completions have distinct values in [0, 4], evenly spread."""
    number = 0
    for token in completion:
        number = number if token == END else (SHAPE.vocab_size - 1) * number + token
    golden_ratio = 0.6180339887498949
    return 4 * ((number + 1) * golden_ratio % 1)


@dataclass(frozen=True)
class Measured:
    """What enumeration says of a policy.

    Attributes:
        kl: KL(π‖π*), nats.
        reward: E_π[r].
        objective: E_π[r] − β·KL(π‖π_ref), of which π* has the most.
        probabilities: completion -> π(y).
    """

    kl: float
    reward: float
    objective: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Run(Measured):
    """A trained policy, and what it took.

    Attributes:
        seed: of the sampling.
        completions: how many were sampled.
        gradient_steps: how many were taken.
        completions_until_close: how many had been sampled when KL(π‖π*) was first seen below
            `CLOSE`; None if it never was. Looked at every `EVERY` rollouts and at the end.
    """

    seed: int
    completions: int
    gradient_steps: int
    completions_until_close: int | None

    @property
    def converged(self) -> bool:
        """Whether it ended near π*; a NaN did not."""
        return self.kl < CLOSE


@dataclass(frozen=True)
class Result:
    """A trainer's runs, one a seed."""

    trainer: str
    runs: list[Run]


class Problem:
    """The reference, the reward and β, and what enumeration says of a policy on them.

    Args:
        beta: β > 0, in units of the reward.
    """

    def __init__(self, beta: float):
        self.beta = beta
        self.space = Enumeration(SHAPE)
        self.rewards = self.space.rewards(reward_of)
        generator = torch.Generator().manual_seed(0)
        shape = (SHAPE.num_prompts, SHAPE.num_prefixes, SHAPE.vocab_size)
        self.ref_table = _REFERENCE_SD * torch.randn(shape, generator=generator)
        self.ref_logps = self.space.logps(self.ref_table)
        self.target = gibbs_logps(self.ref_logps, self.rewards, beta)
        tokenizer = tabular_tokenizer(SHAPE.vocab_size)
        self.names = tokenizer.batch_decode(self.space.tokens, skip_special_tokens=True)

    def distance(self, logps: Tensor) -> float:
        """KL(π‖π*), nats, of completions (1, N)."""
        return kl_divergence(logps, self.target).item()

    def measured(self, logps: Tensor) -> Measured:
        """What there is to say of a policy with these log-probabilities (1, N)."""
        return Measured(
            kl=self.distance(logps),
            reward=expected_reward(logps, self.rewards).item(),
            objective=regularised_reward(logps, self.ref_logps, self.rewards, self.beta).item(),
            probabilities=dict(zip(self.names, logps.exp()[0].tolist(), strict=True)),
        )

    def save_reference(self, folder: Path) -> str:
        """The policy before training on disk: TRL reads its reference from there."""
        TabularLM(SHAPE).load_table(self.ref_table).save_pretrained(folder)
        tabular_tokenizer(SHAPE.vocab_size).save_pretrained(folder)
        return str(folder)


def load_trainer(name: str) -> type[PolicyTrainer]:
    """The class that a trainer's name stands for.

    Raises:
        TrlExtError: if there is none, or if it is no `PolicyTrainer`.
    """
    loaded = TRAINERS.load(name)
    if isinstance(loaded, type) and issubclass(loaded, PolicyTrainer):
        return loaded
    what = getattr(loaded, "__qualname__", None) or f"an object of type {type(loaded).__name__}"
    raise ConfigError(
        f"--trainer {name}: {what} is no trl_ext PolicyTrainer. The check trains on completions "
        "that the policy samples and a reward scores, with β·KL to a reference. Name one of "
        f"{', '.join(SETTINGS)}, or your own class derived from trl_ext.trl_adapter.PolicyTrainer."
    )


def settings_of(name: str, trainer_class: type[PolicyTrainer]) -> dict[str, Any]:
    """The options of a trainer: those of the built-in one that it is or derives from, or none."""
    if name in SETTINGS:
        return SETTINGS[name]
    derived = (SETTINGS[n] for n in SETTINGS if issubclass(trainer_class, load_trainer(n)))
    return next(derived, {})


def check(
    problem: Problem,
    names: list[str],
    *,
    seeds: int,
    rollouts: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Train each trainer with each seed.

    Args:
        problem: what they train on.
        names: of trainers, as a recipe has them.
        seeds: how many: 0, 1, ….
        rollouts: of `COMPLETIONS` each, in a run.
        say: is told what begins.

    Raises:
        TrlExtError: if a trainer is none that can be checked; nothing is trained then.
    """
    classes = {name: load_trainer(name) for name in names}
    results = []
    with tempfile.TemporaryDirectory() as folder, _quiet():
        start = problem.save_reference(Path(folder) / "reference")
        for name, trainer_class in classes.items():
            runs = []
            for seed in range(seeds):
                say(f"{name}, seed {seed} …")
                options = settings_of(name, trainer_class) | {"beta": problem.beta, "seed": seed}
                runs.append(_trained(trainer_class, options, problem, start, rollouts))
            results.append(Result(name, runs))
    return results


def record(problem: Problem, results: list[Result]) -> dict[str, Any]:
    """The results as JSON has them, with the problem, so that each number can be computed again."""
    return {
        "beta": problem.beta,
        "completions_a_rollout": COMPLETIONS,
        "close": CLOSE,
        "rewards": dict(zip(problem.names, problem.rewards[0].tolist(), strict=True)),
        "gibbs": asdict(problem.measured(problem.target)),
        "reference": asdict(problem.measured(problem.ref_logps)),
        "trainers": [asdict(result) for result in results],
    }


def _trained(
    trainer_class: type[PolicyTrainer],
    options: dict[str, Any],
    problem: Problem,
    start: str,
    rollouts: int,
) -> Run:
    watch = _Watch(problem)
    chosen: dict[str, Any] = _COMMON | options
    args = trainer_class.config_class(f"{start}-trained", **chosen)
    args.max_steps = rollouts * args.num_iterations
    trainer = trainer_class(
        model=start,
        reward_funcs=watch.reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 512}),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logps = problem.space.logps(_table(trainer.model))
    end_training(trainer)
    measured = problem.measured(logps)
    if watch.close_at is None and measured.kl < CLOSE:
        watch.close_at = watch.sampled
    return Run(
        **vars(measured),
        seed=args.seed,
        completions=watch.sampled,
        gradient_steps=trainer.state.global_step,
        completions_until_close=watch.close_at,
    )


class _Watch(TrainerCallback):
    """Scores what is sampled, counts it, and looks at the policy every few rollouts."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.sampled = 0
        self.close_at: int | None = None

    def reward(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        self.sampled += len(completion_ids)
        return [reward_of(1, completion) for completion in completion_ids]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # At the same numbers of completions, whatever steps a trainer takes on them.
        if self.close_at is None and state.global_step % (EVERY * args.num_iterations) == 0:
            logps = self.problem.space.logps(_table(model))
            if self.problem.distance(logps) < CLOSE:
                self.close_at = self.sampled


def _table(model: Any) -> Tensor:
    """The policy's logits (1, R, V): a forward pass would set off the hooks of a critic."""
    return model.model.table.weight.detach()[None]


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no warnings of libraries about a model and options that no user gave."""
    bars = transformers_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("transformers", "trl")]
    levels = [logger.level for logger in loggers]
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|trl|torch|accelerate)(\.|$)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
