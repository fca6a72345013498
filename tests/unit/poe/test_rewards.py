"""Rewards of products of experts: numbers against loops, what they open, what they refuse."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from trl import GRPOConfig, GRPOTrainer

from tests.tiny import (
    QUIET,
    VOCABULARY,
    count_a,
    prompts,
    save_byte_llama,
    save_tiny_llama,
)
from trl_ext.errors import ConfigError, DataError, RewardError
from trl_ext.models.adapter import Adapter
from trl_ext.oracle import tabular_tokenizer
from trl_ext.poe.counted import NGramExpert
from trl_ext.poe.product import ProductOfExperts
from trl_ext.poe.reward_models import reward_model
from trl_ext.poe.rewards import log_ratio, minus_reference
from trl_ext.poe.scoring import completion_log_probs
from trl_ext.reinforce import ReinforceConfig, ReinforceTrainer
from trl_ext.rewards import build_rewards

SMALL: dict[str, Any] = {
    **QUIET,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_steps": 2,
}
PROMPTS = ["a", "abc", "ba", "c"]
COMPLETIONS = ["bc", "a", "abcde", "ee"]
IDS = [[2, 3, 0], [1, 0], [1, 2, 3, 4, 5], [5, 5]]
PROMPT_IDS = [[1], [1, 2, 3], [2, 1], [3]]
BATCH: dict[str, Any] = {
    "prompts": PROMPTS,
    "completions": COMPLETIONS,
    "completion_ids": IDS,
    "prompt_ids": PROMPT_IDS,
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def expert(tmp_path_factory) -> str:
    """The same shape and tokenizer as the policy, other weights."""
    folder = tmp_path_factory.mktemp("expert")
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(folder))
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text("abcabc\nbca\n\naabbc\n")
    return str(file)


def by_loop(model: Any) -> list[list[float]]:
    """log P of each token of IDS, a text at a time, without padding."""
    rows = []
    for prompt, completion in zip(PROMPT_IDS, IDS, strict=True):
        with torch.no_grad():
            logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        place = len(prompt) - 1
        rows.append([logps[place + t, token].item() for t, token in enumerate(completion)])
    return rows


def less(rows: list[list[float]], others: list[list[float]]) -> list[list[float]]:
    return [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(rows, others, strict=True)]


def assert_rows(rows: Any, expected: list[list[float]]) -> None:
    assert [len(row) for row in rows] == [len(row) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-5)


@pytest.mark.equation("E13", "E16")
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_log_ratio_of_two_models_is_what_a_loop_gives(policy, expert, batch_size):
    first, second = (AutoModelForCausalLM.from_pretrained(path) for path in (expert, policy))
    expected = less(by_loop(first), by_loop(second))
    dense = log_ratio(expert, reference=policy, batch_size=batch_size)
    assert_rows(dense(**BATCH), expected)
    summed = log_ratio(first, reference=second, per_token=False)
    assert summed(**BATCH) == pytest.approx([sum(row) for row in expected], abs=1e-5)


def test_prompts_are_tokenised_where_the_trainer_gives_none(policy, expert):
    reward = log_ratio(expert, reference=policy)
    batch = {name: value for name, value in BATCH.items() if name != "prompt_ids"}
    assert_rows(reward(**batch), reward(**BATCH))
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (expert, policy)]
    unknown = log_ratio(models[0], reference=models[1])
    with pytest.raises(RewardError, match=r"no tokenizer for them. Give tokenizer="):
        unknown(**batch)
    assert_rows(log_ratio(*models, tokenizer=policy)(**batch), reward(**BATCH))


def test_messages_are_tokenised_with_the_chat_template(tmp_path):
    path = save_byte_llama(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    messages = [[{"role": "user", "content": text}] for text in ("hi", "how are you")]
    completions = [[{"role": "assistant", "content": "well"}]] * 2
    ids = [tokenizer("well")["input_ids"], tokenizer("w")["input_ids"]]
    rendered = [f"user: {text}\nassistant: " for text in ("hi", "how are you")]
    by_trl = tokenizer(text=rendered)["input_ids"]
    reward = log_ratio(path, reference=lambda_expert(tokenizer))
    expected = completion_log_probs(model, by_trl, ids, batch_size=1)
    assert_rows(reward(messages, completions, ids), expected)


def lambda_expert(tokenizer: Any = None) -> Any:
    """An expert to which every token is certain, so that a ratio is the other's log-probability."""
    return SimpleNamespace(
        token_log_probs=lambda ids, mask: torch.zeros(ids.shape), tokenizer=tokenizer
    )


