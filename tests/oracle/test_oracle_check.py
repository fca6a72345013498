"""The side-by-side check: its numbers against plain loops, its refusals, its exit code."""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trl_ext import oracle_check
from trl_ext.cli import main
from trl_ext.cli import oracle_check as command
from trl_ext.cli.json_file import write_json_file
from trl_ext.oracle_check import SETTINGS, Problem, check, load_trainer, settings_of

MINE = """
from trl_ext import RWRConfig, RWRTrainer
from trl_ext.trl_adapter import PolicyTrainer

five = 5

class MineConfig(RWRConfig):
    pass

class MineTrainer(RWRTrainer):
    config_class = MineConfig

class PlainTrainer(PolicyTrainer):
    pass

class BrokenTrainer(RWRTrainer):
    def assign_credit(self, rollout):
        return -super().assign_credit(rollout)
"""


@pytest.fixture
def trl_ext(capsys) -> Callable[..., tuple[int, str, str]]:
    """trl_ext("--steps", "2") -> exit code, standard output, standard error."""

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code = main(["oracle-check", *argv])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def mine(tmp_path, monkeypatch) -> None:
    """A module `mine_for_the_check` with trainers of a user."""
    (tmp_path / "mine_for_the_check.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_for_the_check", raising=False)


def cells(out: str) -> dict[str, list[str]]:
    """First cell -> the others, of the plain table."""
    lines = [line.split() for line in out.split("\n\n")[1].splitlines()[1:]]
    return {first: rest for first, *rest in lines}


def every_completion() -> list[str]:
    """Up to three letters of two; those of fewer than three end by themselves: 1 + 2 + 4 + 8."""
    return ["".join(word) for n in range(4) for word in itertools.product("ab", repeat=n)]


def probability(completion: str, table: list[list[float]]) -> float:
    """Π_t softmax of the logits after y_<t; the rows are in the order of `every_completion`."""
    product, rows = 1.0, every_completion()
    steps = [(completion[:t], "ab".index(letter) + 1) for t, letter in enumerate(completion)]
    if len(completion) < 3:
        steps.append((completion, 0))
    for prefix, token in steps:
        logits = table[rows.index(prefix)]
        product *= math.exp(logits[token]) / sum(map(math.exp, logits))
    return product


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> tuple[int, str, dict]:
    """Exit code, JSON file and its content of four trainers on two rollouts, β = 0.7."""
    file = tmp_path_factory.mktemp("check") / "check.json"
    code = main(["oracle-check", "--steps", "2", "--beta", "0.7", "--json", str(file)])
    return code, str(file), json.loads(file.read_text())


def test_the_table_has_a_row_a_policy(trl_ext):
    code, out, err = trl_ext("--steps", "2", "--trainer", "rwr", "--trainer", "ppo")
    assert (code, err) == (0, "")
    rows = cells(out)
    assert list(rows) == ["π*", "π_ref", "rwr", "ppo"]
    assert rows["π*"][0] == "0" and rows["π*"][3:] == ["–", "–", "–"]
    assert rows["π_ref"][1] == rows["π_ref"][2], "its KL to itself is 0"
    assert rows["rwr"][3:] == ["512", "2", "never"]
    assert rows["ppo"][3:] == ["512", "4", "never"]


def test_markdown(trl_ext):
    _, out, _ = trl_ext("--steps", "3", "--trainer", "rwr", "--seeds", "2", "--markdown")
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and {line.count("|") for line in rows} == {8}
    assert rows[-1].startswith("| rwr | ") and rows[-1].endswith(" | 768 | 3 | never |")
    assert " to " in rows[-1] and "Mean of 2 seeds (least to most)." in out


