"""A scorer by rollouts: scores by hand, what is shared, what has ended, what rewards are given."""

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_byte_llama, save_tiny_llama
from trl_ext.errors import ConfigError, DataError, RewardError
from trl_ext.functional.monte_carlo import log_mean_exp_standard_error
from trl_ext.gibbs_prm.monte_carlo import MonteCarloScorer
from trl_ext.oracle import tabular_tokenizer

# exp(r/β) = 2^r, and β·log is the logarithm to base 2.
BETA = 1 / math.log(2)


class Canned:
    """Rollouts that were written down: of each prefix, the prompt's tokens included."""

    max_completion_length = 4
    end_ids = frozenset([0])
    note: str | None = None

    def __init__(self, rollouts):
        self.rollouts = rollouts
        self.asked = []

    def sample(self, prefixes, num_rollouts, *, prompt_lengths=None, seed=0):
        self.asked.append((prefixes, num_rollouts, prompt_lengths, seed))
        return [self.rollouts[tuple(prefix)] for prefix in prefixes]


ROLLOUTS = {
    (1,): [[2, 0], [3, 0]],  # b, c: rewards 1, 0
    (1, 2): [[0], [2, 0]],  # b, bb: 1, 2
    (1, 2, 3): [[0], [2, 2]],  # bc, bcbb: 1, 3
    (1, 3): [[0], [3, 0]],  # c, cc: 0, 0
    (4,): [[2, 2, 2, 2], [2, 0]],  # bbbb, b: 4, 1
}


def count_b(completions, **kwargs):
    return [completion.count("b") for completion in completions]


def scorer(reward: Any = count_b, rollouts=None, beta: Any = BETA, **options) -> Any:
    chosen: dict[str, Any] = {
        "tokenizer": tabular_tokenizer(5),
        "sampler": Canned(rollouts or ROLLOUTS),
    }
    return MonteCarloScorer(None, reward, beta, 2, **chosen | options)


@pytest.mark.equation("E23", "E25")
def test_by_hand():
    """Mean weights 3/2, 3 and 5, of weights (2,1), (2,4) and (2,8), whose standard errors
    sd/(mean·√2) are 1/3, 1/3 and 3/5 nats, and whose effective sizes are 9/5, 36/20, 100/68."""
    found = scorer()
    (scored,) = found.score(["a"], ["bc"], "token")
    assert scored.steps == ["b", "c"]
    assert scored.step_ends == [1, 2]
    assert scored.prefix_scores == pytest.approx([1.0, math.log2(10 / 3)])
    assert scored.standard_errors == pytest.approx([BETA / 3, BETA * 3 / 5])
    assert scored.log_z == pytest.approx(math.log(1.5))
    assert scored.log_z_standard_error == pytest.approx(1 / 3)
    assert scored.rollout_rewards == [[1.0, 2.0], [1.0, 3.0]]
    assert scored.effective_sample_sizes == pytest.approx([9 / 5, 25 / 17])
    assert scored.is_believed == [False, False]
    assert (scored.prompt, scored.completion, scored.beta) == ("a", "bc", BETA)
    assert scored.merged_into == [0, 1]
    assert found.sampler.asked == [([[1], [1, 2], [1, 2, 3]], 2, [1, 1, 1], 0)]
    (note,) = scored.notes
    assert "standard error of log Z may not be believed" in note


def test_nothing_to_note():
    """Twenty of 40 win: 36 effective rollouts behind the mean, 40 behind the variance."""
    half = Canned({(1,): [[2, 0]] * 20 + [[3, 0]] * 20})
    (scored,) = scorer(sampler=half).score(["a"], [""])
    assert scored.notes == []


@pytest.mark.parametrize(("options", "ids"), [({}, [[2, 3, 0]]), ({"append_eos": True}, None)])
def test_what_has_ended_has_its_own_reward(options, ids):
    """ "bc" and the end token: reward 1 without any rollout, so 1 − log2 1.5."""
    found = scorer(seed=5)
    (scored,) = found.score(["a"], ["bc"], "token", completion_ids=ids, **options)
    expected = [1.0, math.log2(10 / 3), 1 - math.log2(1.5)]
    assert scored.prefix_scores == pytest.approx(expected)
    assert scored.standard_errors == pytest.approx([BETA / 3, BETA * 3 / 5, 0.0])
    assert scored.is_believed[-1] is True
    assert scored.rollout_rewards[-1] == [1.0]
    assert scored.effective_sample_sizes[-1] == 1.0
    assert found.sampler.asked == [([[1], [1, 2], [1, 2, 3]], 2, [1, 1, 1], 5)]


