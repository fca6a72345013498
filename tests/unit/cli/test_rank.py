"""`rank`: what a scored file says, once the truth is known."""

import json
from pathlib import Path

import pytest

from trl_ext.gibbs_prm.scored import GibbsScores
from trl_ext.gibbs_prm.scored_file import ScoredFile
from trl_ext.gibbs_prm.scored_row import ScoredRow


def scored(row: int, sample: int, rewards: list[float], **known) -> ScoredRow:
    """A completion whose steps have these rewards, of the prompt "q<row>"."""
    steps = [f"s{k}\n" for k in range(len(rewards))]
    sums = [sum(rewards[: k + 1]) for k in range(len(rewards))]
    scores = GibbsScores(
        prompt=f"q{row}",
        completion="".join(steps) + f"[{sample}]",
        steps=steps,
        step_ends=list(range(1, len(rewards) + 1)),
        prefix_scores=sums,
        beta=1.0,
        merged_into=list(range(len(rewards))),
        tokens=steps,
        token_log_ratios=rewards,
    )
    return ScoredRow(row, sample, scores, **known)


def write(path: str, rows: list[ScoredRow]) -> None:
    file = ScoredFile(Path(path), {})
    file.write(rows)
    file.finish()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Two prompts, four completions each: the best of the first is right, of the second wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    rows = [
        scored(0, k, [score], label=right, answer=answer)
        for k, (score, right, answer) in enumerate(
            [(3.0, True, "4"), (2.0, False, "5"), (1.0, False, "5"), (0.0, False, "6")]
        )
    ] + [
        scored(1, k, [score], label=right, answer=answer)
        for k, (score, right, answer) in enumerate(
            [(0.0, True, "1"), (1.0, True, "1"), (2.0, False, "2"), (-1.0, True, "1")]
        )
    ]
    write("s.jsonl", rows)
    return tmp_path


def test_ranks_are_written_with_their_rows(here, trl_ext):
    code, out, err = trl_ext("rank", "s.jsonl", "--output", "r.jsonl")
    assert code == 0, err
    assert "8 completions of 2 prompts" in out
    lines = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [(x["row"], x["sample"], x["rank"]) for x in lines] == [
        (0, 0, 1.0), (0, 1, 2.0), (0, 2, 3.0), (0, 3, 4.0),
        (1, 2, 1.0), (1, 1, 2.0), (1, 0, 3.0), (1, 3, 4.0),
    ]  # fmt: skip
    assert lines[0]["completion"] == "s0\n[0]" and lines[0]["label"] is True
    code, _, err = trl_ext("rank", "s.jsonl", "--output", "r.jsonl")
    assert code == 2 and "the file exists and is left alone" in err


def test_labels_tell_how_good_the_scores_are(here, trl_ext):
    """q0: the right one is above 3 of 3; q1: the wrong one is above all: 0 of 3. Best of 4: ½.

    Majority of 4: "5" is wrong, "1" is right: ½. n = 1: (¼ + ¾)/2. Best of 2: of q0 the right one
    wins in 3 of 6 pairs; of q1 the wrong one in 3 of 6.
    """
    code, out, err = trl_ext("rank", "s.jsonl", "--json", "n.json")
    assert code == 0, err
    assert "in 50.0% of pairs (95%: 0.0% to 100.0%); 6 pairs of 2 prompts" in out
    found = json.loads(Path("n.json").read_text())
    assert found["separation"]["probability"] == 0.5
    by_n = {row["n"]: row for row in found["best_of_n"]}
    assert list(by_n) == [1, 2, 4]
    assert [by_n[n]["best"]["mean"] for n in by_n] == [0.5, 0.5, 0.5]
    assert by_n[4]["majority"]["mean"] == 0.5
    assert by_n[4]["pass_at_n"]["mean"] == 1.0
    assert by_n[4]["tokens"] == 4.0
    assert "majority" in out and "chance" in out
    assert "first_error" not in found and "agreement" not in found
    assert "Fewer than 30 prompts (separation 2, best of n 2): the intervals are only a" in out


