"""A student distilled from a product of two tabular experts becomes that product."""

from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.oracle.small import PLAIN, SHAPE, save_reference
from trl_ext import PoEDistillationConfig, PoEDistillationTrainer
from trl_ext.functional import product_of_experts
from trl_ext.oracle import Enumeration, TabularLM, kl_divergence
from trl_ext.poe import ProductOfExperts

WEIGHTS = [0.6, 0.4]
LONGER = [0.9, 0.7]  # sums to more than 1: a sharper product than either expert


def late(positions: torch.Tensor) -> torch.Tensor:
    """0.2 at the first token, 0.7 at the second, 1.2 at the third."""
    return 0.2 + 0.5 * positions


def experts() -> list[TabularLM]:
    found = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        model = TabularLM(SHAPE)
        with torch.no_grad():
            model.model.table.weight.normal_(std=1.0)
        found.append(model)
    return found


def per_step_product(models: list[TabularLM], weights: list[Any]) -> torch.Tensor:
    """log π* (1, R, V) at each prefix, by Equation E14 from the tables."""
    space = Enumeration(SHAPE)
    tables = torch.stack([space.logits(model) for model in models]).log_softmax(-1)
    # Prefixes of length t, the position of the token that they predict, come in blocks of 2^t.
    depths = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    at_each: list[Any] = [w(depths) if callable(w) else torch.full((7,), w) for w in weights]
    return product_of_experts(tables, torch.stack(at_each)[:, None].double())


def distilled(folder, weights, **options) -> TabularLM:
    start = save_reference(folder / "student")
    settings = PLAIN | {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 64,
        "learning_rate": 0.1,
        "lr_scheduler_type": "linear",
        "max_steps": 120,
    }
    trainer = PoEDistillationTrainer(
        start,
        ProductOfExperts(experts(), weights),
        PoEDistillationConfig(**(settings | options)),
        Dataset.from_dict({"prompt": ["a"] * 64}),
    )
    trainer.train()
    assert isinstance(trainer.model, TabularLM)
    return trainer.model


@pytest.mark.equation("E14", "E27")
@pytest.mark.parametrize(
    ("divergence", "weights"),
    [
        ("forward_kl", WEIGHTS),
        ("reverse_kl", WEIGHTS),
        ("jsd", WEIGHTS),
        ("reverse_kl", [late, 0.5]),
    ],
)
def test_the_student_becomes_the_product(tmp_path, divergence, weights):
    student = distilled(tmp_path, weights, divergence=divergence)
    space, target = Enumeration(SHAPE), per_step_product(experts(), weights)
    # That of a sequence is the sum of those of its steps, each weighed by who comes there.
    own, wanted = space.logps(student), space.logps(target)
    assert kl_divergence(own, wanted).item() < 1e-3
    assert kl_divergence(wanted, own).item() < 1e-3
    # It was somewhere else before.
    before = TabularLM.from_pretrained(tmp_path / "student")
    assert kl_divergence(space.logps(before), wanted).item() > 0.1


@pytest.mark.equation("E21")
def test_it_is_the_product_of_steps_and_not_of_sequences(tmp_path):
    """Π_k p_k(y)^{w_k} / Z over whole completions is another distribution."""
    student, space = distilled(tmp_path, LONGER), Enumeration(SHAPE)
    whole = torch.stack([space.logps(model) for model in experts()])
    of_sequences = product_of_experts(whole, torch.tensor(LONGER))
    of_steps = space.logps(per_step_product(experts(), LONGER))
    apart = kl_divergence(of_steps, of_sequences).item()
    assert apart > 0.02
    assert kl_divergence(space.logps(student), of_steps).item() < min(1e-3, 0.05 * apart)
