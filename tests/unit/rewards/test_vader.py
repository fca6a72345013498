import sys

import pytest

from trl_ext.errors import MissingDependencyError
from trl_ext.rewards import vader as module
from trl_ext.rewards.build import build_rewards


def test_scores_of_texts_and_messages():
    [reward] = build_rewards(["vader"])
    message = [{"role": "assistant", "content": "I love it, it is wonderful!"}]
    good, as_message, nothing, bad = reward(
        prompts=[""] * 4,
        completions=["I love it, it is wonderful!", message, "", "I hate it, it is horrible!"],
    )
    assert good == as_message > 0.8
    assert nothing == 0.0
    assert bad < -0.7


def test_without_the_package(monkeypatch):
    module._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(MissingDependencyError, match=r"trl-ext\[sentiment\]"):
        module.sentiment(["fine"])
    module._analyzer.cache_clear()