def test_first_errors_by_a_tuned_threshold(here, trl_ext):
    """Rows 0 and 2 tune: −2 is an error and −0.5 is none, so −1.25. Rows 1 and 3 are judged."""
    rows = [
        scored(0, 0, [0.1, -2.0, 0.3], first_error=1),
        scored(1, 0, [0.0, 0.2, -3.0], first_error=2),
        scored(2, 0, [0.1, -0.5], first_error=-1),
        scored(3, 0, [-1.5, 0.1], first_error=-1),
    ]
    write("e.jsonl", rows)
    code, out, err = trl_ext("rank", "e.jsonl", "--json", "n.json")
    assert code == 0, err
    found = json.loads(Path("n.json").read_text())["first_error"]
    assert found["threshold"] == pytest.approx(-1.25) and found["tuned"] == 1.0
    # −3 is found; −1.5 is taken for an error, and was none.
    assert (found["accuracy_error"], found["accuracy_correct"], found["f1"]) == (1.0, 0.0, 0.0)
    assert "tuned on every other solution" in out
    write("v.jsonl", [rows[0], scored(1, 0, [-1.5], first_error=-1)])
    code, out, err = trl_ext("rank", "e.jsonl", "--validation", "v.jsonl", "--json", "n.json")
    found = json.loads(Path("n.json").read_text())["first_error"]
    assert found["threshold"] == pytest.approx(-1.75) and found["f1"] == 1.0
    assert "tuned on v.jsonl" in out


def test_steps_that_became_one_keep_their_label(here, trl_ext):
    """Of four given steps the second and third became one: an error in either is in step 1."""
    row = scored(0, 0, [0.5, -2.0, 0.5], first_error=2)
    merged = GibbsScores(**{**vars(row.scores), "merged_into": [0, 1, 1, 2]})
    right = scored(1, 0, [0.5], first_error=-1)
    write("v.jsonl", [ScoredRow(0, 0, merged, first_error=2), right])
    code, _, err = trl_ext("rank", "v.jsonl", "--validation", "v.jsonl", "--json", "n.json")
    assert code == 0, err
    assert json.loads(Path("n.json").read_text())["first_error"]["f1"] == 1.0


