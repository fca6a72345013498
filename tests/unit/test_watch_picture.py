"""The picture of the reward-hacking watch, and what its page shows in Python."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_byte_llama
from trl_ext.watch.picture import watch_figure

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reward_hacking.md"


def evaluation(step: int, kl: float | None = None) -> dict[str, Any]:
    names = ["proxy_reward", "gold_reward", "length", "truncated", "repetition"]
    numbers = {name: [step / 10, 0.01] for name in names}
    numbers |= {name: [0.5, math.nan] for name in ("distinct_1", "distinct_2")}
    return {"step": step} | numbers | ({} if kl is None else {"kl": [kl, 0.1]})


def marked(axes: Any) -> dict[str, float]:
    """Label of a vertical line -> where it is."""
    lines = {str(line.get_label()): line.get_xdata() for line in axes.lines}
    return {label: at[0] for label, at in lines.items() if label.startswith(("alarm", "best"))}


def test_the_steps_of_alarms_are_marked_and_ticks_are_whole_steps():
    evaluations = [evaluation(step) for step in range(4)]
    figure = watch_figure(evaluations, 2, {"gold": 3, "kl": 1, "length": 3})
    alarms = {"alarm (kl), step 1": 1, "alarm (gold, length), step 3": 3}
    rewards, lengths, texts = figure.axes
    assert marked(rewards) == alarms | {"best gold, step 2": 2}
    assert marked(lengths) == marked(texts) == alarms
    for axes in figure.axes:
        ticks = axes.get_xticks()
        assert axes.get_xlabel() == "step" and all(tick == round(tick) for tick in ticks)


def test_where_the_axis_is_the_kl_an_alarm_is_at_the_kl_of_its_step():
    """An alarm of a rollout between evaluations has no KL of its own: it is on the other axes."""
    evaluations = [evaluation(0, 0.0), evaluation(2, 0.5), evaluation(4, 7.25)]
    rewards, lengths, _ = watch_figure(evaluations, 2, {"gold": 4, "kl": 3}).axes
    assert marked(rewards) == {"best gold, step 2": 0.5, "alarm (gold), step 4": 7.25}
    assert marked(lengths) == {"alarm (kl), step 3": 3, "alarm (gold), step 4": 4}
    assert rewards.get_xlabel() == "KL to before, nats per completion"


def test_the_picture_has_the_names_of_the_table():
    figure = watch_figure([evaluation(0), evaluation(1)], 0, {})
    legends = [axes.get_legend() for axes in figure.axes]
    shown = [text.get_text() for each in legends if each for text in each.get_texts()]
    assert set(shown) == {
        "best gold, step 0",
        "proxy reward (trained on)",
        "gold reward (held out)",
        "length, tokens",
        "share truncated",
        "repeated 3-grams",
        "distinct 1-grams",
        "distinct 2-grams",
    }


def test_the_python_of_the_page_runs_as_it_is(tmp_path, monkeypatch):
    """Of the page's code only the model, the numbers of steps and of prompts are made smaller."""
    code = "".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S))
    for ours, small in (
        ('"bundled:char-reverse-1m"', repr(save_byte_llama(tmp_path / "model"))),
        ("max_steps=10", "max_steps=2"),
        ("eval_steps=5", "eval_steps=1"),
        ('"eval_size": 200', '"eval_size": 20'),
        ("use_cpu=True", "bf16=False, report_to='none', save_strategy='no', use_cpu=True"),
    ):
        assert code.count(ours) == 1, ours
        code = code.replace(ours, small)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "the_page"}
    exec(code, names)
    [watch] = [
        each for each in names["trainer"].callback_handler.callbacks if hasattr(each, "history")
    ]
    assert [row["step"] for row in watch.history.evaluations] == [0, 1, 2]
    assert watch.history.evaluations[0]["kl"][0] == pytest.approx(0, abs=1e-4)
    assert (tmp_path / "outputs" / "watched" / "hacking.png").is_file()