def test_what_may_be_an_expert(policy, expert, corpus, tmp_path):
    """Each kind gives the log-probabilities of its own definition, padded or not."""
    model = AutoModelForCausalLM.from_pretrained(expert)
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(expert), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = tabular_tokenizer(VOCABULARY)
    counted = NGramExpert.fit(
        ["abcabc", "bca", "aabbc"],
        order=2,
        pseudo_count=0.5,
        tokenizer=tokenizer,
        add_eos=True,
        progress=False,
    )
    counted.save(tmp_path / "counted")

    def one_by_one(of: Any) -> list[list[float]]:
        return [
            of.token_log_probs(torch.tensor([p + c]))[0, len(p) :].tolist()
            for p, c in zip(PROMPT_IDS, IDS, strict=True)
        ]

    class Whole:
        """Says what the model says, over the vocabulary."""

        def log_probs(self, input_ids, attention_mask):
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            with torch.no_grad():
                out = model(input_ids, attention_mask=attention_mask, position_ids=positions)
            return out.logits.log_softmax(-1)

    mapping = {"ngram": corpus, "order": 2, "pseudo_count": 0.5}
    half = ProductOfExperts({"a": model, "b": AutoModelForCausalLM.from_pretrained(policy)}, [1, 1])
    cases: list[tuple[Any, list[list[float]]]] = [
        (expert, by_loop(model)),
        (model, by_loop(model)),
        (adapted, by_loop(adapted)),
        (str(tmp_path / "adapter"), by_loop(adapted)),
        (Adapter(adapted, "default"), by_loop(adapted)),
        (Adapter(adapted, None), by_loop(model)),
        (Whole(), by_loop(model)),
        (half, by_loop(half)),
        (counted, one_by_one(counted)),
        (str(tmp_path / "counted"), one_by_one(counted)),
        (mapping, one_by_one(counted)),
    ]
    for what, expected in cases:
        reward = log_ratio(what, reference=lambda_expert(), tokenizer=tokenizer, batch_size=3)
        assert_rows(reward(**BATCH), expected)
    fitted = log_ratio(
        {"naive_bayes": corpus}, reference=lambda_expert(), tokenizer=policy, per_token=False
    )
    assert all(value < 0 for value in fitted(**BATCH))


def test_a_model_that_trains_is_scored_without_dropout_and_goes_on_training(policy):
    model = AutoModelForCausalLM.from_pretrained(policy, attention_dropout=0.5).train()
    reward = log_ratio(model, reference=lambda_expert())
    assert_rows(reward(**BATCH), by_loop(AutoModelForCausalLM.from_pretrained(policy)))
    assert all(module.training for module in model.modules())


def test_padding_moves_no_position():
    """GPT-2 adds a vector of each absolute position."""
    torch.manual_seed(2)
    shape = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(shape).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight)
    assert_rows(log_ratio(model, reference=lambda_expert())(**BATCH), by_loop(model))


def test_no_more_rows_than_asked_and_no_more_positions_than_needed(policy):
    """(B, T, V) is what a large vocabulary has no room for."""
    rows, scored = [], []
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.base_model.register_forward_hook(lambda _, __, out: rows.append(len(out[0])))
    model.lm_head.register_forward_hook(lambda _, __, logits: scored.append(logits[..., 0].numel()))
    reward = log_ratio(model, reference=lambda_expert(), batch_size=2)
    reward(**BATCH)
    assert max(rows) <= 2
    assert sum(scored) == sum(map(len, IDS)), "the completions' tokens, and no other position"


def test_an_empty_completion_has_no_tokens_to_score(policy, expert):
    reward = log_ratio(expert, reference=policy)
    assert reward(["a", "b"], ["", "a"], [[], [1]], prompt_ids=[[1], [2]])[0] == []
    assert reward([], [], [], prompt_ids=[]) == []
    whole = log_ratio(expert, reference=policy, per_token=False)
    assert whole(["a", "b"], ["", "a"], [[], [1]], prompt_ids=[[1], [2]])[0] == 0


