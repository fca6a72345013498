"""The Gibbs scorer against bare forward passes and against Monte-Carlo labelling; prefix caches.

    python benchmarks/prm.py [--parts speed labelling caches] [--repeats 4] [--output prm.json]

speed      tokens/s of `GibbsScorer` and of two bare forward passes (model(ids), logits and all) on
           the same batches, an adapter and its base, in turn. Also the peak memory of each.
labelling  a character model, trained by `trl_ext train rwr/char_reverse`, scores every prefix of
           sampled completions. What is true is estimated from many rollouts; how well the Gibbs
           score orders the prefixes of a prompt is compared with K rollouts a prefix, for the K at
           which both order them equally well: FLOPs (2 x parameters x tokens read) and seconds.
search     the same model and policy: accuracy on held-out prompts against the tokens generated, of
           the best of n by the score, majority voting, and a search that keeps the best prefixes.
caches     rollouts from every prefix of some completions, with the prefix read once and with the
           prefix read for each rollout.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _memory import forget_peak, peak
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.bundled import resolve_model
from trl_ext.cli import main as trl_ext
from trl_ext.environment import environment
from trl_ext.gibbs_prm import GibbsScorer, MonteCarloScorer, StepSearch, accuracy_curve
from trl_ext.gibbs_prm.ranking import agreement
from trl_ext.gibbs_prm.sampling import GenerateSampler
from trl_ext.gibbs_prm.scored import PrefixScores
from trl_ext.models.adapter import Adapter, reading
from trl_ext.models.log_probs import batches_of
from trl_ext.rewards.exact_match import exact_match
from trl_ext.tasks import load_splits

RESULTS = Path(__file__).parent / "results"
MODEL = "bundled:smollm2-135m-instruct"
# Completions that a median of 60 tokens, some of 300, stand for: reasoning of small models.
MEDIAN_LENGTH, SPREAD, LONGEST = 60, 0.8, 300
SAMPLES = 4  # completions of a prompt of labelling
PARTS = ("speed", "labelling", "search", "caches")
SEARCHES = ((1, 2), (1, 4), (2, 2), (2, 4), (4, 4))  # prefixes kept, and extensions of each


def adapted(dtype: torch.dtype) -> Any:
    """The bundled model with a LoRA adapter that says something."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=dtype)
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, lora).eval()


