"""What the terminal says of a reward model's held-out accuracy at the end."""

import pytest

from trl_ext.reward_model.before_after import accuracy_table

BEFORE = {"step": 0, "eval_accuracy": 0.25, "eval_accuracy_margin_0_to_0.5": 0.5}
TRAINING = {"step": 5, "accuracy": 0.875, "loss": 0.25}
AFTER = {"step": 10, "eval_accuracy": 0.75, "eval_accuracy_margin_0_to_0.5": 0.5}


def test_first_and_last_evaluation():
    logs = [BEFORE, TRAINING, {"step": 5, "eval_accuracy": 0.5}, AFTER]
    assert accuracy_table(logs, [{}] * 12) == (
        "Held-out comparisons, which training never saw\n"
        "             before    after     gain\n"
        "  accuracy    0.250    0.750   +0.500\n"
        "  on 12 rows; after = step 10"
    )


def test_a_stream_has_no_number_of_rows():
    last = accuracy_table([BEFORE, AFTER], iter([])).splitlines()[-1]
    assert last == "  after = step 10"


def test_several_evaluation_sets_have_a_line_each():
    logs = [
        {"step": 0, "eval_easy_accuracy": 0.5},
        {"step": 0, "eval_hard_accuracy": 0.25},
        {"step": 4, "eval_easy_accuracy": 1.0},
        {"step": 4, "eval_hard_accuracy": 0.125},
    ]
    assert accuracy_table(logs, {"easy": [], "hard": []}).splitlines()[2:] == [
        "  easy_accuracy    0.500    1.000   +0.500",
        "  hard_accuracy    0.250    0.125   -0.125",
        "  after = step 4",
    ]


@pytest.mark.parametrize("logs", [[], [TRAINING], [AFTER], [BEFORE], [TRAINING, AFTER, AFTER]])
def test_without_a_before_and_an_after_there_is_no_table(logs):
    assert accuracy_table(logs, []) == ""
