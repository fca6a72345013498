"""The scorer's two models, wherever they come from, and what it makes of their log-ratios."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as of_transformers

from tests.tiny import save_byte_llama
from trl_ext.errors import ConfigError, DataError, RunError
from trl_ext.gibbs_prm import GibbsScorer
from trl_ext.gibbs_prm.saved_run import saved_run
from trl_ext.models.adapter import Adapter, inner_model
from trl_ext.rwr import RWRConfig

PROMPTS = ["What is 2 + 2?", "hi"]
COMPLETIONS = ["2 + 2\nis 5.\n\nSo 5.", "hello"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base, two adapters of it, a fully trained model, and runs that left them."""
    home = tmp_path_factory.mktemp("scorer")
    base = save_byte_llama(home / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(1)
    for name in ("x", "y"):
        model = AutoModelForCausalLM.from_pretrained(base)
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(home / name)
    trained = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        trained.lm_head.weight.mul_(1.5)
    trained.save_pretrained(home / "full")
    tokenizer.save_pretrained(home / "full")
    return home


def leave_recipe(folder: Path, **values) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))


def copied(home: Path, name: str, to: Path) -> Path:
    to.mkdir(parents=True)
    for file in (home / name).iterdir():
        if file.is_file() and file.name != "recipe.yaml":
            (to / file.name).write_bytes(file.read_bytes())
    return to