def test_the_policys_reference_needs_one_of_our_trainers(expert, policy):
    reward = log_ratio(expert)
    logps = [[-0.5] * len(ids) for ids in IDS]
    expected = less(by_loop(AutoModelForCausalLM.from_pretrained(expert)), logps)
    assert_rows(reward(**BATCH, ref_per_token_logps=logps), expected)
    assert reward.asks_for == {"prompt_ids", "ref_per_token_logps"}
    assert log_ratio(expert, reference=policy).asks_for == {"prompt_ids"}
    with pytest.raises(RewardError, match=r"ref_per_token_logps, which the trainers of trl_ext"):
        reward(**BATCH)


class Says:
    """Gives every token this log-probability."""

    def __init__(self, value: float):
        self.value = value

    def token_log_probs(self, input_ids, attention_mask):
        return torch.full(input_ids.shape, self.value)


def test_what_is_no_log_probability_never_passes():
    with pytest.raises(
        RewardError, match=r"expert 'the Says' forbids token 2, number 0 .*Sample 0"
    ):
        log_ratio(Says(-math.inf), reference=lambda_expert())(**BATCH)
    with pytest.raises(RewardError, match=r"gave log-probability nan to token 2.*float32"):
        log_ratio(Says(math.nan), reference=lambda_expert())(**BATCH)
    with pytest.raises(RewardError, match=r"pseudo_count above 0\), or set floor=-20"):
        log_ratio(lambda_expert(), reference=Says(-math.inf))(**BATCH)
    floored = log_ratio(Says(-math.inf), reference=Says(-1.0), floor=-20)
    assert floored(**BATCH)[1] == [-19.0, -19.0]
    with pytest.raises(RewardError, match="gave log-probability nan"):
        log_ratio(Says(math.nan), reference=lambda_expert(), floor=-20)(**BATCH)
    for floor in (0, 3.0, -math.inf, True):
        with pytest.raises(ConfigError, match="floor is"):
            log_ratio(Says(-1.0), floor=floor)


def test_a_token_beyond_the_vocabulary_is_an_error_of_the_expert(expert):
    reward = log_ratio(expert, reference=lambda_expert())
    with pytest.raises(RewardError, match=r"'.*': the token id 6 is beyond its vocabulary of 6"):
        reward(["a"], ["?"], [[6]], prompt_ids=[[1]])


def test_a_model_needs_a_prompt(expert):
    with pytest.raises(RewardError, match="Give a prompt of one token or more"):
        log_ratio(expert, reference=lambda_expert())(["", "a"], ["a", "a"], [[1], [1]], [[], [1]])


def test_vocabularies_are_compared_where_both_are_known(expert, tmp_path):
    other = save_byte_llama(tmp_path)
    with pytest.raises(ConfigError, match="have different vocabularies: token 1 is 'a'"):
        log_ratio(expert, reference=other)
    reward = log_ratio(expert)
    reward.check_tokenizer(tabular_tokenizer(VOCABULARY))
    with pytest.raises(ConfigError, match=r"'the policy' and .* different vocabularies: token 5"):
        reward.check_tokenizer(tabular_tokenizer(VOCABULARY - 1))
    # The tokenizer given is the one that counts.
    log_ratio(expert, tokenizer=tabular_tokenizer(4)).check_tokenizer(tabular_tokenizer(4))


@pytest.mark.parametrize(
    ("expert", "options", "says"),
    [
        (
            "no/such/model",
            {},
            r"expert 'no/such/model' cannot be opened at .* It must be a hub id",
        ),
        (3, {}, r"^The expert is a int. An expert is a causal language model"),
        (None, {}, r"^The expert is None. An expert is a causal language model"),
        ({"ngram": "c.txt"}, {}, r"is counted in tokens. Give tokenizer: the policy's path"),
        ({"bigram": "c.txt"}, {}, r"must be a mapping with ngram or naive_bayes"),
        ({"ngram": "c.txt", "window": 2}, {}, r"'window' is none of these"),
        ("no/such/model", {"tokenizer": "no/tokenizer"}, r"tokenizer 'no/tokenizer' cannot be"),
        (Says(0.0), {"batch_size": 0}, r"batch_size is 0; it must be a whole number from 1 on"),
        (Says(0.0), {"per_token": "yes"}, r"per_token is 'yes'; it must be true or false"),
    ],
)
def test_what_cannot_be_opened_is_said_when_the_reward_is_made(expert, options, says):
    with pytest.raises(ConfigError, match=says):
        log_ratio(expert, **options)


