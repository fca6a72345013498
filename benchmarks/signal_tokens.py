"""Training phase of the same rollouts: `GRPOTrainer` here against `trl.GRPOTrainer`, in turn.

Rollouts are replayed, so that nothing is generated: a grid over the lengths of completions, of
prompts, and the share of groups whose rewards are all equal. Each cell has its own model from one
seed; repetitions run the two in turn, and the ratio is taken repetition by repetition. The floor is
the completion tokens of groups with signal, with their prompts once.

    python benchmarks/signal_tokens.py [--repeats 3] [--rows 64] [--cells prototype]
        [--whole-step] [--output signal_tokens.json]

`--whole-step` times whole steps instead, with generation, of the bundled model on sums. With a GPU
the grid takes a random-weight model of 0.5B parameters in bfloat16.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _memory import forget_peak, peak
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from step_time import Clock
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from trl import GRPOConfig as TRLGRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from trl_ext import GRPOConfig, GRPOTrainer
from trl_ext.bundled import resolve_model
from trl_ext.environment import environment
from trl_ext.tasks import load_splits

RESULTS = Path(__file__).parent / "results"
CLASSES: dict[bool, tuple[Any, Any]] = {
    False: (TRLGRPOConfig, TRLGRPOTrainer),
    True: (GRPOConfig, GRPOTrainer),
}
GROUP, CAP, ROWS_AT_ONCE = 8, 512, 16
# Completion lengths in tokens: of one length; as answers are; as reasoning is; cut off or not.
LENGTHS = {
    "constant 128": lambda generator: 128,
    "log-normal 30": lambda generator: _log_normal(30, 0.5, generator),
    "log-normal 100": lambda generator: _log_normal(100, 0.8, generator),
    "two modes": lambda generator: _two_modes(generator),
}
PROMPTS = {"short": (16, 24), "middle": (50, 70), "long": (220, 280)}
UNIFORM = (0.0, 0.25, 0.5, 0.75)


class Cell(NamedTuple):
    """What the rollouts of one cell are like."""

    lengths: str
    prompts: str
    uniform: float


PROTOTYPE = Cell("log-normal 100", "middle", 0.5)
GRID = [
    Cell(lengths, prompts, share) for lengths in LENGTHS for prompts in PROMPTS for share in UNIFORM
]


def _log_normal(median: float, sigma: float, generator: torch.Generator) -> int:
    drawn = median * torch.exp(sigma * torch.randn((), generator=generator)).item()
    return int(min(max(drawn, 1), CAP))


def _two_modes(generator: torch.Generator) -> int:
    """Three in four end after some 60 tokens, one is cut off."""
    if torch.rand((), generator=generator) < 0.25:
        return CAP
    return _log_normal(60, 0.3, generator)


class Replay:
    """The rollouts of a cell: the same for whoever trains on them."""

    def __init__(self, cell: Cell, rows: int, vocabulary: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        low, high = PROMPTS[cell.prompts]
        groups = rows // GROUP
        self.prompts = [
            _tokens(_between(low, high, generator), vocabulary, generator) for _ in range(groups)
        ]
        self.completions = [
            [_tokens(LENGTHS[cell.lengths](generator), vocabulary, generator) for _ in range(GROUP)]
            for _ in range(groups)
        ]
        self.is_uniform = [group < round(cell.uniform * groups) for group in range(groups)]

    def dataset(self) -> Dataset:
        return Dataset.from_dict({"prompt": [str(group) for group in range(len(self.prompts))]})

    def rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """As TRL's `rollout_func`: the prompts name their groups, whose rows come in order."""
        groups = [int(prompt) for prompt in prompts]
        nth = [groups[:row].count(group) for row, group in enumerate(groups)]
        return {
            "prompt_ids": [self.prompts[group] for group in groups],
            "completion_ids": [self.completions[g][n] for g, n in zip(groups, nth, strict=True)],
            "logprobs": None,
        }

    def reward(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Half of a group is right, or all of it."""
        right = []
        for row, prompt in enumerate(prompts):
            nth = prompts[:row].count(prompt)
            right.append(1.0 if self.is_uniform[int(prompt)] else float(nth % 2))
        return right

    def floor(self) -> int:
        """Tokens that carry signal, each prompt once."""
        mixed = [g for g, is_uniform in enumerate(self.is_uniform) if not is_uniform]
        return sum(len(self.prompts[g]) + sum(map(len, self.completions[g])) for g in mixed)


def _between(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _tokens(number: int, vocabulary: int, generator: torch.Generator) -> list[int]:
    return torch.randint(1, vocabulary, (number,), generator=generator).tolist()


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Tokens of each forward pass with gradient."""
    tokens: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            tokens.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel())

    hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield tokens
    finally:
        hook.remove()


