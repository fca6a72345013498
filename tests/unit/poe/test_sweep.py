"""α from expert to expert: what is sampled is measured, and the ends are the experts alone."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import save_byte_llama
from trl_ext.errors import ConfigError, PluginError, RewardError, UnknownNameError
from trl_ext.poe.counted import NaiveBayesExpert
from trl_ext.poe.drawing import Sampling, draw, encode, texts_of, with_weights
from trl_ext.poe.loading import load_product
from trl_ext.poe.sweep import (
    Mean,
    distinct_2,
    load_metric,
    mean_of,
    parse_alphas,
    perplexity_of,
    sweep,
)
from trl_ext.poe.sweep_picture import plot


@pytest.mark.parametrize(
    ("text", "alphas"),
    [
        ("0:1:0.25", [0, 0.25, 0.5, 0.75, 1]),
        ("0:0.3:0.1", [0, 0.1, 0.2, 0.3]),  # although 0.3/0.1 < 3 in floating point
        ("0:1:0.4", [0, 0.4, 0.8]),
        ("-0.5:0.5:0.5", [-0.5, 0, 0.5]),
        ("1:1:1", [1]),
        ("0,0.3,1", [0, 0.3, 1]),
        ("0.5", [0.5]),
    ],
)
def test_alphas(text, alphas):
    assert parse_alphas(text) == alphas


@pytest.mark.parametrize(
    "text", ["", "a", "0:1", "0:1:2:3", "0:1:0", "1:0:0.1", "0:1:-1", "0,,1", "nan", "0:1:1e-9"]
)
def test_what_is_no_sweep(text):
    with pytest.raises(ConfigError, match=r"write start:stop:step, such as 0:1:0\.25, or a list"):
        parse_alphas(text)


@given(st.integers(-20, 20), st.integers(0, 40), st.integers(1, 20))
def test_a_range_holds_every_step_up_to_stop(start, length, step):
    """In hundredths, where there is no rounding: range() is the slow loop."""
    text = f"{start / 100}:{(start + length) / 100}:{step / 100}"
    expected = [value / 100 for value in range(start, start + length + 1, step)]
    assert parse_alphas(text) == pytest.approx(expected)


def test_a_mean_and_its_standard_error():
    # The standard deviation of 1, 2, 3 is 1; over √3 prompts.
    assert mean_of([1, 2, 3]) == (2, pytest.approx(1 / math.sqrt(3)))
    assert math.isnan(mean_of([1]).standard_error)


def test_distinct_2():
    # (1,2) (2,1) (1,2) and (1,2): two of four; no pair goes from one completion to the next.
    assert distinct_2([[1, 2, 1, 2], [1, 2], [5]]) == 0.5
    assert math.isnan(distinct_2([[5]]))


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("wrods", UnknownNameError, "Did you mean 'words'"),
        ("no_such_module:f", PluginError, "cannot be loaded"),
        ("builtins:abs", RewardError, "raised TypeError"),
        ("builtins:sorted", RewardError, "raised ValueError"),  # texts are no numbers
        ("builtins:bytes.fromhex", RewardError, "raised TypeError"),
        ("builtins:set", RewardError, "raised ValueError"),
    ],
)
def test_what_is_no_metric(name, error, says):
    with pytest.raises(error, match=says):
        load_metric(name)


def test_a_metric_that_returns_too_little(tmp_path, monkeypatch):
    (tmp_path / "short_metric.py").write_text("def one(texts):\n    return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match="returned 1 numbers for 2 texts"):
        load_metric("short_metric:one")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("[1.0, float('nan')]", "returned nan for the text 'Another one.'"),
        ("[float('-inf'), 1.0]", "returned -inf for the text 'One text.'"),
        ("[1e39, 1.0]", "returned 1e\\+39 for"),
        ("sys.exit(3)", "raised SystemExit: 3, on 2 texts"),
    ],
)
def test_a_metric_that_is_no_number_or_ends_the_run(tmp_path, monkeypatch, body, says):
    name = tmp_path.name  # another module each time
    (tmp_path / f"{name}.py").write_text(f"import sys\ndef f(texts):\n    return {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=f"The metric '{name}:f' {says}"):
        load_metric(f"{name}:f")


def test_what_is_not_finite_has_no_standard_error():
    mean, error = mean_of([-math.inf, 1.0])
    assert mean == -math.inf and math.isnan(error)
    assert perplexity_of(-math.log(8)) == pytest.approx(8)
    assert perplexity_of(-1000.0) == perplexity_of(-math.inf) == math.inf


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    """A tiny model and a counted expert."""
    folder = tmp_path_factory.mktemp("sweep")
    base = save_byte_llama(folder / "base")
    tokenizer = load_product({"base": base}, [1.0]).tokenizer
    counted = NaiveBayesExpert.fit(["abcabc"] * 3, tokenizer=tokenizer, pseudo_count=0.01)
    counted.save(folder / "counted")
    return load_product({"base": base, "counted": str(folder / "counted")}, [0.5, 0.5])


SAMPLING = Sampling(max_new_tokens=6, num_samples=2)


def swept(product, alphas=(0.0, 0.5, 1.0), prompts=("ab", "c"), sampling=SAMPLING, **options):
    ids = encode(prompts, product.tokenizer, chat=False)
    options = {"reference": "base", "batch_size": 8, **options}
    return list(sweep(product, "counted", alphas, ids, sampling, **options))


@pytest.mark.equation("E14")
def test_the_ends_are_the_experts_alone(product):
    first, middle, last = swept(product)
    ids = encode(["ab", "c"], product.tokenizer, chat=False)
    for point, name in ((first, "base"), (last, "counted")):
        alone = with_weights(product, {name: 1.0})
        alone.generation_config = SAMPLING.config(product)
        texts = texts_of(product.tokenizer, draw(alone, ids, next(SAMPLING.seeds())))
        assert point.texts == [texts[:2], texts[2:]]
        assert point.log_z.mean == pytest.approx(0, abs=1e-5)
    assert middle.log_z.mean < -0.01
    assert first.log_likelihood["counted"].mean < last.log_likelihood["counted"].mean


def test_weights_are_checked_before_anything_is_sampled(product):
    ids = encode(["ab"], product.tokenizer, chat=False)
    points = sweep(product, "counted", [0.0, 1e17], ids, SAMPLING, reference="base", batch_size=1)
    with pytest.raises(ConfigError, match=r"The sweep cannot go to α = 1e\+17\. "):
        next(points)


def test_what_a_point_holds(product):
    (point,) = swept(product, [0.5], metric=("length", lambda texts: [len(t) for t in texts]))
    assert point.perplexity == pytest.approx(math.exp(-point.log_likelihood["base"].mean))
    lengths = [sum(map(len, group)) / 2 for group in point.texts]
    assert point.metric == pytest.approx(mean_of(lengths))
    assert 2 <= point.tokens <= 4 * 6
    record = point.record()
    assert record["log_z"].keys() == {"mean", "standard_error"}
    assert record["metric"]["mean"] == pytest.approx(sum(lengths) / 2)


def test_batches_change_no_score(product):
    """Greedy answers do not depend on the batch, and their scores must not either."""
    greedy = Sampling(max_new_tokens=6, greedy=True)
    prompts = ("ab", "c", "cab")
    (together,) = swept(product, [0.3], prompts, greedy)
    (apart,) = swept(product, [0.3], prompts, greedy, batch_size=1)
    assert together.texts == apart.texts
    assert together.log_z == pytest.approx(apart.log_z, abs=1e-5)
    for name, mean in together.log_likelihood.items():
        assert mean == pytest.approx(apart.log_likelihood[name], abs=1e-5)


@pytest.mark.parametrize("metric", ["", "length"])
def test_a_picture(product, tmp_path, metric):
    points = swept(product, [0.0, 1.0])
    points = [dataclasses.replace(p, metric=Mean(1.0, math.nan)) for p in points]
    plot(points, "counted", "base", tmp_path / "s.png", metric)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
