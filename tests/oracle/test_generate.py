"""`generate` draws from exactly the distribution that is enumerated."""

import math

import pytest
import torch

from trl_ext.oracle import Enumeration, TabularLM, TabularLMConfig

# Draws of each prompt. Every cell expects at least 20 of them (asserted).
SAMPLES = 20_000


@pytest.fixture
def flat():
    """Logits with standard deviation 0.3, so that no completion is rare."""
    torch.manual_seed(3)
    shape = TabularLMConfig(
        vocab_size=3, max_completion_length=3, num_prompts=2, initializer_range=0.3
    )
    return TabularLM(shape)


def assert_drawn_from(counts, probabilities):
    """Pearson's statistic has mean d and standard deviation √(2d) for d = cells − 1: at most 4."""
    expected = probabilities * counts.sum()
    assert expected.min() > 20
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) <= 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("options", [{}, {"use_cache": True}, {"use_cache": False}])
def test_samples_of_a_left_padded_batch(flat, options):
    """Prompt a next to ba: the second prompt comes with a completion begun, a."""
    space = Enumeration(flat.config)
    ids = torch.tensor([[0, 1], [2, 1]]).repeat(SAMPLES, 1)
    torch.manual_seed(0)
    out = flat.generate(
        ids, attention_mask=(ids > 0).long(), do_sample=True, max_new_tokens=3, **options
    )
    whole, begun = space.logps(flat).detach().exp()
    first = torch.bincount(space.index(out[0::2, 2:]), minlength=len(space))
    assert_drawn_from(first, whole)
    # One token of the second completion is given, so it is over after two more.
    second = torch.bincount(space.index(out[1::2, 1:4]), minlength=len(space))
    starts_with_a = space.tokens[:, 0] == 1
    assert second[~starts_with_a].sum() == 0
    given = begun[starts_with_a]
    assert_drawn_from(second[starts_with_a], given / given.sum())


def test_greedy_takes_the_likeliest_token(flat):
    ids = torch.tensor([[0, 0, 1], [0, 0, 2], [2, 2, 1]])
    mask = (ids > 0).long()
    out = flat.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=4)
    for row, prompt in zip(out[:, 3:].tolist(), ([1], [2], [2, 2, 1]), strict=True):
        said = list(prompt)
        while len(said) < len(prompt) + 4 and said[-1] != 0:
            said.append(int(flat(torch.tensor([said])).logits[0, -1].argmax()))
        assert row == (said[len(prompt) :] + [0] * 4)[:4]


def test_beams_find_the_likeliest_completion(flat):
    """As many beams as prefixes of the last level search everything."""
    space = Enumeration(flat.config)
    out = flat.generate(
        torch.tensor([[1]]),
        attention_mask=torch.tensor([[1]]),
        do_sample=False,
        num_beams=8,
        max_new_tokens=4,
        length_penalty=0.0,
    )
    assert space.index(out[:, 1:4]).item() == space.logps(flat)[0].argmax().item()


def test_the_temperature_divides_the_logits(flat):
    space = Enumeration(flat.config)
    ids = torch.ones(SAMPLES, 1, dtype=torch.long)
    torch.manual_seed(0)
    out = flat.generate(ids, attention_mask=ids, do_sample=True, max_new_tokens=3, temperature=2.0)
    counts = torch.bincount(space.index(out[:, 1:]), minlength=len(space))
    assert_drawn_from(counts, space.logps(space.logits(flat) / 2)[0].detach().exp())
