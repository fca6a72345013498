import pytest

from trl_ext.record import EVALUATIONS, RunRecord
from trl_ext.report import before_after_table, held_out_gains
from trl_ext.watch import HACKING


def record_with(tmp_path, *evaluations) -> RunRecord:
    record = RunRecord(tmp_path)
    for step, rewards in evaluations:
        record.append(EVALUATIONS, {"step": step, "rewards": rewards})
    return record


def test_gain_is_paired_by_prompt(tmp_path):
    """Differences of prompt means: 0.5, 1, 0, 0.5; mean 0.5; sd² = (0 + .25 + .25 + 0)/3 = 1/6.

    Half width 1.96·√(1/6)/√4 = 0.4001.
    """
    before = [[0, 0], [0, 0], [1, 0], [0, 1]]
    after = [[1, 0], [1, 1], [0, 1], [1, 1]]
    gain = held_out_gains(record_with(tmp_path, (0, before), (7, [[9] * 2] * 4), (10, after)))[
        "accuracy"
    ]
    assert (gain.before, gain.after, gain.gain, gain.step) == (0.25, 0.75, 0.5, 10)
    assert gain.half_width == pytest.approx(1.96 * (1 / 6) ** 0.5 / 2)
    assert (gain.prompts, gain.completions) == (4, 8)


def test_unscored_completions_and_prompts_are_left_out(tmp_path):
    before = [[0, None], [None, None], [1, 1], [0, 0]]
    after = [[1, None], [1, 1], [1, 1], [0, None]]
    gain = held_out_gains(record_with(tmp_path, (0, before), (5, after)))["accuracy"]
    assert gain.prompts == 3
    assert gain.gain == pytest.approx(1 / 3)


@pytest.mark.parametrize("evaluations", [[], [(0, [[1], [0]])], [(3, [[1], [0]]), (5, [[1], [0]])]])
def test_without_a_before_and_an_after_there_is_no_gain(tmp_path, evaluations):
    assert held_out_gains(record_with(tmp_path, *evaluations)) == {}


@pytest.mark.parametrize(
    ("after", "measures"),
    [
        ([[1], [0]], ["accuracy"]),  # right or wrong: reward and accuracy are one
        ([[1], [0.25]], ["reward", "accuracy"]),
        ([[0.5], [0.25]], ["reward"]),  # nothing is ever fully right: no accuracy to speak of
        ([[1], [-1]], ["reward"]),
        ([[1], [7]], ["reward"]),
        ([[0], [0]], ["reward"]),
    ],
)
def test_an_accuracy_is_shown_where_a_reward_of_1_means_right(tmp_path, after, measures):
    record = record_with(tmp_path, (0, [[0], [0.5 if 0.5 in after[0] else 0]]), (5, after))
    assert list(held_out_gains(record)) == measures


def test_accuracy_counts_full_points_only(tmp_path):
    record = record_with(tmp_path, (0, [[0.5, 0.5], [0, 1]]), (5, [[1, 0.5], [1, 1]]))
    gains = held_out_gains(record)
    assert (gains["reward"].before, gains["reward"].after) == (0.5, 0.875)
    assert (gains["accuracy"].before, gains["accuracy"].after) == (0.25, 0.75)


def test_the_table_says_when_a_gain_is_not_shown(tmp_path):
    rewards = [[0], [1]] * 20
    none = held_out_gains(record_with(tmp_path, (0, rewards), (5, rewards[::-1])))
    assert "does not show a gain" in before_after_table(none)
    (tmp_path / "clear").mkdir()
    clear = held_out_gains(record_with(tmp_path / "clear", (0, [[0]] * 40), (5, rewards)))
    text = before_after_table(clear)
    assert "does not show" not in text
    assert "+0.500" in text and "on 40 prompts, 40 completions in all, each time; after" in text


def test_beside_a_gold_reward_the_rewards_are_called_proxies(tmp_path):
    """Prompt means 0 -> 0.5, 0 -> 0.25, of full reward 0 -> 0.5, 0 -> 0."""
    record = record_with(tmp_path, (0, [[0, 0], [0, 0]]), (5, [[1, 0], [0.5, 0]]))
    plain = before_after_table(held_out_gains(record)).splitlines()
    (tmp_path / HACKING).write_text("{}")
    gains = held_out_gains(record)
    assert list(gains) == ["proxy reward", "proxy accuracy"]
    assert (gains["proxy reward"].after, gains["proxy accuracy"].after) == (0.375, 0.25)
    _, header, *rows = before_after_table(gains).splitlines()
    at = header.index("before") + len("before")
    watched = [row for row in rows if row.startswith("  proxy")]
    assert [row[:at].split()[-1] for row in watched] == ["0.000", "0.000"], "columns in line"
    at = plain[1].index("before") + len("before")
    assert plain[2][:at] == "  reward      0.000"
