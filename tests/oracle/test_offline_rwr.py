"""Offline reward-weighted regression judged by enumeration."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.oracle.small import PLAIN, SHAPE, reward_of, save_reference
from trl_ext.oracle import Enumeration, TabularLM, gibbs_logps, kl_divergence
from trl_ext.rwr import OfflineRWRConfig, OfflineRWRTrainer
from trl_ext.rwr.logged import LoggedRows
from trl_ext.rwr.offline_weights import weigh

OPTIONS: dict[str, Any] = {
    name: value for name, value in PLAIN.items() if name != "max_completion_length"
}


@pytest.fixture
def start(tmp_path) -> str:
    return save_reference(tmp_path / "reference")


class Oracle:
    """h, another sampler, the rewards of all completions, and π*, in numbers."""

    def __init__(self, start: str, beta: float):
        self.space, self.beta = Enumeration(SHAPE), beta
        self.rewards = self.space.rewards(reward_of)
        self.ref_logps = self.space.logps(TabularLM.from_pretrained(start)).detach()
        self.target = gibbs_logps(self.ref_logps, self.rewards, beta)
        torch.manual_seed(3)
        noise = torch.randn_like(self.ref_logps)
        self.sampler_logps = (self.ref_logps + 0.7 * noise).log_softmax(-1)

    def drawn(self, logps: torch.Tensor, samples: int, generator) -> torch.Tensor:
        return torch.multinomial(logps[0].exp(), samples, replacement=True, generator=generator)

    def rows(self, numbers: torch.Tensor, sampler: torch.Tensor | None = None) -> list[dict]:
        """Logged completions, with token ids: those of full length have no end token."""
        values = self.rewards.expand(1, -1)[0]
        sampler = self.ref_logps if sampler is None else sampler
        found = []
        for n in numbers.tolist():
            ids = self.space.tokens[n][self.space.mask[n]].tolist()
            found.append(
                {
                    "prompt": "a",
                    "completion": "".join("_ab"[token] for token in ids if token),
                    "reward": values[n].item(),
                    "prompt_ids": [1],
                    "completion_ids": ids,
                    "logp": sampler[0, n].item(),
                    "ref_logp": self.ref_logps[0, n].item(),
                }
            )
        return found

    def estimate(self, numbers: torch.Tensor, config: OfflineRWRConfig, sampler=None):
        """π̂: the minimiser of the weighted loss over all policies, the weighted frequencies."""
        values = self.rewards.expand(1, -1)[0][numbers].numpy()
        ratios = None
        if config.importance_weights:
            assert sampler is not None
            ratios = (self.ref_logps - sampler)[0][numbers].numpy()
        rows = LoggedRows(
            keys=numbers.numpy().astype(np.uint64),
            groups=np.zeros(len(numbers), np.uint64),
            prompts=None,
            rewards=values,
            scores=values,
            log_ratios=ratios,
        )
        weights = torch.from_numpy(weigh(rows, config, "rows").weights)
        found = torch.zeros(len(self.space), dtype=torch.float64)
        return found.index_add(0, numbers, weights) / weights.sum()


def config(tmp_path, **options: Any) -> OfflineRWRConfig:
    return OfflineRWRConfig(str(tmp_path / "out"), **(OPTIONS | options))


def slope(errors: torch.Tensor, sizes: list[int]) -> tuple[float, float]:
    """(R, sizes) errors -> least-squares slope of log error on log N, and its standard error."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    x = x - x.mean()
    slopes = (errors.log() * x).sum(1) / x.square().sum()
    return slopes.mean().item(), (slopes.std() / len(slopes) ** 0.5).item()


SIZES, SEEDS = [256, 1024, 4096, 16384], 40