def ratios_by_hand(policy, reference, tokenizer, prompt: str, completion: str) -> list[float]:
    """log π − log π_ref of each token, from all logits of one row."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]])
    first = len(tokenizer(prompt)["input_ids"])
    found = []
    with torch.no_grad():
        logps = [model(ids).logits[0].log_softmax(-1) for model in (policy, reference)]
    for t in range(first, ids.size(1)):
        token = ids[0, t]
        found.append((logps[0][t - 1, token] - logps[1][t - 1, token]).item())
    return found


def expected(home: Path, policy: str = "full") -> list[list[float]]:
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    if policy == "full":
        trained = AutoModelForCausalLM.from_pretrained(home / "full")
    else:
        again = AutoModelForCausalLM.from_pretrained(home / "base")
        trained = PeftModel.from_pretrained(again, str(home / policy)).eval()
    rows = zip(PROMPTS, COMPLETIONS, strict=True)
    return [ratios_by_hand(trained, base, tokenizer, *row) for row in rows]


def assert_ratios(scorer: GibbsScorer, wanted: list[list[float]]) -> None:
    scored = scorer.score(PROMPTS, COMPLETIONS)
    for one, other in zip(scored, wanted, strict=True):
        assert one.token_log_ratios == pytest.approx(other, abs=1e-5)
        assert max(map(abs, other)) > 1e-3


def test_scores_and_rewards_of_steps(home):
    scorer = GibbsScorer(home / "full", home / "base", beta=0.5)
    first, second = scorer.score(PROMPTS, COMPLETIONS)
    ratios = expected(home)[0]
    # Bytes are tokens: "2 + 2\n" has 6, "is 5.\n\n" 7, "So 5." 5.
    assert first.step_ends == [6, 13, 18]
    sums = [0.5 * sum(ratios[a:b]) for a, b in ((0, 6), (6, 13), (13, 18))]
    assert first.step_rewards == pytest.approx(sums, abs=1e-5)
    assert first.prefix_scores == pytest.approx([sums[0], sums[0] + sums[1], sum(sums)], abs=1e-5)
    assert first.score == first.prefix_scores[-1]
    assert first.worst_step == sums.index(min(sums))
    assert "".join(first.tokens) == COMPLETIONS[0] == "".join(first.steps)
    assert (first.prompt, first.completion, first.beta) == (PROMPTS[0], COMPLETIONS[0], 0.5)
    assert second.step_ends == [5] and second.notes == []
    assert first.standard_errors is None


def test_models_in_memory(home):
    load = AutoModelForCausalLM.from_pretrained
    policy, reference = load(home / "full"), load(home / "base")
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    assert_ratios(GibbsScorer(policy, reference, tokenizer, 1.0), expected(home))
    # Their folders have a tokenizer.
    assert_ratios(GibbsScorer(policy, reference, beta=1.0), expected(home))
    with pytest.raises(ConfigError, match="no reference: the policy is a whole model"):
        GibbsScorer(policy, beta=1.0)


@pytest.mark.parametrize("reference", [None, "base"])
def test_an_adapter_and_its_base_are_one_copy_of_the_weights(home, reference):
    scorer = GibbsScorer(home / "x", reference and home / reference, beta=1.0)
    assert isinstance(scorer.policy, Adapter) and isinstance(scorer.reference, Adapter)
    assert scorer.policy.model is scorer.reference.model and scorer.reference.name is None
    assert_ratios(scorer, expected(home, "x"))


def test_an_adapter_may_be_the_reference(home):
    by_path = GibbsScorer(home / "x", home / "y", beta=1.0)
    assert by_path.policy.model is by_path.reference.model
    x, y = expected(home, "x"), expected(home, "y")
    difference = [[a - b for a, b in zip(p, q, strict=True)] for p, q in zip(x, y, strict=True)]
    assert_ratios(by_path, difference)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(home / "base"), str(home / "x"), adapter_name="x"
    )
    model.load_adapter(str(home / "y"), adapter_name="y")
    assert_ratios(GibbsScorer(model, "y", beta=1.0), difference)
    assert_ratios(GibbsScorer(Adapter(model, "x"), Adapter(model, "y"), beta=1.0), difference)
    assert_ratios(GibbsScorer(model, beta=1.0), x)
    assert_ratios(GibbsScorer(model, model, beta=1.0), x)
    assert model.active_adapters == ["x"]


def test_a_run_tells_beta_temperature_and_reference(home, tmp_path):
    run = copied(home, "full", tmp_path / "run")
    leave_recipe(
        run, trainer="grpo", beta=0.25, temperature=2.0, model_name_or_path=str(home / "base")
    )
    scorer = GibbsScorer(run)
    assert (scorer.beta, scorer.temperature, scorer.notes) == (0.25, 2.0, [])
    leave_recipe(run, trainer="rwr", beta=0.25, model_name_or_path=str(home / "base"))
    moving = GibbsScorer(run)
    assert "reference=moving" in moving.notes[0]
    assert moving.score(["hi"], ["ho"])[0].notes == [], "said once, not of each completion"
    leave_recipe(
        run, trainer="grpo", beta=0.25, temperature=2.0, model_name_or_path=str(home / "base")
    )
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    ids = torch.tensor([scorer.tokenizer("hihello")["input_ids"]])
    with torch.no_grad():
        logps = (base(ids).logits[0] / 2).log_softmax(-1)
        of_policy = (AutoModelForCausalLM.from_pretrained(run)(ids).logits[0] / 2).log_softmax(-1)
    wanted = [(of_policy - logps)[t - 1, ids[0, t]].item() for t in range(2, 7)]
    assert scorer.score(["hi"], ["hello"])[0].token_log_ratios == pytest.approx(wanted, abs=1e-5)
    # A checkpoint of the run; what is given comes first.
    checkpoint = copied(home, "full", run / "checkpoint-3")
    assert GibbsScorer(checkpoint).beta == 0.25
    assert GibbsScorer(checkpoint, beta=3.0, temperature=1.0).beta == 3.0


@pytest.mark.parametrize(
    ("values", "beta", "note"),
    [
        ({"trainer": "rwr", "beta": 0.5}, 0.5, "reference=moving"),
        ({"trainer": "rwr", "beta": 0.5, "reference": "fixed"}, 0.5, None),
        # The trainers' own defaults, read in their configs.
        ({"trainer": "rwr", "reference": "fixed"}, RWRConfig.beta, None),
        ({"trainer": "grpo", "poe_alpha": 0.4}, 2.5, None),
        ({"trainer": "ppo", "beta": 0.1, "kl_controller": "adaptive"}, 0.1, "where it began"),
        ({"trainer": "grpo"}, None, None),  # TRL's default is 0: no KL, hence no π*
        ({"trainer": "sft"}, None, None),
        ({"trainer": "poe_distillation", "beta": 0.5}, None, None),  # a mixture's weight
        ({"trainer": "of_a_plugin", "beta": 0.7}, 0.7, None),
        ({"trainer": "of_a_plugin"}, None, None),
    ],
)
def test_beta_of_a_recipe(tmp_path, values, beta, note):
    leave_recipe(tmp_path, **values)
    run = saved_run(str(tmp_path))
    assert run is not None and run.beta == beta
    assert [note in n for n in run.notes] == ([True] if note else [])


def test_what_keeps_a_scorer_from_being_made(home, tmp_path):
    arguments: dict[str, Any]
    for arguments, says in (
        ({"policy": home / "full"}, "There is no reference: .*full' is a whole model"),
        ({"policy": home / "x"}, "beta is not known: no recipe.yaml of a run lies beside"),
        ({"policy": 3}, "the policy is a int; it must be a causal language model"),
        ({"policy": None}, "the policy is None"),
        ({"policy": home / "x", "reference": 3, "beta": 1}, "the reference is a int"),
        ({"policy": str(home / "no"), "reference": home / "base"}, "policy cannot be opened at"),
        ({"policy": home / "x", "beta": 0}, "beta is 0; it must be a finite number greater than 0"),
        ({"policy": home / "x", "beta": True}, "beta is True"),
        ({"policy": home / "x", "beta": 10**400}, "it must be a finite number"),
        ({"policy": str(home / "no")}, "There is no reference: .*no' is no folder here"),
        (
            {"policy": home / "full", "reference": home / "full", "beta": 1},
            "every score would be 0",
        ),
        ({"policy": home / "x", "beta": 1, "temperature": -1}, "temperature is -1"),
        ({"policy": home / "x", "beta": 1, "max_tokens": 0}, "max_tokens is 0"),
    ):
        with pytest.raises(ConfigError, match=says):
            GibbsScorer(**arguments)
    run = copied(home, "x", tmp_path / "run")
    leave_recipe(run, trainer="sft", model_name_or_path=str(home / "base"))
    with pytest.raises(ConfigError, match=r"that is not installed, or beta: 0\. Give beta="):
        GibbsScorer(run)
    (run / "recipe.yaml").write_text("beta: [")
    with pytest.raises(ConfigError, match=r"recipe\.yaml cannot be read"):
        GibbsScorer(run)
    (run / "recipe.yaml").write_text("trainer: grpo\nbeta: high")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: beta is 'high'"):
        GibbsScorer(run)


def test_tokenizers_that_differ(home, tmp_path):
    other = copied(home, "base", tmp_path / "other")
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="'the policy' and 'the reference' have different voc"):
        GibbsScorer(home / "full", other, beta=1.0)
    with pytest.raises(ConfigError, match="'the tokenizer given' and 'the policy' have different"):
        GibbsScorer(home / "full", home / "base", str(other), beta=1.0)


def test_rows_that_cannot_be_scored(home):
    scorer = GibbsScorer(home / "full", home / "base", beta=1.0)
    limit = inner_model(scorer.policy).config.max_position_embeddings
    long = "a" * (limit - 1)
    with pytest.raises(ConfigError, match=rf"Row 1 has 2 \+ {limit - 1} tokens .* at most {limit}"):
        scorer.score(["hi", "hi"], ["a", long])
    with pytest.raises(DataError, match="row 0: the prompt is a text and the completion is a list"):
        scorer.score(["hi"], [[{"role": "assistant", "content": "a"}]])
    with pytest.raises(DataError, match="row 1: the prompt '' has no token"):
        scorer.score(["hi", ""], ["a", "b"])
    with pytest.raises(ConfigError, match="prompts has 2 values, and completions has 1"):
        scorer.score(["hi", "ho"], ["a"])
    with pytest.raises(ConfigError, match="completions is a str; it must be a list"):
        scorer.score(["hi"], "a")
    with pytest.raises(ConfigError, match="steps is 'line', which is no way to cut"):
        scorer.score(["hi"], ["a"], "line")
    with pytest.raises(ConfigError, match="prompts has 2 values, and steps has 1"):
        scorer.score(["hi", "hi"], ["a", "b"], [["a"]])
    with pytest.raises(ConfigError, match="prompts has 2 values, and completion_ids has 1"):
        scorer.score(["hi", "hi"], ["a", "b"], completion_ids=[[1]])


def test_an_empty_completion_has_no_steps(home):
    scorer = GibbsScorer(home / "full", home / "base", beta=1.0)
    empty, other = scorer.score(["hi", "hi"], ["", "a"])
    assert (empty.steps, empty.prefix_scores, empty.step_rewards) == ([], [], [])
    assert (empty.worst_step, empty.score) == (None, 0.0)
    assert len(other.steps) == 1
    assert scorer.score([], []) == []


def test_steps_given_for_each_completion(home):
    scorer = GibbsScorer(home / "full", home / "base", beta=1.0)
    steps = [["2 + 2", "is 5.", "So 5."], ["hel", "lo"]]
    first, second = scorer.score(PROMPTS, COMPLETIONS, steps)
    assert first.step_ends == [6, 13, 18] and second.step_ends == [3, 5]
    assert first.merged_into == [0, 1, 2]


def test_the_end_of_the_sequence_is_scored_when_asked_for(home):
    scorer = GibbsScorer(home / "full", home / "base", beta=1.0)
    without, with_end = (
        scorer.score(["hi"], ["hello"], append_eos=append)[0] for append in (False, True)
    )
    assert len(with_end.token_log_ratios) == len(without.token_log_ratios) + 1
    assert with_end.token_log_ratios[:-1] == pytest.approx(without.token_log_ratios, abs=1e-6)
    assert with_end.tokens[-1] == "<eos>" and with_end.steps == ["hello<eos>"]


def test_what_a_user_says_within_a_completion_is_not_the_policys(home):
    scorer = GibbsScorer(home / "full", home / "base", beta=1.0)
    prompt = [{"role": "user", "content": "hi"}]
    turns = [("assistant", "ho"), ("user", "and?"), ("assistant", "so")]
    completion = [{"role": role, "content": content} for role, content in turns]
    [scored] = scorer.score([prompt], [completion], "turn")
    assert len(scored.steps) == 3
    assert scored.step_rewards[1] == 0.0
    user = scored.token_log_ratios[scored.step_ends[0] : scored.step_ends[1]]
    assert user == [0.0] * len(user) and all(scored.token_log_ratios[: scored.step_ends[0] - 1])


def test_token_rewards_are_the_log_ratios_in_units_of_the_reward(home):
    scorer = GibbsScorer(home / "full", home / "base", beta=0.5)
    ids = [scorer.tokenizer(text)["input_ids"] for text in (*PROMPTS, *COMPLETIONS)]
    rewards = scorer.token_rewards(ids[:2], ids[2:])
    for found, ratios in zip(rewards, expected(home), strict=True):
        assert found == pytest.approx([0.5 * r for r in ratios], abs=1e-5)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (float("nan"), "Row 0: the policy .* gives nan for token"),
        (float("-inf"), "gives (nan|probability 0)"),
    ],
)
def test_no_finite_log_ratio(home, weight, says):
    policy = AutoModelForCausalLM.from_pretrained(home / "full")
    with torch.no_grad():
        policy.lm_head.weight.fill_(weight)
    scorer = GibbsScorer(policy, str(home / "base"), beta=1.0)
    with pytest.raises(RunError, match=re.compile(says)):
        scorer.score(["hi"], ["hello"])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"beta": float("nan")},
            "beta is nan; it must be a finite number from 0. Mend it, or move",
        ),
        ({"beta": float("inf")}, "beta is inf"),
        ({"beta": 10**400}, "beta is 1000"),
        (
            {"beta": 1, "temperature": 0},
            "temperature is 0; it must be a finite number greater than 0",
        ),
    ],
)
def test_a_recipe_with_numbers_that_are_none(tmp_path, values, says):
    leave_recipe(tmp_path, trainer="grpo", **values)
    with pytest.raises(ConfigError, match=says):
        saved_run(str(tmp_path))


def test_a_product_without_its_reward_has_no_beta(tmp_path):
    leave_recipe(tmp_path, trainer="grpo", poe_alpha=0)
    run = saved_run(str(tmp_path))
    assert run is not None and run.beta is None


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_is_cut(home, tmp_path, name):
    cut = copied(home, "x", tmp_path / "cut")
    (cut / name).write_bytes((cut / name).read_bytes()[:60])
    with pytest.raises(
        ConfigError, match=r"The policy cannot be opened at .*cut'.* Copy them once"
    ):
        GibbsScorer(cut, beta=1)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_cut_is_not_replaced_by_the_references(home, tmp_path, name):
    cut = copied(home, "base", tmp_path / "cut")
    (cut / name).write_text("{")
    with pytest.raises(ConfigError, match=r"The tokenizer .*cut' cannot be opened"):
        GibbsScorer(cut, home / "base", beta=1)


def test_a_run_that_has_not_ended(tmp_path):
    for number in (5, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
    leave_recipe(tmp_path, trainer="grpo", beta=1)
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(ConfigError, match=r"holds neither a model .* last checkpoint is .*-10'"):
        GibbsScorer(tmp_path, beta=1)


def test_a_start_that_has_moved(home, tmp_path):
    run = copied(home, "x", tmp_path / "run")
    leave_recipe(run, trainer="grpo", beta=1, model_name_or_path="./gone")
    with pytest.raises(ConfigError, match=r"is what .*recipe\.yaml began with, as seen from where"):
        GibbsScorer(run)


def test_scores_beyond_the_largest_number(home):
    scorer = GibbsScorer(home / "x", beta=1e308, temperature=0.01)
    with pytest.raises(RunError, match=r"beta is 1e\+308, with which the scores are beyond"):
        scorer.score(["abc"], ["bcd" * 9])


def test_a_reference_of_a_shorter_context_fails_before_the_policy_runs(home):
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(home / name) for name in ("full", "base")
    )
    reference.config.max_position_embeddings = 4
    passes = []
    policy.base_model.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ConfigError, match=r"Row 0 has 2 \+ 5 tokens .* reads at most 4"):
        GibbsScorer(policy, reference, beta=1.0).score(["hi"], ["hello"])
    assert not passes


def nf4_policy(home: Path) -> Any:
    """A LoRA policy on a 4-bit base, as QLoRA trains it."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        home / "base", quantization_config=nf4, dtype=torch.float32
    )
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(base, lora)