def test_two_scorings_agree(here, trl_ext):
    rows = [scored(0, k, [float(k), 1.0]) for k in range(3)]
    other = [scored(0, k, [2.0 * k, 0.5]) for k in range(3)]
    write("a.jsonl", rows)
    write("b.jsonl", other)
    code, out, err = trl_ext("rank", "a.jsonl", "--against", "b.jsonl")
    assert code == 0, err
    # 0,1,1,2,2,3 against 0,.5,2,2.5,4,4.5: none the other way round, two ties: 13/√(13·15).
    assert "Kendall's tau-b 0.931, Spearman's rho" in out
    assert "Fewer than 30 prompts (agreement 1): the intervals" in out
    write("c.jsonl", other[:2])
    code, _, err = trl_ext("rank", "a.jsonl", "--against", "c.jsonl")
    assert code == 2 and "it has no completion 2 of row 0" in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["no.jsonl"], "There is no scored file 'no.jsonl'"),
        (["s.jsonl", "--n", "8"], "8 is more than the 4 completions that a prompt has"),
        (["s.jsonl", "--n", "0,2"], "must be whole numbers from 1"),
        (["s.jsonl", "--n", "a"], "must be whole numbers from 1"),
        (["s.jsonl", "--validation", "s.jsonl"], "has no first errors to be judged by"),
        (["plain.jsonl", "--n", "2"], "has no labels"),
        (["in.jsonl"], "this is no scored completion"),
        (["s.jsonl", "--json", "no/n.json"], "Name a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line(here, trl_ext, argv, says):
    write("plain.jsonl", [scored(0, 0, [1.0]), scored(0, 1, [2.0])])
    Path("in.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    code, _, err = trl_ext("rank", *argv)
    assert code == 2
    assert says in err and "Traceback" not in err


def test_ranks_of_ranks_are_new(here, trl_ext):
    """The rank that a row had in the file is not the one that it has now."""
    assert trl_ext("rank", "s.jsonl", "--output", "r.jsonl")[0] == 0
    lines = Path("r.jsonl").read_text().splitlines()
    Path("rest.jsonl").write_text("\n".join(lines[1:4]) + "\n")
    assert trl_ext("rank", "rest.jsonl", "--output", "again.jsonl")[0] == 0
    again = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in again] == [1.0, 2.0, 3.0]


def test_many_completions_of_one_prompt(here, trl_ext):
    """Ranks of 20000, equal in pairs: (1 + 2)/2 and so on; all pairs would be 4·10⁸ numbers."""
    write("many.jsonl", [scored(0, k, [float(k // 2)]) for k in range(20_000)])
    code, _, err = trl_ext("rank", "many.jsonl", "--output", "r.jsonl")
    assert code == 0, err
    ranks = [json.loads(line)["rank"] for line in Path("r.jsonl").read_text().splitlines()]
    assert ranks == [2 * (k // 2) + 1.5 for k in range(20_000)]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--output", "s.jsonl", "--force"], "FILE and --output are one file"),
        (["--json", "s.jsonl"], "FILE and --json are one file"),
        (["--output", "r.jsonl", "--json", "r.jsonl"], "--output and --json are one file"),
        (["--against", "b.jsonl", "--json", "b.jsonl"], "--against and --json are one file"),
        (["--validation", "s.jsonl"], "has no first errors"),
    ],
)
def test_no_file_replaces_another(here, trl_ext, argv, says):
    before = Path("s.jsonl").read_text()
    Path("b.jsonl").write_text(before)
    code, _, err = trl_ext("rank", "s.jsonl", *argv)
    assert code == 2 and says in err
    assert Path("s.jsonl").read_text() == Path("b.jsonl").read_text() == before


def test_a_validation_without_first_errors(here, trl_ext):
    write("e.jsonl", [scored(0, 0, [-1.0], first_error=0), scored(1, 0, [1.0], first_error=-1)])
    code, _, err = trl_ext("rank", "e.jsonl", "--validation", "s.jsonl")
    assert code == 2 and "--validation s.jsonl: it has no first errors to tune by" in err


def test_scores_of_two_betas_do_not_compare(here, trl_ext):
    other = scored(0, 1, [1.0])
    scores = GibbsScores(**{**vars(other.scores), "beta": 2.0})
    write("two.jsonl", [scored(0, 0, [1.0]), ScoredRow(0, 1, scores)])
    code, _, err = trl_ext("rank", "two.jsonl")
    assert code == 2 and "with beta 1 and 2: their scores do not compare" in err


def test_without_answers_nobody_votes(here, trl_ext):
    write("p.jsonl", [scored(0, k, [float(k)], label=k == 1) for k in range(2)])
    code, out, err = trl_ext("rank", "p.jsonl", "--json", "n.json")
    assert code == 0, err
    assert "majority" not in out
    row = json.loads(Path("n.json").read_text())["best_of_n"][-1]
    assert set(row) == {"n", "tokens", "best", "random", "pass_at_n"}
    assert row["best"]["mean"] == 1.0


def test_thirty_prompts_are_enough_for_an_interval(here, trl_ext):
    """29 prompts are warned of, and of 30 as many only as have a right and a wrong completion."""

    def rows(prompts: int, mixed: int) -> list[ScoredRow]:
        return [
            scored(row, k, [float(k)], label=k == 1 and row < mixed)
            for row in range(prompts)
            for k in range(2)
        ]

    for prompts, mixed, says in (
        (29, 29, "(separation 29, best of n 29)"),
        (30, 29, "(separation 29)"),
        (30, 30, None),
    ):
        write("few.jsonl", rows(prompts, mixed))
        code, out, err = trl_ext("rank", "few.jsonl")
        assert code == 0, err
        assert f"Fewer than 30 prompts {says}" in out if says else "Fewer" not in out
        Path("few.jsonl").unlink()


def test_ranks_alone_have_no_interval(here, trl_ext):
    write("plain.jsonl", [scored(0, 0, [1.0]), scored(0, 1, [2.0])])
    code, out, _ = trl_ext("rank", "plain.jsonl")
    assert code == 0 and "Fewer" not in out


def test_all_files_in_the_way_are_named(here, trl_ext):
    code, _, err = trl_ext("rank", "s.jsonl", "--output", "s.txt", "--json", "no/n.json")
    assert code == 2 and "--output s.txt: " in err and "--json no/n.json: cannot" in err