@pytest.mark.equation("E3", "E7", "E8")
@pytest.mark.parametrize("importance", [False, True])
def test_the_error_falls_as_one_over_the_root_of_n(start, tmp_path, importance):
    """√KL(π̂‖π*) and the L2 distance at four sizes, 40 seeds each: log-log slope −½, 4 s.e."""
    beta = 2.0
    oracle = Oracle(start, beta)
    options = config(tmp_path, beta=beta, importance_weights=importance)
    sampler = oracle.sampler_logps if importance else oracle.ref_logps
    target = oracle.target[0]
    errors = torch.zeros(2, SEEDS, len(SIZES), dtype=torch.float64)
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        for place, samples in enumerate(SIZES):
            numbers = oracle.drawn(sampler, samples, generator)
            found = oracle.estimate(numbers, options, sampler)
            errors[0, seed, place] = kl_divergence(found.log()[None], target[None]).sqrt().item()
            errors[1, seed, place] = (found - target.exp()).norm()
    for measure in errors:
        mean, standard_error = slope(measure, SIZES)
        assert abs(mean + 0.5) <= 4 * standard_error
        assert standard_error < 0.02, "the test has no power"


@pytest.mark.equation("E12")
@pytest.mark.parametrize("beta", [2.0, math.inf])
def test_importance_weights_aim_at_the_target_from_another_sampler(start, tmp_path, beta):
    """Every completion k_y times, k_y ∝ π(y) rounded up: weighted by π(y)/k_y more it is exact.

    With log_ratio = log h − log(k_y/K), the frequencies in the file for π, the weighted frequencies
    are h·exp(r/β)/Z to rounding; without importance weights they are off.
    """
    oracle = Oracle(start, 2.0)
    counts = (200 * oracle.sampler_logps[0].exp()).ceil().long()
    numbers = torch.arange(len(counts)).repeat_interleave(counts)
    sampler = (counts / counts.sum()).log()[None].double()
    target = gibbs_logps(oracle.ref_logps, oracle.rewards, beta)[0].exp()
    weighted = config(tmp_path, beta=beta, importance_weights=True)
    torch.testing.assert_close(oracle.estimate(numbers, weighted, sampler), target)
    plain = oracle.estimate(numbers, config(tmp_path, beta=beta))
    assert (plain - target).abs().sum() > 0.1


@pytest.mark.equation("E7", "E8")
@pytest.mark.parametrize("importance", [False, True])
def test_training_reaches_the_weighted_frequencies(start, tmp_path, importance):
    """100 rows, all in each step: what is left of KL(π̂‖π) after 150 steps is nothing but speed."""
    oracle = Oracle(start, 2.0)
    sampler = oracle.sampler_logps if importance else oracle.ref_logps
    numbers = oracle.drawn(sampler, 100, torch.Generator().manual_seed(0))
    options = config(
        tmp_path,
        beta=2.0,
        importance_weights=importance,
        per_device_train_batch_size=100,
        max_steps=150,
        learning_rate=0.15,
    )
    rows = Dataset.from_list(oracle.rows(numbers, sampler))
    trainer = OfflineRWRTrainer(start, options, rows)
    trainer.train()
    found = oracle.estimate(numbers, options, sampler)
    after = oracle.space.logps(trainer.model).detach()[0]
    seen = found > 0
    distance = (found[seen] * (found[seen].log() - after[seen])).sum().item()
    before = (found[seen] * (found[seen].log() - oracle.ref_logps[0][seen])).sum().item()
    assert distance < 1e-3 < 0.1 < before


@pytest.mark.equation("E10")
@pytest.mark.parametrize("beta", [math.inf, 0.0])
def test_one_step_in_the_limits(start, tmp_path, beta):
    """SGD of size 1 moves the table by minus the gradient of a loop over all rows, or the best."""
    oracle = Oracle(start, 2.0)
    numbers = oracle.drawn(oracle.ref_logps, 32, torch.Generator().manual_seed(0))
    options = config(
        tmp_path,
        beta=beta,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        learning_rate=1.0,
        optim="sgd",
    )
    trainer = OfflineRWRTrainer(start, options, Dataset.from_list(oracle.rows(numbers)))
    trainer.train()
    model = TabularLM.from_pretrained(start)
    logps, values = oracle.space.logps(model)[0], oracle.rewards.expand(1, -1)[0]
    best = max(values[n].item() for n in numbers)
    used = [n for n in numbers.tolist() if beta == math.inf or values[n].item() == best]
    loss = -torch.stack([logps[n] for n in used]).mean()
    (gradient,) = torch.autograd.grad(loss, [model.model.table.weight])
    step = trainer.model.model.table.weight.detach() - model.model.table.weight.detach()
    torch.testing.assert_close(step, -gradient, rtol=1e-4, atol=1e-6)