def test_what_has_the_full_length_has_ended():
    """bbbb is as long as a completion gets: reward 4, 4 − log2((16 + 2)/2)."""
    (scored,) = scorer().score(["d"], ["bbbb"], "whole")
    assert scored.prefix_scores == pytest.approx([4 - math.log2(9)])
    assert scored.standard_errors == [0.0]


def test_an_empty_completion():
    """No step; log Z all the same."""
    (scored,) = scorer().score(["a"], [""])
    assert scored.prefix_scores == scored.steps == scored.standard_errors == []
    assert scored.score == 0
    assert scored.log_z == pytest.approx(math.log(1.5))


def test_completions_of_a_prompt_share_rollouts():
    found = scorer()
    scored = found.score(["a", "d", "a"], ["bc", "", "b"], ["token", "whole", "whole"])
    assert [prefix for prefix, *_ in [found.sampler.asked[0]]] == [[[1], [1, 2], [1, 2, 3], [4]]]
    assert scored[0].log_z == scored[2].log_z
    assert scored[2].prefix_scores == scored[0].prefix_scores[:1]
    assert scored[1].log_z == pytest.approx(math.log(9))


def with_bonus(completions, bonus, **kwargs):
    return [
        completion.count("b") + extra for completion, extra in zip(completions, bonus, strict=True)
    ]


def test_columns_go_to_the_reward_and_part_prompts():
    """A bonus of 1 doubles every weight, so that scores stay and log Z grows by log 2."""
    found = scorer(with_bonus)
    scored = found.score(["a"] * 3, ["b"] * 3, "whole", bonus=[0, 1, 1])
    assert len(found.sampler.asked[0][0]) == 4
    assert [each.log_z for each in scored] == pytest.approx(
        [math.log(1.5), math.log(3), math.log(3)]
    )
    assert [each.prefix_scores[0] for each in scored] == pytest.approx([1.0, 1.0, 1.0])
    assert scored[1].rollout_rewards == [[2.0, 3.0]]


def test_columns_that_cannot_be_compared_are_not_shared():
    found = scorer(lambda completions, answer, **_: [float(a[0]) for a in answer])
    found.score(["a", "a"], ["", ""], answer=[torch.ones(2), torch.ones(2)])
    assert len(found.sampler.asked[0][0]) == 2


def test_the_reward_is_called_as_trl_calls_it():
    """Whole completions, decoded without the end token, with ids; one call for each prefix."""
    calls = []

    def spy(prompts, completions, completion_ids, label, prompt_ids):
        calls.append((prompts, completions, completion_ids, label, prompt_ids))
        return [0.0] * len(completions)

    scorer(spy).score(["a"], ["bc"], "whole", label=["x"])
    assert calls == [
        (["a"] * 2, ["b", "c"], [[2, 0], [3, 0]], ["x"] * 2, [[1]] * 2),
        (["a"] * 2, ["bc", "bcbb"], [[2, 3, 0], [2, 3, 2, 2]], ["x"] * 2, [[1]] * 2),
    ]


def test_a_text_is_decoded_as_its_rollouts_are():
    seen = []

    def spy(prompts, completions, completion_ids):
        seen.append((completions, completion_ids))
        return [0.0] * len(completions)

    scorer(spy).score(["a"], ["bc<eos>"], "whole")
    assert seen[0] == (["bc"], [[2, 3, 0]])


def test_columns_that_hold_mappings():
    found = scorer(lambda completions, info, **_: [len(each) for each in info])
    found.score(["a"] * 3, [""] * 3, info=[{"x": 1}, {"x": 1, "y": 2}, {"x": 1}])
    assert len(found.sampler.asked[0][0]) == 2


async def count_b_later(completions, **kwargs):
    return count_b(completions)


@pytest.mark.parametrize(
    "reward",
    [count_b_later, {"name": f"{__name__}:Counting", "letter": "b"}, f"{__name__}:count_b"],
)
def test_other_kinds_of_rewards(reward):
    (scored,) = scorer(reward).score(["a"], ["bc"], "token")
    assert scored.prefix_scores == pytest.approx([1.0, math.log2(10 / 3)])


class Counting:
    """A factory's product, as recipes name them; it looks at the tokenizer."""

    def __init__(self, letter):
        self.letter = letter
        self.seen = None

    def check_tokenizer(self, tokenizer):
        self.seen = tokenizer

    def __call__(self, completions, **kwargs):
        assert self.seen is not None
        return [completion.count(self.letter) for completion in completions]


