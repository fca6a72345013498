"""Peak memory and seconds of a policy step with a KL penalty: sampled, over the vocabulary, naive.

The step is what a policy trainer does with a micro-batch: a reference pass without gradient, a
policy pass, the surrogate −A·π/π_old plus β times the KL per token, backward. Random weights of
SmolLM2-135M's shape with fewer layers: the fewer, the larger the LM head's share of the memory and
the harder the comparison. "exact, 4096 at once" is TRL's kernel called once for all tokens.

Each run is a process of its own, warmed up by a step on one row. Those of one repetition follow
each other, there and back again, and ratios are taken within a repetition. "peak" is the high-water
mark of the process during the step, "added" what the step added to the weights held before it.

    python benchmarks/kl_memory.py [--repeats 3] [--layers 4]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from _memory import forget_peak, peak
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trl_ext import vocabulary_kl
from trl_ext.environment import environment
from trl_ext.functional import exact_kl, k3
from trl_ext.vocabulary_kl import Head, exact_kl_of_hidden, hidden_states_of, topk_kl_of_hidden

RESULTS = Path(__file__).parent / "results" / "kl_memory.json"
# Trained weights, prompt tokens, completion tokens. "all": the tied head included, a second model
# is the reference. "lora": adapters, and the model without them is the reference.
WORKLOADS = (("all", 32, 96), ("lora", 32, 96), ("lora", 32, 352))
SAMPLED, EXACT, WHOLE, TOPK, NAIVE = (
    "sampled k3",
    "exact",
    "exact, 4096 at once",
    "top 64",
    "naive full logits",
)
# Tensors above 1 MiB go back to the system when freed: else the mark depends on how the heap is
# fragmented, by hundreds of MB from run to run.
CHILD = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
CASES = (SAMPLED, EXACT, WHOLE, TOPK, NAIVE)
BATCH, BETA, TEMPERATURE, K = 8, 0.04, 1.0, 64


class Step:
    """One policy step on random weights and tokens."""

    def __init__(self, trained: str, prompt: int, completion: int, layers: int):
        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.prompt, self.completion = prompt, completion
        self.policy = self._model(layers)
        self.reference = self.policy
        # What is called: the policy, or the adapted model around it.
        self.outer: Any = self.policy
        if trained == "lora":
            self.outer = get_peft_model(
                self.policy,
                LoraConfig(r=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
            )
        else:
            self.reference = self._model(layers).requires_grad_(False)

    def _model(self, layers: int) -> Any:
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        model: Any = LlamaForCausalLM(config)
        model.to(self.device)
        add_fused_lm_head(model, TEMPERATURE)
        return model

    def run(self, case: str, batch: int) -> float:
        """The loss, after its backward pass."""
        shape = (batch, self.prompt + self.completion)
        ids = torch.randint(self.policy.config.vocab_size, shape, device=self.device)
        if case == SAMPLED:
            logps, kl = self._sampled(ids)
        elif case == NAIVE:
            logps, kl = self._naive(ids)
        else:
            logps, kl = self._of_hidden(ids, case)
        advantages = torch.linspace(-1, 1, batch, device=self.device)[:, None]
        loss = (BETA * kl - advantages * (logps - logps.detach()).exp()).mean()
        loss.backward()
        return loss.item()

    def _as_reference(self) -> AbstractContextManager[None]:
        alone = self.reference is not self.policy
        return nullcontext() if alone else self.outer.disable_adapter()

    def _logps(self, model: Any, ids: Tensor) -> Tensor:
        """(B, T) log-probabilities of the completion, as TRL's trainers compute them."""
        labels = ids.clone()
        labels[:, : self.prompt] = -100
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        return out.log_probs[:, self.prompt - 1 :]

    def _sampled(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), self._as_reference():
            ref_logps = self._logps(self.reference, ids)
        logps = self._logps(self.outer, ids)
        return logps, k3(logps, ref_logps)

    def _of_hidden(self, ids: Tensor, case: str) -> tuple[Tensor, Tensor]:
        predicting = slice(self.prompt - 1, -1)
        with torch.no_grad(), self._as_reference():
            ref_hidden = self.reference.base_model(ids).last_hidden_state[:, predicting]
            ref_head = Head.of(self.reference)
        with hidden_states_of(self.policy) as passes:
            logps = self._logps(self.outer, ids)
        given = (passes[0][:, predicting], Head.of(self.policy), ref_hidden, ref_head)
        alike: Any = {"temperature": TEMPERATURE, "mask": torch.ones_like(logps)}
        if case == TOPK:
            return logps, topk_kl_of_hidden(*given, k=K, **alike)
        if case == WHOLE:
            vocabulary_kl.TOKENS_AT_ONCE = 4096
        return logps, exact_kl_of_hidden(*given, **alike)

    def _naive(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        keep = self.completion + 1
        with torch.no_grad(), self._as_reference():
            ref_logits = self.reference(ids, logits_to_keep=keep).logits[:, :-1]
        logits = self.outer(input_ids=ids, logits_to_keep=keep).logits[:, :-1]
        tokens = ids[:, self.prompt :, None]
        logps = (logits / TEMPERATURE).log_softmax(-1).gather(-1, tokens)[..., 0]
        return logps, exact_kl(logits, ref_logits, temperature=TEMPERATURE)


def measure(case: str, workload: tuple[str, int, int], layers: int) -> dict[str, float]:
    """Bytes and seconds of one step in this process."""
    step = Step(*workload, layers=layers)
    step.run(case, batch=1)
    step.outer.zero_grad()
    held = forget_peak()
    start = time.perf_counter()
    loss = step.run(case, BATCH)  # .item() waits for the device
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": peak() / 2**20,
        "held_mb": held / 2**20,
        "loss": loss,
    }