def random_rows(rows: int, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 40 to 80 tokens, completions of log-normal length."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randn(rows, generator=generator).mul(SPREAD).exp().mul(MEDIAN_LENGTH)
    sizes = [max(1, min(LONGEST, round(length))) for length in lengths.tolist()]

    def tokens(size: int) -> list[int]:
        return torch.randint(0, vocabulary, (size,), generator=generator).tolist()

    return [tokens(40 + row * 40 // rows) for row in range(rows)], [tokens(n) for n in sizes]


@torch.no_grad()
def bare(model: Any, adapter: str | None, batches: list[list[int]], rows: list[list[int]]) -> None:
    """A forward pass of each batch, padded on the right as the scorer pads."""
    with reading(Adapter(model, adapter)):
        for batch in batches:
            width = max(len(rows[row]) for row in batch)
            ids = torch.tensor([rows[row] + [0] * (width - len(rows[row])) for row in batch])
            mask = torch.tensor(
                [[1] * len(rows[row]) + [0] * (width - len(rows[row])) for row in batch]
            )
            model(input_ids=ids, attention_mask=mask, use_cache=False)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and peak MB beyond what was held."""
    held = forget_peak()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin, (peak() - held) / 2**20


def speed(repeats: int, num_rows: int, max_tokens: int) -> dict[str, Any]:
    """Tokens/s of the scorer over that of two bare passes, by dtype."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(dtype)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
        prompts, completions = random_rows(num_rows, len(tokenizer))
        scorer = GibbsScorer(model, None, tokenizer, 1.0, max_tokens=max_tokens)
        rows = [p + c for p, c in zip(prompts, completions, strict=True)]
        batches = batches_of(list(map(len, rows)), [True] * len(rows), max_tokens)

        def score(
            scorer: GibbsScorer = scorer, prompts: Any = prompts, completions: Any = completions
        ) -> None:
            scorer.token_log_ratios(prompts, completions)

        def two_passes(model: Any = model, batches: Any = batches, rows: Any = rows) -> None:
            bare(model, "default", batches, rows)
            bare(model, None, batches, rows)

        measured: dict[str, list[tuple[float, float]]] = {"scorer": [], "bare": []}
        score()
        two_passes()
        for repeat in range(repeats):
            ways = [("scorer", score), ("bare", two_passes)]
            for name, work in ways[:: -1 if repeat % 2 else 1]:
                measured[name].append(timed(work))
        ratios = [b[0] / s[0] for s, b in zip(measured["scorer"], measured["bare"], strict=True)]
        found[str(dtype).removeprefix("torch.")] = {
            "tokens": sum(map(len, rows)),
            "completion_tokens": sum(map(len, completions)),
            "scorer_seconds": [s for s, _ in measured["scorer"]],
            "bare_seconds": [s for s, _ in measured["bare"]],
            "scorer_peak_mb": statistics.median(mb for _, mb in measured["scorer"]),
            "bare_peak_mb": statistics.median(mb for _, mb in measured["bare"]),
            "speed_of_scorer_over_bare": ratios,
        }
    return found


class TokensRead:
    """Tokens that a model's backbone has read, padding included."""

    def __init__(self, model: Any):
        self.count = 0
        self._hook = model.base_model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: Any, args: Any, kwargs: Any) -> None:
        self.count += kwargs["input_ids"].numel()

    def close(self) -> int:
        """Stop counting; how many there were."""
        self._hook.remove()
        return self.count


def labelling(policy: str, num_prompts: int, truth_rollouts: int, most: int) -> dict[str, Any]:
    """Agreement with the truth, and cost, of the Gibbs score and of K rollouts a prefix."""
    scorer = GibbsScorer(policy)
    reference: Any = scorer.reference
    _, held_out = load_splits(
        {"dataset_name": "char_reverse", "dataset_kwargs": {"eval_size": num_prompts}}
    )
    assert held_out is not None
    options: dict[str, Any] = {"max_completion_length": 7, "batch_size": 1024}
    sampler = GenerateSampler(reference, scorer.tokenizer, **options)
    ids = [scorer.tokenizer(prompt)["input_ids"] for prompt in held_out["prompt"]]
    sampled = [tokens for behind in sampler.sample(ids, SAMPLES, seed=1) for tokens in behind]
    texts = [scorer.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in sampled]
    prompts, answers = (
        [value for value in held_out[column] for _ in range(SAMPLES)]
        for column in ("prompt", "answer")
    )

    def by_rollouts(count: int, seed: int) -> tuple[list[PrefixScores], dict[str, float]]:
        monte_carlo = MonteCarloScorer(
            reference,
            exact_match,
            scorer.beta,
            count,
            tokenizer=scorer.tokenizer,
            seed=seed,
            **options,
        )
        return costed(
            [reference],
            lambda: monte_carlo.score(
                prompts, texts, "token", completion_ids=sampled, answer=answers
            ),
        )

    truth, _ = by_rollouts(truth_rollouts, seed=2)
    gibbs, cost = costed(
        [reference, scorer.policy],
        lambda: scorer.score(prompts, texts, "token", completion_ids=sampled),
    )
    rows = [{"scorer": "gibbs", **_agreement(gibbs, truth), **cost}]
    for count in [2**k for k in range(1, most.bit_length())]:
        scores, cost = by_rollouts(count, seed=3)
        rows.append({"scorer": "rollouts", "k": count, **_agreement(scores, truth), **cost})
    return {
        "policy": policy,
        "beta": scorer.beta,
        "truth_rollouts": truth_rollouts,
        "completions": len(sampled),
        "prefixes": sum(len(each.prefix_scores) for each in unfinished(truth)),
        "rows": rows,
        "equal": equal(rows),
    }


def costed(
    models: list[Any], work: Callable[[], Any]
) -> tuple[list[PrefixScores], dict[str, float]]:
    """What work gives, its seconds, and its FLOPs: 2 x parameters x tokens read of each model."""
    readers = [(model, TokensRead(model)) for model in models]
    begin = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - begin
    flops = sum(2 * model.num_parameters() * reader.close() for model, reader in readers)
    return found, {"seconds": seconds, "flops": flops}


def unfinished(scores: list[PrefixScores]) -> list[PrefixScores]:
    """Without the last prefix, whose reward a verifier gives to rollouts for nothing."""
    return [
        PrefixScores(
            prompt=each.prompt,
            completion=each.completion,
            steps=each.steps[:-1],
            step_ends=each.step_ends[:-1],
            prefix_scores=each.prefix_scores[:-1],
            beta=each.beta,
        )
        for each in scores
        if len(each.prefix_scores) > 1
    ]


def _agreement(scores: list[PrefixScores], truth: list[PrefixScores]) -> dict[str, Any]:
    found = agreement(unfinished(scores), unfinished(truth))
    return {"kendall_tau_b": found.kendall_tau_b, "interval": found.kendall_interval}


def equal(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The K at which rollouts order as well as the Gibbs score, on a log scale between two K.

    None: the most rollouts measured order worse, or the fewest better.
    """
    gibbs, *others = rows
    wanted = gibbs["kendall_tau_b"]
    for low, high in pairwise(others):
        if low["kendall_tau_b"] <= wanted <= high["kendall_tau_b"]:
            gap = high["kendall_tau_b"] - low["kendall_tau_b"]
            share = (wanted - low["kendall_tau_b"]) / gap if gap else 0.0

            def between(key: str, low: Any = low, high: Any = high, share: float = share) -> float:
                return math.exp((1 - share) * math.log(low[key]) + share * math.log(high[key]))

            return {
                "k": between("k"),
                "flops_ratio": between("flops") / gibbs["flops"],
                "seconds_ratio": between("seconds") / gibbs["seconds"],
            }
    return None


def search(policy: str, num_prompts: int, samples: int) -> dict[str, Any]:
    """Accuracy of the best of n, of a majority and of searches, and the tokens they generate."""
    scorer = GibbsScorer(policy)
    _, held_out = load_splits(
        {"dataset_name": "char_reverse", "dataset_kwargs": {"eval_size": num_prompts}}
    )
    assert held_out is not None
    prompts, answers = list(held_out["prompt"]), list(held_out["answer"])
    sampler = GenerateSampler(
        scorer.reference, scorer.tokenizer, max_completion_length=7, batch_size=1024
    )
    ids = [scorer.tokenizer(prompt)["input_ids"] for prompt in prompts]
    drawn = sampler.sample(ids, samples, seed=1)
    flat = [tokens for group in drawn for tokens in group]
    texts = [scorer.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in flat]
    scored = scorer.score(
        [p for p in prompts for _ in range(samples)], texts, "whole", completion_ids=flat
    )
    table = [list(range(row * samples, (row + 1) * samples)) for row in range(len(prompts))]
    curve = accuracy_curve(
        [[scored[i].score for i in row] for row in table],
        [[texts[i] == answer for i in row] for row, answer in zip(table, answers, strict=True)],
        [[texts[i] for i in row] for row in table],
        [[len(flat[i]) for i in row] for row in table],
        [2**k for k in range(samples.bit_length())],
        beta=scorer.beta,
    )
    searches = []
    for width, expand in SEARCHES:
        results = StepSearch(sampler, scorer, width=width, expand=expand, steps="token").search(
            prompts
        )
        right = [
            scorer.tokenizer.decode(result.ids, skip_special_tokens=True) == answer
            for result, answer in zip(results, answers, strict=True)
        ]
        share = statistics.fmean(right)
        searches.append(
            {
                "width": width,
                "expand": expand,
                "accuracy": share,
                "standard_error": math.sqrt(share * (1 - share) / len(right)),
                "tokens": statistics.fmean(result.cost.tokens_generated for result in results),
            }
        )
    return {
        "prompts": len(prompts),
        "best_of_n": [asdict(row) for row in curve],
        "search": searches,
    }


def caches(repeats: int, num_prefixes: int, rollouts: int, tokens: int) -> dict[str, Any]:
    """Seconds for rollouts from each prefix, with a shared cache and without."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for prompt_length in (64, 256):
        text = torch.randint(1000, 40000, (prompt_length + 120,), generator=generator).tolist()
        ends = [prompt_length + 120 * k // num_prefixes for k in range(num_prefixes)]
        prefixes = [text[:end] for end in ends]
        samplers = {
            share: GenerateSampler(
                model, [0], max_completion_length=tokens, batch_size=32, share=share
            )
            for share in ("prefix", "none")
        }

        def draw(share: str, samplers: Any = samplers, prefixes: Any = prefixes) -> None:
            samplers[share].sample(prefixes, rollouts)

        measured: dict[str, list[tuple[float, float]]] = {"prefix": [], "none": []}
        for repeat in range(repeats):
            for share in ("prefix", "none")[:: -1 if repeat % 2 else 1]:
                measured[share].append(timed(lambda share=share: draw(share)))
        pairs = zip(measured["none"], measured["prefix"], strict=True)
        found[f"prompt of {prompt_length} tokens"] = {
            "shared_seconds": [s for s, _ in measured["prefix"]],
            "naive_seconds": [s for s, _ in measured["none"]],
            "naive_over_shared": [n[0] / s[0] for n, s in pairs],
            "shared_peak_mb": statistics.median(mb for _, mb in measured["prefix"]),
            "naive_peak_mb": statistics.median(mb for _, mb in measured["none"]),
        }
    return found


def span(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(found: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(highlight=False)
    if "speed" in found:
        table = Table("dtype", "tokens/s over two bare passes", "peak MB", "bare", title="speed")
        for dtype, row in found["speed"].items():
            table.add_row(
                dtype,
                span(row["speed_of_scorer_over_bare"]),
                f"{row['scorer_peak_mb']:.0f}",
                f"{row['bare_peak_mb']:.0f}",
            )
        console.print(table)
    if "labelling" in found:
        table = Table("scorer", "K", "tau-b with the truth", "GFLOPs", "seconds", title="labelling")
        for row in found["labelling"]["rows"]:
            low, high = row["interval"]
            table.add_row(
                row["scorer"],
                str(row.get("k", "")),
                f"{row['kendall_tau_b']:.3f} ({low:.3f} to {high:.3f})",
                f"{row['flops'] / 1e9:.1f}",
                f"{row['seconds']:.2f}",
            )
        console.print(table)
        console.print(f"at equal agreement: {found['labelling']['equal']}")
    if "search" in found:
        table = Table("way", "tokens a prompt", "right", title="accuracy against tokens")
        for row in found["search"]["best_of_n"]:
            for way in ("best", "majority", "pass_at_n"):
                low, high = row[way]["interval"]
                name = {"best": "best", "majority": "majority", "pass_at_n": "any right"}[way]
                table.add_row(
                    f"{name} of {row['n']}",
                    f"{row['tokens']:.0f}",
                    f"{row[way]['mean']:.1%} ({low:.1%} to {high:.1%})",
                )
        for row in found["search"]["search"]:
            table.add_row(
                f"search, keep {row['width']}, extend by {row['expand']}",
                f"{row['tokens']:.0f}",
                f"{row['accuracy']:.1%} ± {1.96 * row['standard_error']:.1%}",
            )
        console.print(table)
    if "caches" in found:
        table = Table("", "naive over shared, seconds", "peak MB", "naive", title="caches")
        for name, row in found["caches"].items():
            table.add_row(
                name,
                span(row["naive_over_shared"]),
                f"{row['shared_peak_mb']:.0f}",
                f"{row['naive_peak_mb']:.0f}",
            )
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--rows", type=int, default=48, help="of speed")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of a batch of speed")
    parser.add_argument("--policy", help="a run of rwr/char_reverse; default: trained here")
    parser.add_argument("--prompts", type=int, default=100, help="of labelling")
    parser.add_argument("--truth", type=int, default=512, help="rollouts that count as the truth")
    parser.add_argument("--most", type=int, default=64, help="rollouts a prefix, at most")
    parser.add_argument("--output", default="prm.json", help="file in benchmarks/results")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if "speed" in options.parts:
        found["speed"] = speed(options.repeats, options.rows, options.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        policy = options.policy or f"{folder}/policy"
        of_policy = {"labelling", "search"} & set(options.parts)
        if of_policy and options.policy is None:
            assert trl_ext(["train", "rwr/char_reverse", f"output_dir={policy}"]) == 0
        if "labelling" in options.parts:
            found["labelling"] = labelling(policy, options.prompts, options.truth, options.most)
        if "search" in options.parts:
            found["search"] = search(policy, 3 * options.prompts, samples=16)
    if "caches" in options.parts:
        found["caches"] = caches(options.repeats, num_prefixes=6, rollouts=8, tokens=16)
    report(found)
    record = {"options": vars(options), "environment": environment(), **found}
    path = RESULTS / options.output
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