@pytest.mark.equation("E1", "E4", "E5")
def test_the_json_is_what_plain_loops_say(short):
    code, _, found = short
    completions, beta = every_completion(), 0.7
    table = Problem(beta).ref_table[0].tolist()
    reference = {y: probability(y, table) for y in completions}
    rewards = found["rewards"]
    assert code == 0 and found["beta"] == beta
    assert list(rewards) == completions and len(set(rewards.values())) == 15
    tilted = {y: reference[y] * math.exp(rewards[y] / beta) for y in completions}
    gibbs = {y: tilted[y] / sum(tilted.values()) for y in completions}
    assert found["reference"]["probabilities"] == pytest.approx(reference)
    assert found["gibbs"]["probabilities"] == pytest.approx(gibbs)
    assert [one["trainer"] for one in found["trainers"]] == ["grpo", "reinforce", "ppo", "rwr"]
    runs = [run for one in found["trainers"] for run in one["runs"]]
    for policy in (found["gibbs"], found["reference"], *runs):
        p = policy["probabilities"]
        assert sum(p.values()) == pytest.approx(1)
        reward = sum(p[y] * rewards[y] for y in completions)
        of_reference = sum(p[y] * math.log(p[y] / reference[y]) for y in completions)
        assert policy["reward"] == pytest.approx(reward)
        assert policy["objective"] == pytest.approx(reward - beta * of_reference)
        of_gibbs = sum(p[y] * math.log(p[y] / gibbs[y]) for y in completions)
        assert policy["kl"] == pytest.approx(of_gibbs, abs=1e-12)
        # Both are the distance from the optimum: E[r] − β KL(π‖π_ref) = β log Z − β KL(π‖π*).
        short_of = found["gibbs"]["objective"] - policy["objective"]
        assert short_of == pytest.approx(beta * of_gibbs, abs=1e-12)
    assert [run["completions"] for run in runs] == [512] * 4
    assert [run["gradient_steps"] for run in runs] == [2, 2, 4, 2]
    assert all(run["kl"] < found["reference"]["kl"] for run in runs), "each came nearer"


def test_the_rewards_are_those_of_the_formula(short):
    """The golden ratio's multiples, 4·frac((n + 1)·0.618…), in the order of the completions."""
    _, _, found = short
    golden = (math.sqrt(5) - 1) / 2
    expected = [4 * math.modf(golden * (n + 1))[0] for n in range(15)]
    assert list(found["rewards"].values()) == pytest.approx(expected)
    assert oracle_check.reward_of(1, [2, 1, 0]) == found["rewards"]["ba"], "the end adds nothing"


def test_a_seed_decides_everything():
    first = check(Problem(1.0), ["rwr", "ppo"], seeds=2, rollouts=2)
    assert check(Problem(1.0), ["rwr", "ppo"], seeds=2, rollouts=2) == first
    assert [run.seed for result in first for run in result.runs] == [0, 1, 0, 1]
    assert first[0].runs[0].probabilities != first[0].runs[1].probabilities