def _in_a_fresh_process(case: str, workload: tuple[str, int, int], layers: int) -> dict[str, float]:
    asked = json.dumps([case, workload, layers])
    command = [sys.executable, __file__, "--one", asked]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=CHILD)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    tables = {}
    for workload in WORKLOADS:
        runs: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
        for repeat in range(options.repeats):
            for case in CASES[:: -1 if repeat % 2 else 1]:
                runs[case].append(_in_a_fresh_process(case, workload, options.layers))
        tables[_title(workload, options.layers)] = runs
        _print(_title(workload, options.layers), runs)
    record = {
        "options": {"repeats": options.repeats, "layers": options.layers, "batch": BATCH},
        "torch_threads": torch.get_num_threads(),
        "environment": environment(),
        "workloads": tables,
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    print(f"Written to {RESULTS}")


def _title(workload: tuple[str, int, int], layers: int) -> str:
    trained, prompt, completion = workload
    return f"{trained} trained, {layers} layers, {BATCH} rows of {prompt} + {completion} tokens"


def _print(title: str, runs: dict[str, list[dict[str, float]]]) -> None:
    """A markdown table: medians, and ratios to the sampled penalty (smallest–largest)."""
    print(f"\n{title}\n")
    print("| KL | peak MB | ratio | added MB | ratio | s | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for case in CASES:
        cells = [case]
        for value in (_peak_mb, _added_mb, _seconds):
            ours, theirs = ([value(run) for run in runs[each]] for each in (case, SAMPLED))
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
            cells.append(f"{statistics.median(ours):.{2 if value is _seconds else 0}f}")
            cells.append(f"{statistics.median(ratios):.2f} ({spread})")
        print(f"| {' | '.join(cells)} |", flush=True)


def _peak_mb(run: dict[str, float]) -> float:
    return run["peak_mb"]


def _added_mb(run: dict[str, float]) -> float:
    return run["peak_mb"] - run["held_mb"]


def _seconds(run: dict[str, float]) -> float:
    return run["seconds"]


if __name__ == "__main__":
    main()