def lora_gradients(model: Any) -> torch.Tensor:
    model.train()
    model.zero_grad()
    ids = torch.tensor([[5, 9, 7, 3, 8, 6]])
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    return torch.cat([p.grad.flatten() for p in trained])


def test_a_qlora_policy_is_scored_and_still_trains(home):
    """Scores: all logits with the adapter on and off, of the dequantised model.

    On CPUs with AVX512-BF16 bitsandbytes repacks what was read in evaluation mode, and what is
    repacked has no gradient.
    """
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    policy = nf4_policy(home)
    scorer = GibbsScorer(policy, tokenizer=tokenizer, beta=1.0)
    found = scorer.score(PROMPTS, COMPLETIONS)
    gradients = lora_gradients(policy)
    torch.testing.assert_close(gradients, lora_gradients(nf4_policy(home)))
    exact = nf4_policy(home)
    exact.dequantize()
    exact.float().eval()
    for row, scores in zip(zip(PROMPTS, COMPLETIONS, strict=True), found, strict=True):
        ids = torch.tensor([[i for text in row for i in tokenizer(text)["input_ids"]]])
        first = len(tokenizer(row[0])["input_ids"])
        with torch.no_grad():
            on = exact(ids).logits[0].log_softmax(-1)
            with exact.disable_adapter():
                off = exact(ids).logits[0].log_softmax(-1)
        by_hand = (on - off)[:-1].gather(1, ids[0, 1:, None])[first - 1 :, 0].tolist()
        assert scores.token_log_ratios == pytest.approx(by_hand, abs=1e-4)
        assert max(map(abs, by_hand)) > 1e-2