class Runner:
    """One trainer on the rollouts of a cell, step by step."""

    def __init__(self, ours: bool, model: str, replay: Replay, folder: str, bf16: bool):
        config, trainer = CLASSES[ours]
        rows = len(replay.prompts) * GROUP
        self.trainer: Any = trainer(
            model=model,
            reward_funcs=replay.reward,
            args=config(
                folder,
                per_device_train_batch_size=ROWS_AT_ONCE,
                gradient_accumulation_steps=rows // ROWS_AT_ONCE,
                num_generations=GROUP,
                max_completion_length=CAP,
                loss_type="grpo",
                learning_rate=0.0,
                bf16=bf16,
                model_init_kwargs={"dtype": "bfloat16" if bf16 else "float32"},
                use_cpu=not torch.accelerator.is_available(),
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                max_steps=1,
                dataloader_pin_memory=False,
            ),
            train_dataset=replay.dataset(),
            rollout_func=replay.rollout,
        )

    def step(self) -> tuple[float, int, int, torch.Tensor]:
        """Seconds, peak bytes above what was held, tokens, and the gradient of one step."""
        trainer, model = self.trainer, self.trainer.model
        rows = next(iter(trainer.get_train_dataloader()))
        model.train()
        model.zero_grad()
        accumulated = trainer.args.gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = accumulated
        trainer._step, trainer._buffered_inputs = 0, None
        torch.manual_seed(0)
        held = forget_peak()
        with counted(model) as tokens:
            _wait()
            began = time.perf_counter()
            for _ in range(accumulated):
                trainer.training_step(model, rows, None)
            _wait()
            seconds = time.perf_counter() - began
        gradient = torch.cat([p.grad.flatten().float() for p in model.parameters()])
        return seconds, peak() - held, sum(tokens), gradient


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(cell: Cell, rows: int, repeats: int, model: str, vocabulary: int) -> dict[str, Any]:
    """One cell: medians over repetitions, of which the first only warms up."""
    replay = Replay(cell, rows, vocabulary, seed=1)
    bf16 = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        runners = [Runner(ours, model, replay, folder, bf16) for ours in (False, True)]
        steps = [[runner.step() for runner in runners] for _ in range(repeats + 1)][1:]
    theirs, ours = zip(*steps, strict=True)
    ratios = [b[0] / a[0] for a, b in steps]
    error = (ours[0][3] - theirs[0][3]).norm() / theirs[0][3].norm().clamp(min=1e-30)
    tokens, floor = ours[0][2], replay.floor()
    return {
        **cell._asdict(),
        "trl_seconds": statistics.median(step[0] for step in theirs),
        "time": statistics.median(ratios),
        "time_range": [min(ratios), max(ratios)],
        "memory": statistics.median(b[1] for b in ours) / statistics.median(a[1] for a in theirs),
        "trl_tokens": theirs[0][2],
        "tokens": tokens,
        "floor": floor,
        "tokens_over_floor": tokens / floor,
        "floor_of_trl": floor / theirs[0][2],
        "gradient_error": error.item(),
    }