def none_for_bb(completions, **kwargs):
    return [None if "bb" in completion else completion.count("b") for completion in completions]


def test_rollouts_without_a_reward_are_left_out():
    """Of (b, bb) the second: weight 2 alone, β·log(2/1.5), without an error to tell."""
    (scored,) = scorer(none_for_bb).score(["a"], ["b"], "whole")
    assert scored.rollout_rewards == [[1.0]]
    assert scored.prefix_scores == pytest.approx([math.log2(4 / 3)])
    assert math.isnan(scored.standard_errors[0])
    assert scored.is_believed == [False]
    assert any(
        note == "the reward does not apply to 1 of 2 rollouts of step 0, which are left out"
        for note in scored.notes
    )


@pytest.mark.parametrize(
    ("reward", "row", "says"),
    [
        (
            lambda completions, **_: [None] * len(completions),
            ["", None],
            "for all 2 rollouts from 0",
        ),
        (lambda completions, **_: [None] * len(completions), ["b", [2, 0]], "completion of row 0"),
        (lambda completions, **_: [math.nan] * len(completions), ["", None], "is not a number"),
        (lambda completions, **_: [0.0], ["", None], "returned 1 values for 2"),
        (lambda completions, **_: 1 / 0, ["", None], "ZeroDivisionError"),
    ],
)
def test_rewards_that_fail(reward, row, says):
    reward.__name__ = "grade"
    completion, ids = row
    with pytest.raises(RewardError, match=says) as caught:
        scorer(reward).score(["a"], [completion], "whole", completion_ids=ids and [ids])
    assert "'grade'" in str(caught.value)


def test_a_failing_completion_costs_no_rollout():
    found = scorer(lambda completions, **_: [None] * len(completions))
    with pytest.raises(RewardError):
        found.score(["a"], ["b"], completion_ids=[[2, 0]])
    assert found.sampler.asked == []


def test_rewards_that_only_a_trainer_can_feed():
    with pytest.raises(ConfigError, match="The reward is a model, Linear"):
        scorer(torch.nn.Linear(2, 1))
    with pytest.raises(ConfigError, match=r"log-probabilities of a trainer's reference"):
        scorer(lambda completions, ref_per_token_logps: [])


def test_given_steps_of_each_row():
    first, second = scorer().score(["a", "a"], ["bc", "bc"], [["b", "c"], [2]])
    assert first.steps == ["b", "c"]
    assert second.steps == ["bc"]
    assert second.prefix_scores == first.prefix_scores[1:]


def test_nothing_to_score():
    assert scorer().score([], []) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"completions": ["b", "c"]}, "prompts has 1 values, and completions has 2 values"),
        ({"completion_ids": [[2], [3]]}, "completion_ids has 2 values"),
        ({"label": ["x", "y"]}, "label has 2 values"),
        ({"label": "x"}, "label is a str"),
        ({"prompts": "a"}, "prompts is a str"),
        ({"steps": ["newline", "token"]}, "steps has 2 values"),
        ({"steps": "lines"}, "Did you mean 'newline'"),
        ({"steps": ["lines"]}, "Did you mean 'newline'"),
        ({"completions": ["bcbcb"]}, "Row 0 has a completion of 5 tokens, .* is 4"),
    ],
)
def test_arguments_that_do_not_fit(arguments, says):
    given = {"prompts": ["a"], "completions": ["b"]} | arguments
    with pytest.raises(ConfigError, match=says):
        scorer().score(**given)


def test_an_end_token_in_the_middle():
    with pytest.raises(
        DataError, match=r"token 1 \(from 0\) of the completion, 0, .* 1 more follow"
    ):
        scorer().score(["a"], ["bc"], completion_ids=[[2, 0, 3]])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"beta": 0}, "beta is 0; it must be a positive number"),
        ({"beta": math.inf}, "beta is inf"),
        ({"beta": True}, "beta is True"),
        ({"beta": "0.1"}, r"beta is '0\.1'"),
        ({"temperature": 0.5, "batch_size": 2}, "also temperature, batch_size"),
        ({"max_completion_length": 4}, "also max_completion_length"),
        ({"sampler": None, "max_completion_length": 4}, "model is missing"),
        ({"sampler": None, "temperature": 0}, r"temperature is 0; it must be a positive number\."),
        ({"tokenizer": None}, "no tokenizer beside the model"),
    ],
)
def test_settings_out_of_range(arguments, says):
    with pytest.raises(ConfigError, match=says):
        scorer(**arguments)


