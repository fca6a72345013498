"""Seconds and memory of counted experts on the CPU: fit, a decoding step, scoring of a batch.

The corpus is synthetic: tokens of a Zipf distribution (exponent 1) over the vocabulary, and now and
then a fixed successor of the token before, so that contexts repeat as in text. "uniform" has
neither: nearly every pair is new, the worst case for sparse tables. Sequences are lists of Python
integers, as `datasets` gives them; they are held before the fit and not counted.

Each case is a process of its own, so that one's heap is not another's. "added" is how far the
resident set rose above what was held before; the fit's includes the tables that stay.

    python benchmarks/counted.py [--tokens 5000000] [--vocabulary 50000] [--repeats 5]
        [--output counted.json]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _memory import forget_peak, peak
from rich.console import Console
from rich.table import Table

from trl_ext.environment import environment
from trl_ext.poe import NaiveBayesExpert, NGramExpert

RESULTS = Path(__file__).parent / "results"
CASES: dict[str, tuple[Any, dict[str, int]]] = {
    "naive Bayes, window 1": (NaiveBayesExpert, {"window": 1}),
    "naive Bayes, window 4": (NaiveBayesExpert, {"window": 4}),
    "bigrams": (NGramExpert, {"order": 2}),
    "trigrams": (NGramExpert, {"order": 3}),
    "5-grams": (NGramExpert, {"order": 5}),
}
CORPORA = ("zipf", "uniform")
SEQUENCE, COPIED = 250, 0.3  # tokens of a sequence; how often a token is its successor's cause
DECODING, SCORING = (64, 128), (8, 512)
# Tensors above 1 MiB go back to the system when freed: else the mark depends on how the heap is
# fragmented.
CHILD = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "CUDA_VISIBLE_DEVICES": ""}
COLUMNS = {
    "fit_s": "fit s",
    "fit_added_mb": "fit added MB",
    "tables_mb": "tables MB",
    "step_ms": "step ms",
    "step_added_mb": "step added MB",
    "score_s": "score s",
    "score_added_mb": "score added MB",
}


def tokens_of(corpus: str, shape: tuple[int, int], vocabulary: int, seed: int) -> np.ndarray:
    """(sequences, length) token ids."""
    generator = np.random.default_rng(seed)
    if corpus == "uniform":
        return generator.integers(vocabulary, size=shape, dtype=np.int32)
    cumulative = np.cumsum(1 / np.arange(1, vocabulary + 1))
    drawn = np.searchsorted(cumulative, generator.random(shape) * cumulative[-1]).astype(np.int32)
    copied = generator.random(shape) < COPIED
    for place in range(1, shape[1]):
        successor = (drawn[:, place - 1].astype(np.int64) * 7919 + 1) % vocabulary
        drawn[:, place] = np.where(copied[:, place], successor, drawn[:, place])
    return drawn


def measure(case: str, corpus: str, tokens: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Seconds and MB of one expert in this process."""
    cls, size = CASES[case]
    shape = (tokens // SEQUENCE, SEQUENCE)
    sequences = tokens_of(corpus, shape, vocabulary, seed=0).tolist()
    arguments: dict[str, Any] = {"vocab_size": vocabulary, "progress": False, **size}
    cls.fit(sequences[:10], **arguments)  # imports
    held, start = forget_peak(), time.perf_counter()
    expert = cls.fit(sequences, **arguments)
    measured = {"fit_s": time.perf_counter() - start, "fit_added_mb": (peak() - held) / 2**20}
    with tempfile.TemporaryDirectory() as folder:
        expert.save(folder)
        measured["tables_mb"] = sum(f.stat().st_size for f in Path(folder).iterdir()) / 2**20
    step, batch = (
        torch.from_numpy(tokens_of(corpus, shape, vocabulary, seed=1)).long()
        for shape in (DECODING, SCORING)
    )
    seconds, measured["step_added_mb"] = _look_up(lambda: expert.next_log_probs(step), repeats)
    measured["step_ms"] = seconds * 1000
    measured["score_s"], measured["score_added_mb"] = _look_up(
        lambda: expert.token_log_probs(batch), repeats
    )
    return measured


def _look_up(what: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds, and MB added at most."""
    what()
    held, seconds = forget_peak(), []
    for _ in range(repeats):
        start = time.perf_counter()
        what()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), (peak() - held) / 2**20


def _in_a_fresh_process(*asked: Any) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", json.dumps(asked)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=CHILD)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=5, help="of each look-up")
    parser.add_argument("--output", default="counted.json", help="file in benchmarks/results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    numbers = (options.tokens, options.vocabulary, options.repeats)
    rows = {
        corpus: {case: _in_a_fresh_process(case, corpus, *numbers) for case in CASES}
        for corpus in CORPORA
    }
    for corpus, measured in rows.items():
        _print(f"{options.tokens} tokens, V = {options.vocabulary}, {corpus}", measured)
    given = {name: value for name, value in vars(options).items() if name != "one"}
    record = {
        "options": given | {"decoding": DECODING, "scoring": SCORING},
        "torch_threads": torch.get_num_threads(),
        "environment": environment(),
        "rows": rows,
    }
    path = RESULTS / options.output
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"Written to {path}")


def _print(title: str, rows: dict[str, dict[str, float]]) -> None:
    table = Table(title=f"{title}; step of {DECODING}, scoring of {SCORING}")
    table.add_column("")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for case, row in rows.items():
        digits = [2 if name.endswith("_s") else 0 for name in COLUMNS]
        values = (f"{row[name]:.{d}f}" for name, d in zip(COLUMNS, digits, strict=True))
        table.add_row(case, *values)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