def test_a_corpus_that_cannot_be_read(tmp_path):
    tokenizer = tabular_tokenizer(VOCABULARY)
    with pytest.raises(DataError, match=r"There is no corpus '.*none.txt'"):
        log_ratio({"ngram": str(tmp_path / "none.txt")}, tokenizer=tokenizer)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not a text file in UTF-8"):
        log_ratio({"ngram": str(tmp_path / "latin.txt")}, tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["log_ratio", "minus_reference", "reward_model"])
def test_rewards_of_recipes(name, expert, policy, tmp_path):
    model = save_classifier(tmp_path, policy, LlamaForSequenceClassification)
    entry = {
        "log_ratio": {"expert": expert, "per_token": True},
        "minus_reference": {"reward": {"name": "reward_model", "model": model}},
        "reward_model": {"model": model},
    }[name]
    [made] = build_rewards([{"name": name, **entry}])
    rewards = made(**BATCH, ref_per_token_logps=[[-0.5] * len(ids) for ids in IDS])
    assert len(rewards) == len(IDS) and made.__name__ == name
    with pytest.raises(RewardError, match="cannot be made with the arguments given"):
        build_rewards([{"name": name, **entry, "modle": "x"}])


@pytest.mark.equation("E18")
def test_minus_reference_lays_the_reward_on_the_last_token(policy):
    model = AutoModelForCausalLM.from_pretrained(policy)
    own = by_loop(model)
    logged: list[tuple[str, float]] = []
    rewards = [2.0, None, -1.0, 0.5]
    of_numbers = minus_reference(lambda completions, **_: rewards, reference=model)
    given = of_numbers(**BATCH, log_metric=lambda *metric: logged.append(metric))
    assert given[1] is None
    for row, reward, logps in zip(given, rewards, own, strict=True):
        if reward is not None:
            expected = [-logp for logp in logps]
            expected[-1] += reward
            assert row == pytest.approx(expected, abs=1e-5)
    assert logged == [("minus_reference/reward", pytest.approx(0.5))]
    summed = minus_reference(lambda completions, **_: rewards, reference=model, per_token=False)
    assert summed(**BATCH) == [
        None if row is None else pytest.approx(sum(row), abs=1e-5) for row in given
    ]


def test_minus_reference_of_what_is_given_token_by_token():
    def dense(completions, completion_ids, **columns):
        return [[float(token) for token in ids] for ids in completion_ids]

    logps = [[-0.5 * (t + 1) for t in range(len(ids))] for ids in IDS]
    given = minus_reference(dense)(**BATCH, ref_per_token_logps=logps)
    assert_rows(given, less([[float(t) for t in ids] for ids in IDS], logps))


def test_minus_reference_passes_on_what_its_reward_asks_for():
    seen = []

    def inner(completions, prompt_ids, answer, **columns):
        seen.append((prompt_ids, answer, "ref_per_token_logps" in columns))
        return [1.0] * len(completions)

    reward = minus_reference(inner)
    assert reward.asks_for == {"prompt_ids", "ref_per_token_logps"}
    empty = reward(["a"], [""], [[]], prompt_ids=[[1]], ref_per_token_logps=[[]], answer=["x"])
    assert empty == [1.0], "no token to lay it on"
    summed = minus_reference(count_a, per_token=False)
    assert summed(["a"], ["a"], [[]], prompt_ids=[[1]], ref_per_token_logps=[[]]) == [0.25]
    assert seen == [([[1]], ["x"], True)]
    assert minus_reference(count_a, reference=Says(-1.0)).asks_for == {"prompt_ids"}


def test_minus_reference_takes_a_name_a_mapping_a_model_or_a_path(policy, tmp_path):
    path = save_classifier(tmp_path, policy, LlamaForTokenClassification)
    logps = [[0.0] * len(ids) for ids in IDS]
    of_path = minus_reference(path)(**BATCH, ref_per_token_logps=logps)
    model = LlamaForTokenClassification.from_pretrained(path)
    assert_rows(minus_reference(model)(**BATCH, ref_per_token_logps=logps), of_path)
    named = minus_reference({"name": "exact_match", "ignore_case": True})
    rewards = named(**BATCH, ref_per_token_logps=logps, answer=["BC", "b", "x", "x"])
    assert rewards == [[0.0, 0.0, 1.0], [0.0, 0.0], [0.0] * 5, [0.0, 0.0]]

    async def later(completions, **columns):
        return [0.0] * len(completions)

    with pytest.raises(ConfigError, match="no asynchronous reward, and 'later' is one"):
        minus_reference(later)
    with pytest.raises(RewardError, match="needs the column ref_per_token_logps"):
        minus_reference(count_a)(**BATCH)