@pytest.mark.parametrize(
    ("count", "says"), [(1, "needs 2 or more"), (True, "num_rollouts is True")]
)
def test_numbers_of_rollouts_out_of_range(count, says):
    with pytest.raises(ConfigError, match=says):
        MonteCarloScorer(None, count_b, 1.0, count, tokenizer=1, sampler=Canned(ROLLOUTS))


def test_a_model_beside_a_sampler():
    with pytest.raises(ConfigError, match="also model"):
        MonteCarloScorer(1, count_b, 1.0, 2, tokenizer=1, sampler=Canned(ROLLOUTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_a_model_from_its_path_or_as_an_object(folder):
    """32 rollouts of each prefix; the same seed makes the same scores."""
    options: dict[str, Any] = {"max_completion_length": 5, "batch_size": 7}
    paths = MonteCarloScorer(folder, count_b, 1.0, 32, **options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    objects = MonteCarloScorer(
        model, count_b, 1.0, 32, tokenizer=AutoTokenizer.from_pretrained(folder), **options
    )
    given = (["ab", "c"], ["bca", "b"], "token")
    scored = paths.score(*given)
    assert scored == objects.score(*given) == paths.score(*given)
    other = MonteCarloScorer(folder, count_b, 1.0, 32, seed=1, **options)
    assert [each.log_z for each in other.score(*given)] != [each.log_z for each in scored]
    for each in scored:
        rewards = torch.tensor(each.rollout_rewards, dtype=torch.float64)
        assert rewards.shape == (len(each.steps), 32)
        assert each.standard_errors == pytest.approx(
            log_mean_exp_standard_error(rewards, 1.0).tolist()
        )
    # The completion's own letters count in each of its rollouts.
    assert min(scored[1].rollout_rewards[0]) >= 1


def test_settings_reach_the_sampler(folder):
    own: Any = MonteCarloScorer(
        folder,
        count_b,
        1.0,
        2,
        max_completion_length=5,
        temperature=0.5,
        stop_token_ids=[3],
        batch_size=9,
    ).sampler
    assert (own.max_completion_length, own.temperature, own.batch_size) == (5, 0.5, 9)
    assert own.end_ids == {0, 3}
    with pytest.raises(ConfigError, match="max_completion_length is missing"):
        MonteCarloScorer(folder, count_b, 1.0, 2)


def test_a_note_of_the_sampler_reaches_the_reader():
    noted = Canned(ROLLOUTS)
    noted.note = "read anew"
    (scored,) = scorer(sampler=noted).score(["a"], ["b"])
    assert "read anew" in scored.notes


def test_messages(tmp_path):
    """Rollouts become an assistant's message; what has ended is given to the reward as it is."""
    folder = save_byte_llama(tmp_path)
    seen = []

    def spy(prompts, completions, **kwargs):
        seen.append((prompts[0], completions))
        return [1.0] * len(completions)

    found = MonteCarloScorer(folder, spy, 1.0, 2, max_completion_length=12)
    prompt = [{"role": "user", "content": "hi"}]
    answer = [{"role": "assistant", "content": "ho", "thinking": "no"}]
    (scored,) = found.score([prompt], [answer], "whole")
    assert scored.steps[0].startswith("ho")
    assert all(one == prompt for one, _ in seen)
    for _, completions in seen:
        assert [[message["role"] for message in each] for each in completions] == [
            ["assistant"]
        ] * 2
    assert all(each[0]["content"].startswith("ho") for each in seen[1][1])
    ended = [AutoTokenizer.from_pretrained(folder)("ho")["input_ids"] + [0]]
    seen.clear()
    found.score([prompt], [answer], "whole", completion_ids=ended)
    assert seen[0] == (prompt, [answer])


def test_a_prompt_in_two_forms_is_two_prompts(tmp_path):
    """The same tokens, but the reward is given messages for one and texts for the other."""
    seen = []

    def spy(prompts, completions, **kwargs):
        seen.append(type(prompts[0]))
        return [1.0] * len(completions)

    found = MonteCarloScorer(save_byte_llama(tmp_path), spy, 1.0, 2, max_completion_length=3)
    found.score([[{"role": "user", "content": "hi"}], "user: hi\nassistant: "], [[], ""])
    assert seen == [list, str]


def test_others_who_speak(tmp_path):
    found = MonteCarloScorer(save_byte_llama(tmp_path), count_b, 1.0, 2, max_completion_length=90)
    prompt = [{"role": "user", "content": "hi"}]
    turns = [
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "he"},
        {"role": "assistant", "content": "ha"},
    ]
    with pytest.raises(DataError, match="others than the policy speak in the completion"):
        found.score([prompt], [turns])
