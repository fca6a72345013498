"""Peak memory and time of one policy step with a KL penalty: sampled, over the vocabulary, naive.

The step is what a policy trainer does with a micro-batch: a reference pass without gradient, a
policy pass, the surrogate's gradient −A·∇log π plus β times the KL per token, backward. All cases
start from the same random weights of SmolLM2-135M's shape, with fewer layers: the fewer the layers,
the larger the LM head's share, and the harder the comparison. Each run is a process of its own; the
runs of one repetition follow each other, there and back again; ratios are taken within one.

"peak" is the high-water mark of the process, "of the step" what the step added to what was held
before it: both models' weights.

    python benchmarks/kl_memory.py [--repeats 3] [--layers 6] [--lengths 32 96]
"""

import argparse
import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "kl_memory.json"
BASELINE = "sampled k3"
CASES = (
    BASELINE,
    "exact",
    "exact, 4096 tokens at once",
    "top 64",
    "naive full logits",
)
# All weights, tied head included, or adapters on a frozen model that is its own reference.
TRAINED = ("all weights", "LoRA")
BETA, TEMPERATURE, K = 0.04, 1.0, 64


class Step:
    """One policy step on random weights and tokens: `run` leaves gradients."""

    def __init__(self, options: argparse.Namespace):
        import torch
        from peft import LoraConfig, get_peft_model
        from trl.trainer.utils import add_fused_lm_head

        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.policy: Any = _model(options.layers).to(self.device)
        self.reference: Any = self.policy
        add_fused_lm_head(self.policy, TEMPERATURE)
        self.trained: Any = self.policy
        if options.trained == "LoRA":
            self.trained = get_peft_model(self.policy, LoraConfig(r=16, target_modules=["q_proj"]))
        else:
            self.reference = _model(options.layers).to(self.device).requires_grad_(False)
            add_fused_lm_head(self.reference, TEMPERATURE)
        self.prompt, self.completion = options.lengths
        vocabulary = self.policy.config.vocab_size
        shape = (options.batch, self.prompt + self.completion)
        self.ids = torch.randint(vocabulary, shape, device=self.device)
        self.labels = self.ids.clone()
        self.labels[:, : self.prompt] = -100
        self.mask = torch.ones_like(self.ids[:, self.prompt :])
        self.advantages = torch.linspace(-1, 1, options.batch, device=self.device)[:, None]

    def run(self, case: str) -> float:
        """The loss, after its backward pass."""
        from trl_ext import vocabulary_kl

        if "4096" in case:
            vocabulary_kl.TOKENS_AT_ONCE = 4096
        loss_of: Callable[[], Any] = {
            "sampled": self._sampled,
            "naive": self._naive,
            "exact": self._exact,
            "top": self._top,
        }[case.replace(",", "").split()[0]]
        loss = loss_of()
        loss.backward()
        return loss.item()

    def _without_adapter(self) -> Any:
        from contextlib import nullcontext

        return nullcontext() if self.trained is self.policy else self.trained.disable_adapter()

    def _fused(self, model: Any) -> Any:
        """(B, T) log-probabilities of the completion, as TRL's trainers compute them."""
        out = model(input_ids=self.ids, labels=self.labels, fused_lm_head=True)
        return out.log_probs[:, self.prompt - 1 :]

    def _loss(self, logps: Any, kl: Any) -> Any:
        surrogate = -self.advantages * (logps - logps.detach()).exp()
        return (surrogate + BETA * kl).mean()

    def _sampled(self) -> Any:
        import torch

        from trl_ext.functional import k3

        with torch.no_grad(), self._without_adapter():
            ref_logps = self._fused(self.reference)
        logps = self._fused(self.trained)
        return self._loss(logps, k3(logps, ref_logps))

    def _with_hidden(self, divergence: Callable[..., Any], **keywords: Any) -> Any:
        import torch

        from trl_ext.vocabulary_kl import Head, hidden_states_of

        with torch.no_grad(), self._without_adapter():
            ref_hidden = self.reference.base_model(self.ids).last_hidden_state
            ref_head = Head.of(self.reference)
        with hidden_states_of(self.policy) as passes:
            logps = self._fused(self.trained)
        kl = divergence(
            passes[0][:, self.prompt - 1 : -1],
            Head.of(self.policy),
            ref_hidden[:, self.prompt - 1 : -1],
            ref_head,
            temperature=TEMPERATURE,
            mask=self.mask,
            **keywords,
        )
        return self._loss(logps, kl)

    def _exact(self) -> Any:
        from trl_ext.vocabulary_kl import exact_kl_of_hidden

        return self._with_hidden(exact_kl_of_hidden)

    def _top(self) -> Any:
        from trl_ext.vocabulary_kl import topk_kl_of_hidden

        return self._with_hidden(topk_kl_of_hidden, k=K)

    def _naive(self) -> Any:
        import torch

        from trl_ext.functional import exact_kl

        keep = self.completion + 1
        with torch.no_grad(), self._without_adapter():
            ref_logits = self.reference(self.ids, logits_to_keep=keep).logits[:, :-1]
        logits = self.trained(input_ids=self.ids, logits_to_keep=keep).logits[:, :-1]
        tokens = self.ids[:, self.prompt :, None]
        logps = (logits / TEMPERATURE).log_softmax(-1).gather(-1, tokens)[..., 0]
        return self._loss(logps, exact_kl(logits, ref_logits, temperature=TEMPERATURE))


def _model(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Bytes and seconds of one step in this process, after a step that warms it up."""
    import torch

    step = Step(options)
    step.run(options.case)
    step.trained.zero_grad()
    held = _forget_peak()
    start = time.perf_counter()
    loss = step.run(options.case)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = _peak()
    # What the kernel accounts to the process, warm-up included: never below what was read.
    most = max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"peak": peak, "held": held, "peak_ever": most, "seconds": seconds, "loss": loss}


def _forget_peak() -> int:
    """Give freed memory back and start the peak anew; bytes held now."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    return _status("VmRSS")


def _peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
