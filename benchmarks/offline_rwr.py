"""Fits of one set of logged completions, and training online, at the same number of samples.

    python benchmarks/offline_rwr.py [--prompts 96] [--seeds 3] [--folder outputs/offline_rwr]

The completions are collected from the bundled model on one-digit sums: `prompts` times 8, which is
what rwr/quickstart samples while it trains. Offline they are fitted by reward-weighted regression,
by best-of-n supervised fine-tuning (β → 0) and by supervised fine-tuning on the right ones alone
(β → ∞ above a threshold), each for as many optimiser steps. Held-out accuracy is of 8 samples a
prompt, with 95% intervals of the gain, paired by prompt. A seed draws the samples, the order and
the held-out completions anew; the held-out prompts stay the same.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from trl_ext.environment import environment

RESULTS = Path(__file__).parent / "results" / "offline_rwr.json"
ONLINE = "rwr/quickstart"
STEPS = 12  # of rwr/quickstart: 64 completions each
FITS = {
    "offline RWR, β = 0.25": [],
    "best-of-n SFT (β = 0)": ["beta=0"],
    "SFT on right ones": ["beta=.inf", "reward_threshold=1.0"],
}


def trl_ext(*arguments: str) -> None:
    """Run a command to its end; what it prints is shown if it fails."""
    done = subprocess.run([sys.executable, "-m", "trl_ext", *arguments], capture_output=True)
    if done.returncode:
        sys.exit(f"trl_ext {' '.join(arguments)}\n{done.stderr.decode()[-3000:]}")


def accuracies(policy: str | None, file: Path, seed: int) -> list[float]:
    """Of each held-out prompt: the share of its samples that get the whole reward."""
    if not file.is_file():
        model = [] if policy is None else [f"model_name_or_path={policy}"]
        trl_ext("collect", ONLINE, "--split=test", f"--output={file}", f"seed={seed}", *model)
    by_prompt: dict[int, list[bool]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        by_prompt.setdefault(row["group"], []).append(row["reward"] == 1)
    return [fmean(of) for _, of in sorted(by_prompt.items())]


def of_seed(folder: Path, prompts: int, epochs: int, seed: int) -> dict[str, list[float]]:
    """Name -> held-out accuracy of each prompt, before and after each way of training."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "collected.jsonl"
    if not data.is_file():
        trl_ext("collect", ONLINE, f"--limit={prompts}", f"--output={data}", f"seed={seed}")
    found = {"before": accuracies(None, folder / "before.jsonl", seed)}
    for number, (name, settings) in enumerate(FITS.items()):
        output = folder / f"fit-{number}"
        if not (output / "adapter_model.safetensors").is_file():
            steps = epochs * prompts * 8 // 32
            where = [f"output_dir={output}", f"dataset_name={data}", f"seed={seed}"]
            trl_ext("train", "rwr/offline", *where, f"max_steps={steps}", *settings, "--overwrite")
        found[name] = accuracies(str(output), folder / f"after-{number}.jsonl", seed)
        print(f"seed {seed}: {name}: {fmean(found[name]):.3f}", flush=True)
    output = folder / "online"
    if not (output / "adapter_model.safetensors").is_file():
        how = [f"output_dir={output}", f"seed={seed}", "eval_on_start=false"]
        trl_ext("train", ONLINE, *how, f"max_steps={prompts * STEPS // 96}", "--overwrite")
    found["online RWR"] = accuracies(str(output), folder / "after-online.jsonl", seed)
    return found


def rows_of(found: list[dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Name -> mean accuracy, each seed's, and the gain with its half-width over prompts."""
    rows = {}
    for name in found[0]:
        seeds = [fmean(each[name]) for each in found]
        # A prompt's accuracy is its mean over seeds, so that prompts are the units.
        gains = [
            fmean(each[name][p] - each["before"][p] for each in found)
            for p in range(len(found[0]["before"]))
        ]
        rows[name] = {
            "accuracy": fmean(seeds),
            "of_seeds": seeds,
            "gain": fmean(gains),
            "half_width": 1.96 * stdev(gains) / math.sqrt(len(gains)),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=96, help="with 8 completions each")
    parser.add_argument("--epochs", type=int, default=1, help="of each fit over its completions")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("outputs/offline_rwr"))
    options = parser.parse_args()
    found = [
        of_seed(options.folder / f"seed-{seed}", options.prompts, options.epochs, seed)
        for seed in range(1, options.seeds + 1)
    ]
    rows = rows_of(found)
    samples = options.prompts * 8
    table = Table(title=f"Held-out accuracy, {samples} samples, {options.seeds} seeds")
    for column in ("", "accuracy", "of each seed", "gain", "95% interval"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        low, high = row["gain"] - row["half_width"], row["gain"] + row["half_width"]
        seeds = ", ".join(f"{value:.2f}" for value in row["of_seeds"])
        gain = (
            ["", ""] if name == "before" else [f"{row['gain']:+.3f}", f"{low:+.3f} to {high:+.3f}"]
        )
        table.add_row(name, f"{row['accuracy']:.3f}", seeds, *gain)
    Console().print(table)
    record = {
        "options": {**vars(options), "folder": str(options.folder)},
        "environment": environment(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(f"Written to {RESULTS}")


if __name__ == "__main__":
    main()
