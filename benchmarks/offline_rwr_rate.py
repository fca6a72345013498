"""How fast offline RWR approaches π* with the number of logged completions, on an enumerable task.

N completions are drawn from h, or from another sampler and weighted back, and weighted as the
trainer weighs them. The best fit to them is their weighted frequencies π̂. √KL(π̂‖π*) falls as
N^(−1/2). The slope is fitted on each seed alone, on sizes at which nearly every completion has been
drawn; its interval is over seeds. Supervised fine-tuning on the same completions, which is what
trl.SFTTrainer does, stays at a distance.

    python benchmarks/offline_rwr_rate.py [--seeds 60]
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trl_ext.environment import environment
from trl_ext.oracle import Enumeration, TabularLM, TabularLMConfig, gibbs_logps, kl_divergence
from trl_ext.rwr import OfflineRWRConfig
from trl_ext.rwr.logged import LoggedRows
from trl_ext.rwr.offline_weights import weigh

RESULTS = Path(__file__).parent / "results" / "offline_rwr_rate.json"
SHAPE = TabularLMConfig(vocab_size=4, max_completion_length=3, initializer_range=0.7)
SIZES = [64, 256, 1024, 4096, 16384]
# The slope is that of the last sizes: before, most of π* has not been drawn yet.
FITTED = 3
BETA = 0.5


class Bench:
    """h, a second sampler, the rewards of all completions, and π*."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.space = Enumeration(SHAPE)
        self.ref_logps = self.space.logps(TabularLM(SHAPE)).detach()[0]
        self.rewards = torch.rand(len(self.space), dtype=torch.float64)
        self.target = gibbs_logps(self.ref_logps[None], self.rewards, BETA)[0]
        noise = 0.7 * torch.randn(len(self.space), dtype=torch.float64)
        self.other_logps = (self.ref_logps + noise).log_softmax(-1)

    def error(self, samples: int, seed: int, config: OfflineRWRConfig) -> float:
        """√KL(π̂‖π*), nats^½, of the fit to one draw."""
        logps = self.other_logps if config.importance_weights else self.ref_logps
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.multinomial(logps.exp(), samples, replacement=True, generator=generator)
        ratios = (self.ref_logps - logps)[numbers].numpy() if config.importance_weights else None
        rewards = self.rewards[numbers].numpy()
        keys, groups = numbers.numpy().astype(np.uint64), np.zeros(samples, np.uint64)
        rows = LoggedRows(keys, groups, None, rewards, rewards, ratios)
        weights = torch.from_numpy(weigh(rows, config, "rows").weights)
        found = torch.zeros_like(self.target).index_add(0, numbers, weights) / weights.sum()
        return math.sqrt(kl_divergence(found.log()[None], self.target[None]).item())


def slope(errors: Tensor) -> tuple[float, float]:
    """(R, sizes) errors -> slope of log error on log N, and its standard error over seeds."""
    x = torch.tensor(SIZES[-FITTED:], dtype=torch.float64).log()
    x = x - x.mean()
    slopes = (errors[:, -FITTED:].log() * x).sum(1) / x.square().sum()
    return slopes.mean().item(), (slopes.std() / len(slopes) ** 0.5).item()


def draw(rows: dict[str, dict], path: Path) -> None:
    """Errors against N on logarithmic axes, with two standard errors."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, row in rows.items():
        label = f"{name}: slope {row['slope']:.3f}"
        bars = row["two_standard_errors_of_error"]
        axes.errorbar(SIZES, row["error"], yerr=bars, label=label, marker="o", capsize=3)
    axes.set(xscale="log", yscale="log", xlabel="logged completions N", ylabel="√KL(π̂‖π*)")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=60)
    options = parser.parse_args()
    bench, rows = Bench(), {}
    cases = {
        "offline RWR": {"beta": BETA},
        "offline RWR, another sampler": {"beta": BETA, "importance_weights": True},
        "supervised fine-tuning": {"beta": math.inf},
    }
    table = Table(title="√KL(π̂‖π*) of the fit to N logged completions")
    for column in ("", *map(str, SIZES), "slope", "± 2 SE"):
        table.add_column(column, justify="right" if column else "left")
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases.items():
            config = OfflineRWRConfig(folder, use_cpu=True, bf16=False, report_to="none", **case)
            seeds = range(options.seeds)
            errors = torch.tensor([[bench.error(n, seed, config) for n in SIZES] for seed in seeds])
            errors = errors.double()
            mean, error = slope(errors)
            spread = 2 * errors.std(0) / len(errors) ** 0.5
            rows[name] = {
                "error": errors.mean(0).tolist(),
                "two_standard_errors_of_error": spread.tolist(),
                "slope": mean,
                "two_standard_errors": 2 * error,
            }
            shown = [f"{value:.4f}" for value in rows[name]["error"]]
            table.add_row(name, *shown, f"{mean:.3f}", f"{2 * error:.3f}")
    Console(width=110).print(table)
    record = {"options": vars(options), "sizes": SIZES, "environment": environment(), "rows": rows}
    RESULTS.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    draw(rows, RESULTS.with_suffix(".png"))
    print(f"Written to {RESULTS} and {RESULTS.with_suffix('.png')}")


if __name__ == "__main__":
    main()