def test_a_qlora_runs_recipe_says_what_its_path_is_not(tmp_path):
    leave_recipe(tmp_path, trainer="grpo", beta=0.5, load_in_4bit=True)
    run = saved_run(str(tmp_path))
    assert run is not None and "trained on a quantised model" in run.notes[0]


def test_loading_is_quiet_and_leaves_bars_as_they_were(home, capfd):
    """An adapter and its base, then two whole models: neither bars nor warnings of others."""
    assert of_transformers.is_progress_bar_enabled()
    GibbsScorer(home / "x", beta=1.0)
    GibbsScorer(home / "full", home / "base", beta=1.0)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert of_transformers.is_progress_bar_enabled()
    with pytest.raises(ConfigError):
        GibbsScorer(home / "no", home / "base", beta=1.0)
    assert of_transformers.is_progress_bar_enabled()


def damage(folder: Path, file: str, content: bytes | dict[str, Any]) -> None:
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / file).read_text()) | content).encode()
    (folder / file).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "file", "content", "says"),
    [
        ("full", "config.json", b"null", "TypeError|not iterable"),
        ("full", "config.json", {"num_attention_heads": 0}, "modulo by zero"),
        ("full", "config.json", {"vocab_size": 9}, "ignore_mismatched_sizes"),
        ("full", "config.json", {"hidden_size": "a"}, r"Validation error .*'hidden_size'"),
        ("full", "model.safetensors", b"x" * 300, "deserializing header"),
        ("x", "adapter_config.json", b"[]", "not a mapping"),
        ("x", "adapter_config.json", {"rank_pattern": 3}, "no attribute 'keys'"),
        ("x", "adapter_config.json", {"peft_type": "NEW"}, "KeyError 'NEW'"),
        ("x", "adapter_config.json", {"r": 3}, r"loading state_dict .*size mismatch"),
        ("x", "adapter_config.json", {"target_modules": ["a"]}, "not found in the base"),
        ("full", "tokenizer.json", b"[]", "tokenizer .*cannot be opened"),
        ("full", "tokenizer.json", {"model": {"type": "X"}}, "tokenizer .*did not match"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(home, tmp_path, name, file, content, says):
    """Of each kind of error that the libraries raise; one line of them, and what to do."""
    folder = copied(home, name, tmp_path / "damaged")
    damage(folder, file, content)
    with pytest.raises(ConfigError, match=says) as caught:
        GibbsScorer(folder, home / "base", beta=1)
    assert "cannot be opened" in str(caught.value)
    assert "once more" in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_torchs_format_that_are_cut(home, tmp_path):
    """One that is empty ends early; one of another format is no pickle."""
    for number, content in enumerate((b"", b"half", b"version https://git-lfs.github.com/spec/v1")):
        folder = copied(home, "full", tmp_path / str(number))
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ConfigError, match=r"The policy cannot be opened at .* Are the files"):
            GibbsScorer(folder, home / "base", beta=1)