def save_classifier(folder, policy: str, kind: Any, labels: int = 1) -> str:
    torch.manual_seed(4)
    model = kind.from_pretrained(policy, num_labels=labels)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder / "classifier")
    tabular_tokenizer(VOCABULARY).save_pretrained(folder / "classifier")
    return str(folder / "classifier")


def test_a_sequence_model_gives_what_trl_gives(policy, tmp_path):
    """In one run of TRL's own trainer: the model's path, and our reward of it."""
    path = save_classifier(tmp_path, policy, LlamaForSequenceClassification)
    args = GRPOConfig(str(tmp_path / "out"), **SMALL)
    both = [path, reward_model(path, batch_size=3)]
    trainer = GRPOTrainer(policy, both, args, prompts())
    seen = []
    calculate = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *a: seen.append(calculate(*a)) or seen[-1]
    trainer.train()
    assert len(seen) == 2
    for rewards in seen:
        torch.testing.assert_close(rewards[:, 0], rewards[:, 1])
        assert rewards[:, 0].std() > 0


def test_a_token_model_gives_a_number_a_token(policy, tmp_path):
    path = save_classifier(tmp_path, policy, LlamaForTokenClassification)
    model = LlamaForTokenClassification.from_pretrained(path)
    expected = []
    for prompt, completion in zip(PROMPT_IDS, IDS, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) :, 0]
        expected.append(logits.tolist())
    for of in (path, model):
        reward = reward_model(of, batch_size=3)
        assert_rows(reward(**BATCH), expected)
        assert_rows(reward(PROMPTS, COMPLETIONS, IDS), expected)
    assert reward_model(path).asks_for == {"prompt_ids"}
    with pytest.raises(RewardError, match="has 6 tokens, and a completion has the token id 6"):
        reward_model(path)(["a"], ["?"], [[6]])
    with pytest.raises(ConfigError, match="has 2 labels; a reward is one number"):
        reward_model(save_classifier(tmp_path, policy, LlamaForTokenClassification, labels=2))
    with pytest.raises(ConfigError, match="reward model 'no/such' cannot be opened"):
        reward_model("no/such")
    for nothing in (None, 3):
        with pytest.raises(ConfigError, match=f"reward model is {nothing}; it must be a classif"):
            reward_model(nothing)


def test_a_reward_model_without_a_trained_head_is_refused(policy, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(policy)
    model.config.num_labels = 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no score.weight among its weights, and would judg"):
        reward_model(str(tmp_path))


@pytest.mark.parametrize("name", ["log_ratio", "minus_reference", "reward_model"])
def test_plain_trl_takes_no_numbers_of_tokens(policy, expert, tmp_path, name):
    args = GRPOConfig(str(tmp_path / "out"), **SMALL)
    model = save_classifier(tmp_path, policy, LlamaForTokenClassification)
    reward, instead = {
        "log_ratio": (log_ratio(expert, reference=policy), "Set per_token: false"),
        "minus_reference": (minus_reference(count_a, reference=policy), "Set per_token: false"),
        "reward_model": (reward_model(model), "Take one for sequence classification"),
    }[name]
    says = rf"gives one number a token, .* one a completion: it is not one of trl_ext. {instead}"
    with pytest.raises(RewardError, match=says):
        GRPOTrainer(policy, reward, args, prompts()).train()


def test_plain_trl_trains_on_a_sum_of_what_is_given_token_by_token(policy, expert, tmp_path):
    inner = log_ratio(expert, reference=policy)
    args = GRPOConfig(str(tmp_path), **SMALL)
    reward = minus_reference(inner, reference=policy, per_token=False)
    GRPOTrainer(policy, reward, args, prompts()).train()


def test_plain_trl_trains_on_the_sum(policy, expert, tmp_path):
    reward = log_ratio(expert, reference=policy, per_token=False)
    args = GRPOConfig(str(tmp_path), **SMALL)
    trainer = GRPOTrainer(policy, reward, args, prompts())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert all(log["rewards/log_ratio/mean"] == log["reward"] != 0 for log in logs)


def test_a_trainer_checks_the_policys_tokenizer_against_the_experts(policy, tmp_path):
    other = save_byte_llama(tmp_path / "other")
    args = ReinforceConfig(str(tmp_path / "out"), **SMALL)
    with pytest.raises(
        ConfigError, match="different vocabularies: token 1 is 'a' for 'the policy'"
    ):
        ReinforceTrainer(policy, log_ratio(other), args, prompts())


def test_an_adapter_policy_trains_on_dense_log_ratios(policy, expert, tmp_path):
    """Its reference is the model without the adapter: at the first step the KL is 0."""
    dataset = Dataset.from_dict({"prompt": ["a", "b"] * 8})
    trainer = ReinforceTrainer(
        policy,
        log_ratio(expert),
        ReinforceConfig(str(tmp_path), poe_alpha=0.5, **SMALL),
        dataset,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel) and trainer.args.beta == 2.0
    logs = [log for log in trainer.state.log_history if "kl/sequence" in log]
    assert logs[0]["kl/sequence"] == pytest.approx(0.0, abs=1e-6)
    assert any(log["grad_norm"] > 0 for log in logs)


def two_adapters(policy: str) -> Any:
    """One base: the adapter "default" to train, and "other", which moves the base's outputs."""
    torch.manual_seed(1)
    lora: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(policy), LoraConfig(**lora))
    adapted.add_adapter("other", LoraConfig(init_lora_weights=False, **lora))
    return adapted


