"""A proxy with a planted error: gold rises and falls, and the watch notices and keeps the peak.

The set-up is that of the benchmark, whose gold reward is exact by enumeration.
"""

import pytest
import torch

from benchmarks.overoptimisation import (
    Exact,
    ensemble,
    gold_of,
    one_proxy,
    proxies_of,
    save_start,
    train,
)
from trl_ext.oracle import TabularLM
from trl_ext.watch import BEST, callback

# A policy is judged by 64·4 completions, whose gold rewards lie in [−2, 1] and so have a standard
# deviation of at most 1.5. The best of several noisy means may be worse than another by this:
NOISE = 4 * 1.5 * (2 / 256) ** 0.5


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(callback, "draw_watch", lambda *_: None)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    return save_start(tmp_path_factory.mktemp("start"))


def test_the_proxy_is_gold_but_for_a_rare_letter(start):
    """Of all 259 completions they agree on those without the letter 3, and differ on the others."""
    exact = Exact(start)
    assert len(exact.space) == 259
    for ids, mask in zip(exact.space.tokens.tolist(), exact.space.mask, strict=True):
        completion = ids[: int(mask.sum())]
        assert (one_proxy([completion]) == [gold_of(completion)]) == (3 not in completion)
    # "aaa" is the best by gold, 333 by the proxy: (3·(5 − 2))/3 = 3.
    assert gold_of([1, 1, 1]) == 1 and one_proxy([[3, 3, 3]]) == [3]
    rare = torch.tensor(exact.space.tokens == 3).any(1)
    probability = exact.reference.exp()[0, rare].sum().item()
    assert probability < 0.1


@pytest.mark.parametrize(("method", "steps"), [("grpo", 50), ("rwr", 65)])
def test_gold_rises_and_falls_and_the_watch_keeps_its_peak(start, tmp_path, method, steps):
    exact, watch = train(method, one_proxy, start, tmp_path, max_steps=steps, seed=0)
    peak = max(exact.gold)
    at = exact.gold.index(peak)
    assert exact.gold[0] < 0.2 and peak > 0.8 and exact.gold[-1] < peak - 0.2
    proxies = [row["proxy_reward"][0] for row in watch.history.evaluations]
    assert proxies[-1] > proxies[at // 5] > proxies[0]
    # Noticed after the peak, and not before gold has in truth fallen.
    assert list(watch.alarms) == ["gold"]
    noticed = int(watch.alarms["gold"].split()[1].rstrip(":"))
    assert noticed > at and exact.gold[noticed] < peak
    kept = exact.gold_of_policy(TabularLM.from_pretrained(tmp_path / BEST))
    assert kept == pytest.approx(exact.gold[watch.history.best["step"]], abs=1e-6)
    assert kept > peak - NOISE
    # The KL that was measured is the exact one, over all evaluations: N = 256 completions in each.
    measured = torch.tensor([row["kl"] for row in watch.history.evaluations])
    exactly = torch.tensor([exact.kl[row["step"]] for row in watch.history.evaluations])
    error = measured[1:, 1].norm() / (len(measured) - 1)
    assert (measured[:, 0] - exactly)[1:].mean().abs() <= 4 * error
    assert measured[0, 0] == 0


def test_the_scores_of_an_ensemble():
    """Of "3" alone: gold −2/3, and member 0 gives 16/3 more.

    Mean −2/3 + 4/3, spread (16/3)·√3/4, least −2/3.
    """
    assert sum(proxies_of([3], 16)) / 4 == pytest.approx(2 / 3)
    assert ensemble("mean")([[3]]) == pytest.approx([2 / 3])
    assert ensemble("min")([[3]]) == pytest.approx([-2 / 3])
    assert ensemble("uncertainty")([[3]]) == pytest.approx([2 / 3 - 16 / 3 * 3**0.5 / 4])


def test_an_ensemble_that_charges_for_disagreement_is_optimised_less_far(start, tmp_path):
    """Three seeds, 50 steps: at the end gold of the penalised ensemble is above that of the mean.

    The paired difference, over its standard error, exceeds 4.
    """
    differences = []
    for seed in range(3):
        ends = {}
        for how in ("mean", "uncertainty"):
            folder = tmp_path / f"{how}-{seed}"
            exact, _ = train(
                "grpo", ensemble(how), start, folder, max_steps=50, seed=seed, eval_steps=50
            )
            ends[how] = exact.gold[-1]
        differences.append(ends["uncertainty"] - ends["mean"])
    found = torch.tensor(differences)
    assert found.mean() - 4 * found.std() / len(found) ** 0.5 > 0