def test_when_it_first_was_near():
    """With β = 1000 π* is all but π_ref: near from the first look on, after two rollouts of 256.

    One rollout has no look but that at the end.
    """
    problem = Problem(1000.0)
    for rollouts, completions in ((4, 512), (1, 256)):
        for result in check(problem, ["rwr", "ppo"], seeds=1, rollouts=rollouts):
            assert result.runs[0].completions_until_close == completions
            assert result.runs[0].converged


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([512], "512"),
        ([512, 1024], "768 (512 to 1024)"),
        ([None, None], "never"),
        ([512, None, 1024], "768 (512 to 1024), never in 1 of 3"),
    ],
)
def test_several_seeds_in_a_cell(counts, says):
    assert command._until_near(counts) == says


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--trainer", "reinfroce"], "no trainer called 'reinfroce'. Did you mean 'reinforce'?"),
        (["--trainer", "sft"], "--trainer sft: SFTTrainer is no trl_ext PolicyTrainer."),
        (["--trainer", "mine_for_the_check:five"], "an object of type int is no trl_ext Policy"),
        (["--trainer", "mine_for_the_check:six"], "cannot be loaded: AttributeError"),
        (["--seeds", "0"], "--seeds: must be a whole number of at least 1, got '0'"),
        (["--steps", "1.5"], "--steps: must be a whole number of at least 1, got '1.5'"),
        (["--steps", "-3"], "--steps: must be a whole number of at least 1, got '-3'"),
        (["--beta", "0"], "--beta: must be a number greater than 0, got '0'"),
        (["--beta", "inf"], "--beta: must be a number greater than 0, got 'inf'"),
        (["--beta", "nan"], "--beta: must be a number greater than 0, got 'nan'"),
        (["--beta", "x"], "--beta: must be a number greater than 0, got 'x'"),
        (["--json", "no/such/file.json"], "--json no/such/file.json: cannot be written"),
        (["--json", "."], "--json .: cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_before_anything_is_trained(trl_ext, mine, monkeypatch, argv, says):
    monkeypatch.setattr(oracle_check, "_trained", lambda *_: pytest.fail("trained"))
    code, out, err = trl_ext("--trainer", "rwr", *argv)
    assert code == 2 and says in err and out == ""


def test_it_is_said_what_can_be_named_instead(trl_ext):
    _, _, err = trl_ext("--trainer", "sft")
    assert "Name one of grpo, reinforce, ppo, rwr, or your own class derived from" in err


def test_ones_own_trainer(trl_ext, mine):
    """Derived from RWRTrainer and otherwise unchanged: the same number for number."""
    own = "mine_for_the_check:MineTrainer"
    code, out, err = trl_ext("--steps", "2", "--trainer", "rwr", "--trainer", own)
    assert (code, err) == (0, "")
    rows = cells(out)
    assert rows[own] == rows["rwr"]


def test_whose_settings_a_trainer_has(mine):
    for name in SETTINGS:
        assert settings_of(name, load_trainer(name)) == SETTINGS[name]
    for name, expected in (("MineTrainer", SETTINGS["rwr"]), ("PlainTrainer", {})):
        own = f"mine_for_the_check:{name}"
        assert settings_of(own, load_trainer(own)) == expected


def test_the_exit_code(trl_ext, mine, monkeypatch):
    """Two rollouts are too few; that counts where they are the default, of what is built in."""
    own = "mine_for_the_check:MineTrainer"
    assert trl_ext("--steps", "2", "--trainer", "rwr")[0] == 0
    monkeypatch.setattr(command, "STEPS", 2)
    code, out, err = trl_ext("--trainer", "rwr", "--trainer", own, "--seeds", "2")
    assert code == 1 and "rwr" in cells(out)
    for seed in (0, 1):
        assert f"Not near: rwr, seed {seed}: KL(π‖π*) is 0." in err
    assert own not in err and "must be below 0.01" in err
    assert trl_ext("--trainer", own)[0] == 0
    assert trl_ext("--trainer", "rwr", "--beta", "2")[0] == 0
    monkeypatch.setattr(command, "BETA", 1000.0)  # whose π* is where training begins
    code, _, err = trl_ext("--trainer", "rwr")
    assert (code, err) == (0, "")


def test_a_policy_that_diverged_is_not_near_and_is_null_in_json(tmp_path):
    run = oracle_check.Run(math.nan, 1.0, math.nan, {"a": math.nan}, 0, 256, 1, None)
    assert not run.converged
    write_json_file({"run": vars(run)}, tmp_path / "t.json")
    written = json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)
    assert written["run"]["kl"] is None and written["run"]["reward"] == 1.0


@pytest.mark.slow
def test_nothing_of_libraries_is_printed():
    """In a process of its own, where no warning has been given before and none is captured."""
    names = [part for name in SETTINGS for part in ("--trainer", name)]
    result = subprocess.run(
        [sys.executable, "-m", "trl_ext", "oracle-check", "--steps", "2", *names],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert list(cells(result.stdout)) == ["π*", "π_ref", *SETTINGS]
    assert len(result.stdout.splitlines()) == 3 + 1 + 1 + 6


@pytest.mark.slow
def test_the_check_passes(trl_ext):
    """At the default settings, with room to spare: the first quarter of the completions is enough.

    A wrong penalty ends 0.02 to 0.05 away (below); where these come to is under 0.001.
    """
    code, out, err = trl_ext()
    assert (code, err) == (0, "")
    rows = cells(out)
    assert list(rows) == ["π*", "π_ref", *SETTINGS]
    for name in SETTINGS:
        distance, _, _, completions, _, until_near = rows[name]
        assert float(distance) < 1e-3 and completions == "76800" and int(until_near) < 76_800 / 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rollouts", "at_least"),
    [("BrokenTrainer", 60, 1.0), ("PlainTrainer", 300, 0.03)],
    ids=["the sign of the credit is wrong", "the penalty is TRL's by default"],
)
def test_a_trainer_with_another_fixed_point_fails(mine, name, rollouts, at_least):
    own = f"mine_for_the_check:{name}"
    (result,) = check(Problem(command.BETA), [own], seeds=1, rollouts=rollouts)
    assert result.runs[0].kl > at_least and not result.runs[0].converged