# Name -> the reward of the policy and another model, and what is shared first.
MOVING: dict[str, tuple[Any, str]] = {
    "the policy": (lambda policy, _: log_ratio(policy), r"the LlamaForCausalLM"),
    "a reference": (lambda policy, other: log_ratio(other, reference=policy), r"LlamaForCausalLM"),
    "a member": (
        lambda policy, other: log_ratio(ProductOfExperts([policy, other], [1, 1])),
        r"the ProductOfExperts",
    ),
    "an inner reward's": (lambda policy, _: minus_reference(log_ratio(policy)), r"log_ratio: the"),
}
MOVING_ADAPTERS: dict[str, tuple[Any, str]] = {
    "the policy": (lambda policy: log_ratio(policy), r"the PeftModel"),
    "its adapter": (lambda policy: log_ratio(Adapter(policy, "default")), r"the Adapter"),
    "what holds it": (lambda policy: log_ratio(policy.get_base_model()), r"the LlamaForCausalLM"),
}


def assert_moves(trained: Any, reward: Any, folder: Any, says: str, **more: Any) -> None:
    """It would move along: its ratio with the reference would be the policy's own."""
    advice = r"would move as it trains\. Give its path, or load it separately: from_pretrained"
    with pytest.raises(ConfigError, match=rf"{says}.* is the first\), and {advice}"):
        ReinforceTrainer(trained, reward, ReinforceConfig(str(folder), **SMALL), prompts(), **more)


@pytest.mark.parametrize("case", MOVING)
def test_an_expert_that_is_the_policy_is_refused(policy, expert, tmp_path, case):
    reward, says = MOVING[case]
    model, other = (AutoModelForCausalLM.from_pretrained(path) for path in (policy, expert))
    assert_moves(model, reward(model, other), tmp_path, rf"{says}.*\(model.embed_tokens.weight")


@pytest.mark.parametrize("case", MOVING_ADAPTERS)
def test_an_expert_with_the_adapter_that_trains_is_refused(policy, tmp_path, case):
    reward, says = MOVING_ADAPTERS[case]
    adapted = two_adapters(policy)
    assert_moves(adapted, reward(adapted), tmp_path, rf"{says}.*lora_A.default")


def test_an_expert_into_which_the_trainer_puts_its_adapter_is_refused(policy, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(policy)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    assert_moves(model, log_ratio(model), tmp_path, r".*lora_A.default", peft_config=lora)


@pytest.mark.parametrize("name", [None, "other"])
def test_an_expert_may_share_the_base_of_the_adapter_that_trains(policy, expert, tmp_path, name):
    adapted = two_adapters(policy)
    reward = log_ratio(Adapter(adapted, name), reference=expert)
    args = ReinforceConfig(str(tmp_path), learning_rate=0.01, **SMALL)
    trainer = ReinforceTrainer(adapted, reward, args, prompts())
    weights = {key: value.clone() for key, value in adapted.named_parameters()}
    before = reward(**BATCH)
    trainer.train()
    assert reward(**BATCH) == before
    moved = [k for k, value in adapted.named_parameters() if not torch.equal(value, weights[k])]
    assert moved and all(".default." in key for key in moved)
