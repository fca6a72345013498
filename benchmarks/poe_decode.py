"""Tokens per second and peak memory of decoding from a product of experts.

Cases, all of SmolLM2-135M's size, 8 prompts, sampled:
- single: the model alone, transformers' generate;
- product of one: the same as a ProductOfExperts of weight 1;
- adapters, 2 or 3: the base and LoRA adapters (rank 16, all linear layers) in one mixed batch;
- models, 2: two models of their own, one after the other in each step;
- guidance: transformers' classifier-free guidance, two passes of one model in each step, the
  nearest that it offers (its second pass has another prompt, not other weights).

Speed: all cases in one process, in turn, there and back again; ratios to "single" are taken within
a repetition. Memory: each case in a process of its own, what the process held at most while it
generated, less what it held before a model was loaded. "budget" is what the single model took plus
the adapters' weights and the further key-value caches.

    python benchmarks/poe_decode.py [--repeats 5] [--new-tokens 64] [--dtype float32] [--random]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _memory import forget_peak, peak
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from trl_ext.bundled import resolve_model
from trl_ext.environment import environment
from trl_ext.poe import Adapter, ProductOfExperts

RESULTS = Path(__file__).parent / "results" / "poe_decode.json"
MODEL = "bundled:smollm2-135m-instruct"
BATCH, PROMPT, RANK = 8, 16, 16
SINGLE, ONE, TWO, THREE, APART, GUIDANCE = (
    "single",
    "product of one",
    "adapters, 2",
    "adapters, 3",
    "models, 2",
    "guidance",
)
CASES = (SINGLE, ONE, TWO, THREE, APART, GUIDANCE)
EXPERTS = {SINGLE: 1, ONE: 1, TWO: 2, THREE: 3, APART: 2, GUIDANCE: 2}
# As benchmarks/kl_memory.py: freed tensors go back to the system.
CHILD = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


class Bench:
    """The prompts, and what generates in each case."""

    def __init__(self, new_tokens: int, dtype: str, random: bool):
        torch.manual_seed(0)
        self.new_tokens, self.dtype, self.random = new_tokens, getattr(torch, dtype), random
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.path = "" if random else resolve_model(MODEL)
        self.ids = torch.randint(100, 40_000, (BATCH, PROMPT), device=self.device)

    def load(self) -> Any:
        """One model."""
        if self.path:
            model: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype)
        else:
            model = AutoModelForCausalLM.from_config(_random_config(), dtype=self.dtype)
        return model.to(self.device).eval()

    def adapted(self, adapters: int) -> PeftModel:
        """A model with LoRA adapters of random weights, named 1, 2, …"""
        lora = {"r": RANK, "lora_alpha": 1, "target_modules": "all-linear"}
        config = LoraConfig(**lora, init_lora_weights=False)
        model = get_peft_model(self.load(), config, "1")
        for name in range(2, adapters + 1):
            model.add_adapter(str(name), config)
        return model.to(self.device).eval()

    def generator(self, case: str) -> Callable[[], Any]:
        """What generates all tokens of the batch when called."""
        if case == APART:
            model = ProductOfExperts([self.load(), self.load()], [0.5, 0.5])
        elif case in (TWO, THREE):
            adapters = EXPERTS[case] - 1
            peft_model = self.adapted(adapters)
            names = [None, *map(str, range(1, adapters + 1))]
            experts = [Adapter(peft_model, name) for name in names]
            model = ProductOfExperts(experts, [1 / len(names)] * len(names))
        else:
            model = self.load()
            model = ProductOfExperts([model], [1.0]) if case == ONE else model
        guided = {"guidance_scale": 1.5, "negative_prompt_ids": self.ids.flip(1)}
        options: dict[str, Any] = guided if case == GUIDANCE else {}
        return lambda: model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            do_sample=True,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            **options,
        )


def _random_config() -> Any:
    return AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=2,
    )


def speeds(bench: Bench, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each case, one a repetition."""
    run = {case: bench.generator(case) for case in CASES}
    for case in CASES:
        run[case]()
    found: dict[str, list[float]] = {case: [] for case in CASES}
    for repeat in range(repeats):
        for case in CASES[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            run[case]().sum().item()  # waits for the device
            found[case].append(BATCH * bench.new_tokens / (time.perf_counter() - start))
    return found


def memory(bench: Bench, case: str) -> dict[str, float]:
    """MB held at most in this process while it generates, and what the parts take."""
    before = forget_peak()
    run = bench.generator(case)
    forget_peak()
    run()
    most = peak()
    config = _random_config() if bench.random else AutoConfig.from_pretrained(bench.path)
    head = config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    length = PROMPT + bench.new_tokens
    cache = BATCH * length * per_token * torch.finfo(bench.dtype).bits // 8
    lora = 0
    if case in (TWO, THREE):
        adapter = bench.adapted(EXPERTS[case] - 1)
        parts = [p for name, p in adapter.named_parameters() if "lora_" in name]
        lora = sum(p.numel() * p.element_size() for p in parts)
    parts_of = {"peak_mb": most - before, "cache_mb": cache, "lora_mb": lora}
    return {name: size / 2**20 for name, size in parts_of.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--random", action="store_true", help="random weights of the same shape")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench = Bench(options.new_tokens, options.dtype, options.random)
    if options.memory_of:
        print(json.dumps(memory(bench, options.memory_of)))
        return
    held = {case: _memory_in_a_fresh_process(case) for case in CASES}
    found = speeds(bench, options.repeats)
    _print(found, held)
    record = {
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "batch": BATCH,
        "prompt_tokens": PROMPT,
        "torch_threads": torch.get_num_threads(),
        "environment": environment(),
        "tokens_per_second": found,
        "memory": held,
    }
    options.output.write_text(json.dumps(record, indent=2, default=str) + "\n")
    print(f"Written to {options.output}")


def _memory_in_a_fresh_process(case: str) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--memory-of", case]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=CHILD)
    return json.loads(run.stdout.splitlines()[-1])


def _print(found: dict[str, list[float]], held: dict[str, dict[str, float]]) -> None:
    """A markdown table: medians, ratios to the single model (smallest–largest)."""
    print("| case | tokens/s | × single | × single/experts | peak MB | budget MB | peak/budget |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    alone = held[SINGLE]["peak_mb"]
    for case in CASES:
        ratios = [a / b for a, b in zip(found[case], found[SINGLE], strict=True)]
        middle = statistics.median(ratios)
        more = (EXPERTS[case] - 1) * held[case]["cache_mb"] + held[case]["lora_mb"]
        peak_mb = held[case]["peak_mb"]
        print(
            f"| {case} | {statistics.median(found[case]):.0f} "
            f"| {middle:.2f} ({min(ratios):.2f}–{max(ratios):.2f}) | {middle * EXPERTS[case]:.2f} "
            f"| {peak_mb:.0f} | {alone + more:.0f} | {peak_mb / (alone + more):.2f} |"
        )


if __name__ == "__main__":
    main()