def random_model(folder: str) -> tuple[str, int]:
    """A model with random weights on disk, and the tokens that are drawn for it."""
    torch.manual_seed(0)
    vocabulary = 512
    if torch.cuda.is_available():
        config = AutoConfig.for_model(
            "qwen2",
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    else:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
        )
    config.eos_token_id = config.pad_token_id = 0
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({str(token): token for token in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="0", padding_side="left"
    ).save_pretrained(folder)
    return folder, vocabulary


def whole_step(ours: bool, model: str, prompts: Any, steps: int, seed: int) -> list[float]:
    """Seconds of whole steps, generation included, the first (warm-up) left out."""
    config, trainer = CLASSES[ours]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=8,
            num_generations=GROUP,
            max_completion_length=48,
            max_steps=steps,
            learning_rate=0.0,
            beta=0.0,
            seed=seed,
            use_cpu=not torch.accelerator.is_available(),
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "bfloat16"},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer(
            model=model,
            reward_funcs=_right,
            args=args,
            train_dataset=prompts,
            peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"]),
            callbacks=[clock],
        ).train()
    return clock.seconds


def _right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [
        float(text.strip().startswith(str(a))) for text, a in zip(completions, answer, strict=True)
    ]


def show(cells: list[dict[str, Any]]) -> Table:
    """The cells as a table."""
    table = Table(title="training phase, shares of TRL's")
    for column in (
        "lengths",
        "prompts",
        "uniform",
        "time",
        "(range)",
        "memory",
        "floor",
        "tokens / floor",
        "gradient",
    ):
        table.add_column(column)
    for cell in cells:
        low, high = cell["time_range"]
        table.add_row(
            cell["lengths"],
            cell["prompts"],
            f"{cell['uniform']:.0%}",
            f"{cell['time']:.2f}",
            f"{low:.2f}-{high:.2f}",
            f"{cell['memory']:.2f}",
            f"{cell['floor_of_trl']:.2f}",
            f"{cell['tokens_over_floor']:.3f}",
            f"{cell['gradient_error']:.0e}",
        )
    return table


def main() -> None:
    """Measure the grid, or whole steps, show it and write it down."""
    parser = argparse.ArgumentParser(description="Training phase, against TRL.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--cells", choices=["all", "prototype"], default="all")
    parser.add_argument("--whole-step", action="store_true")
    parser.add_argument("--output", default="signal_tokens.json")
    args = parser.parse_args()
    console = Console(width=120)
    if args.whole_step:
        found: Any = whole_steps(args.repeats)
        console.print(found)
    else:
        cells = [PROTOTYPE] if args.cells == "prototype" else GRID
        with tempfile.TemporaryDirectory() as folder:
            model, vocabulary = random_model(folder)
            found = []
            for cell in cells:
                found.append(measured(cell, args.rows, args.repeats, model, vocabulary))
                console.print(show(found[-1:]))
        console.print(show(found))
    RESULTS.mkdir(exist_ok=True)
    content = {"environment": environment(), "arguments": vars(args), "found": found}
    (RESULTS / args.output).write_text(json.dumps(content, indent=2) + "\n")


def whole_steps(repeats: int) -> dict[str, Any]:
    """Whole steps of the bundled model, TRL's and ours in turn: 64 completions of 8 prompts."""
    prompts, _ = load_splits(
        {
            "dataset_name": "reasoning_gym/chain_sum",
            "dataset_kwargs": {"size": 200, "num_examples": 4, "max_terms": 2, "max_digits": 1},
        }
    )
    model = resolve_model("bundled:smollm2-135m-instruct")
    pairs = [
        [statistics.mean(whole_step(ours, model, prompts, 3, seed)) for ours in (False, True)]
        for seed in range(repeats)
    ]
    ratios = [ours / theirs for theirs, ours in pairs]
    return {
        "trl_seconds": [theirs for theirs, _ in pairs],
        "seconds": [ours for _, ours in pairs],
        "time": statistics.median(ratios),
        "time_range": [min(ratios), max(ratios)],
    }


if __name__ == "__main__":
    main()
