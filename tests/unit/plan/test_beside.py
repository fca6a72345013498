"""Rewards, scorers, experts and critics that stand beside the model, counted by hand."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

from tests.unit.plan.allocations import Peak, config_of, rows
from tests.unit.plan.recipes import LORA, recipe, small
from trl_ext.plan import card_of_size, may_shard, plan_recipe, suggest
from trl_ext.plan.activations import Numbers
from trl_ext.plan.beside import Beside, computing
from trl_ext.plan.passes import divergence_bytes
from trl_ext.plan.shapes import numel, shapes_of

LARGE = 1_543_714_304  # parameters of Qwen2.5-1.5B, as published
# 24 layers of q and o 896², k and v 896·128, their biases, an MLP of 3·896·4864 and two norms; the
# embedding of 151936 tokens, which is the head, too; and the last norm.
SMALL = "Qwen/Qwen2.5-0.5B"
OF_SMALL = 24 * (2 * 896**2 + 2 * 896 * 128 + 896 + 2 * 128 + 3 * 896 * 4864 + 2 * 896)
OF_SMALL += 151936 * 896 + 896
REWARD = {"name": "reward_model", "model": SMALL}


def adapter(place: Path, base: str) -> str:
    """The folder of a LoRA adapter of rank 2 on q_proj, without weights."""
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.base_model_name_or_path = base
    config.save_pretrained(str(place))
    return str(place)


# r·(in + out) of 28 maps of 1536 by 1536, 2 layers of 128 by 4·48; float32 as peft has them.
ADAPTER, TINY_ADAPTER = 4 * 28 * 2 * (1536 + 1536), 4 * 2 * 2 * (128 + 192)


@pytest.mark.parametrize(
    "entry",
    [
        REWARD,
        {"name": "reward_ensemble", "members": ["exact_match", REWARD]},
        {"name": "minus_reference", "reward": SMALL},
        {"name": "log_ratio", "expert": SMALL},
        {"name": "log_ratio", "expert": {"naive_bayes": "pydoc"}, "reference": SMALL},
    ],
)
def test_the_model_of_a_reward_stands_from_the_first_rollout_on(tmp_path, entry):
    phases = plan_recipe(recipe(tmp_path, reward_funcs=[entry], **LORA)).phases
    assert "reward models" not in phases["load"]
    for phase in ("generate", "score", "train", "save"):
        assert phases[phase]["reward models"] == 2 * OF_SMALL


def test_a_reward_model_has_no_lm_head(tmp_path):
    # That of 7B is its own, and not the embedding: 152064 by 3584.
    seven = "Qwen/Qwen2.5-7B"
    found = [
        plan_recipe(recipe(tmp_path, reward_funcs=[each])).phases["score"]["reward models"]
        for each in (
            {"name": "log_ratio", "expert": seven},
            {"name": "reward_model", "model": seven},
        )
    ]
    assert found[0] - found[1] == 2 * 152064 * 3584


def test_trls_own_reward_model_is_there_from_the_start(tmp_path):
    given = {"reward_model_name_or_path": SMALL, "dtype": "float32", "reward_funcs": None}
    plan = plan_recipe(recipe(tmp_path, trainer="grpo", **given))
    # In the policy's dtype; TRL reads the 32 completions of a rollout at once.
    assert plan.phases["load"]["reward models"] == 4 * OF_SMALL
    one = Beside("reward models", plan.shapes, plan.run.numbers, rows=1)
    small_shapes = computing_small()
    pass_of_32 = Beside("reward models", small_shapes, of_half(small_shapes, 4), 32, has_head=False)
    assert one.rows == 1
    assert plan.peak("score") == plan.peak("save") + max(
        sum(moment.values()) for moment in pass_of_32.passing(456)
    )


def computing_small():
    from trl_ext.plan.opening import open_config

    return shapes_of(open_config(SMALL), None)


def of_half(shapes, stream: int) -> Numbers:
    how = computing(shapes, {2: "bfloat16", 4: "float32"}[stream], 2)
    assert (how.stream, how.compute) == (stream, 2)
    return how


def test_adapters_of_a_reward_share_their_base(tmp_path):
    base = small(tmp_path)
    both = [adapter(tmp_path / name, base) for name in ("a", "b")]
    entry = {"name": "reward_model", "adapters": both}
    found = plan_recipe(recipe(tmp_path, reward_funcs=[entry])).phases["save"]["reward models"]
    parameters = numel(shapes_of(config_of(), None).parameters)
    # A config without a dtype is read as float32.
    assert found == 4 * parameters + 2 * TINY_ADAPTER


def test_a_pass_of_a_reward_model_against_a_real_one():
    config = config_of(num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    shapes = shapes_of(config_of(), None)
    mine = Beside("reward models", shapes, computing(shapes, "float32"), 4, has_head=False)
    weights = [*model.parameters(), *model.buffers()]
    with Peak(weights) as peak, torch.no_grad():
        before = peak.now
        model(**rows(4, 64), use_cache=False)
    # As close as a pass of the policy itself is (test_activations).
    predicted = max(sum(moment.values()) for moment in mine.passing(64))
    assert predicted == pytest.approx(peak.highest - before, rel=0.06)
    head = 4 * 128  # the one number's
    assert mine.standing == sum(4 * p.numel() for p in model.parameters()) - head


def experts(tmp_path, places: dict[str, str], **changed):
    weights = dict.fromkeys(places, 1.0 / len(places))
    left_out = {"reward_funcs": None, "num_generations": None}
    product = {"experts": places, "expert_weights": weights, "expert_dtype": "bfloat16"}
    given = {"trainer": "poe_distillation"} | left_out | product | LORA | changed
    return recipe(tmp_path, **given)


def test_experts_of_a_product(tmp_path):
    large = "Qwen/Qwen2.5-1.5B"
    plan = plan_recipe(experts(tmp_path, {"one": large, "other": f"{large}-Instruct"}))
    # Two models, and a copy of both heads side by side.
    expected = 2 * 2 * LARGE + 2 * 2 * 151936 * 1536
    assert [items["experts"] for items in plan.phases.values()] == [expected] * len(plan.phases)


def test_an_expert_on_the_base_of_another_is_an_adapter(tmp_path):
    base = "Qwen/Qwen2.5-1.5B"
    places = {"base": base, "cheerful": adapter(tmp_path / "cheerful", base)}
    plan = plan_recipe(experts(tmp_path, places))
    assert plan.phases["load"]["experts"] == 2 * LARGE + ADAPTER  # one head: no copy


def test_a_product_has_tiles_of_two_models(tmp_path):
    base = small(tmp_path)
    alone = recipe(tmp_path, model_name_or_path=base, **LORA)
    without = plan_recipe(alone).phases["train"]
    given = experts(tmp_path, {"a": base, "b": base}, model_name_or_path=base)
    beside = plan_recipe(given).phases["train"]
    # Of 8·200 tokens: two float32 tiles beside the student's, and the states of two experts.
    assert beside["LM head"] - without["LM head"] == 1600 * (8 * 32768 + 2 * 2 * 128)


def test_experts_are_read_beside_the_students_activations(tmp_path):
    # A student of two layers of 128, and an expert so much larger that its pass is the worst.
    given = {"model_name_or_path": small(tmp_path), "max_completion_length": 4}
    large = {"a": "Qwen/Qwen2.5-7B"}
    train = plan_recipe(experts(tmp_path, large, **given)).phases["train"]
    alone = plan_recipe(recipe(tmp_path, **LORA, **given)).phases["train"]
    ends = 2 * 3584 * 8 * 260  # what a layer of the expert has read, of 8 rows of 256 + 4 tokens
    assert train["activations"] >= ends + 2 * 2 * 128 * 8 * 260 > alone["activations"] // 2
    assert train["layer at work"] > 3 * 2 * 18944 * 8 * 260  # its MLP


def test_the_divergences_tiles():
    # By hand: 3 tokens, two float32 tiles in place of one of 2 bytes, and 10 bytes a token.
    how = computing(shapes_of(config_of(), None), "bfloat16")
    assert divergence_bytes(3, 10, how, backward=False) == (4 + 4 - 2) * 3 * 32768 + 30
    # The gradient of the student's tile has those 2 bytes.
    assert divergence_bytes(3, 10, how, backward=True) == (4 + 4) * 3 * 32768 + 30
    assert divergence_bytes(9000, 0, how, backward=True) == 8 * 4096 * 32768


def test_a_product_over_the_whole_vocabulary_says_so(tmp_path):
    places = {"one": "Qwen/Qwen2.5-1.5B", "other": "Qwen/Qwen2.5-1.5B"}
    cut = experts(tmp_path, places, plausibility=0.1, divergence="forward_kl")
    assert any("probabilities of all tokens" in note for note in plan_recipe(cut).notes)


POLICY = "Qwen/Qwen2.5-1.5B-Instruct"


def scored(tmp_path, **changed):
    return plan_recipe(recipe(tmp_path, trainer="grpo", beta=0.0, **changed))


def test_a_scorer_that_learns_on_the_policys_weights(tmp_path):
    plan = scored(tmp_path, process_learning_rate=1e-4, **LORA)
    # Its adapter, the policy's configuration, and AdamW's two states, all float32.
    expected = 3 * 4 * numel(plan.shapes.adapter)
    assert plan.phases["train"]["process reward"] == expected
    assert plan.phases["score"]["gradients"] == 4 * numel(plan.shapes.adapter)


def test_a_scorer_that_learns_whole_has_a_reference(tmp_path):
    plan = scored(tmp_path, process_learning_rate=1e-4)
    # bfloat16: weights, two states of each, and the model that it began as.
    assert plan.phases["train"]["process reward"] == 4 * 2 * LARGE


@pytest.mark.parametrize("shares", [True, False])
def test_a_frozen_scorer_that_is_an_adapter(tmp_path, shares):
    place = adapter(tmp_path / "scorer", POLICY)
    given = {"process_reward": place, "process_beta": 0.1}
    plan = scored(tmp_path, **given, **(LORA if shares else {}))
    assert plan.phases["load"]["process reward"] == ADAPTER + (0 if shares else 2 * LARGE)


def test_a_frozen_scorer_that_is_a_model_and_its_reference(tmp_path):
    given = {"process_reward": SMALL, "process_reference": f"{SMALL}-Instruct", "process_beta": 0.1}
    plan = scored(tmp_path, **given, **LORA)
    assert plan.phases["load"]["process reward"] == 2 * 2 * OF_SMALL


def test_a_critic_of_another_size(tmp_path):
    ppo = {"trainer": "ppo", "num_generations": 1, "critic": "model", **LORA}
    same = plan_recipe(recipe(tmp_path, **ppo)).phases
    less = plan_recipe(recipe(tmp_path, critic_model_name_or_path=SMALL, **ppo)).phases
    # 16·(in + out) of each map: q, o 896 + 896, k, v 896 + 128, three of 896 + 4864.
    own = 24 * 16 * (2 * 1792 + 2 * 1024 + 3 * 5760)
    assert less["load"]["critic"] == 2 * OF_SMALL + 4 * (own + 897)
    # 28 inputs of layers of 8 rows of 456 tokens, 1536 wide, against 24 inputs, 896 wide; and at
    # the end a norm in float32 and its output, 6 a number and 4 a token, and 4 for the head.
    tokens = 8 * 456
    layers = 2 * (28 * 1536 - 24 * 896) * tokens
    fewer = same["train"]["activations"] - less["train"]["activations"]
    assert fewer in (layers, layers + (1536 - 896) * 10 * tokens)


@pytest.mark.parametrize(
    ("changed", "item"),
    [
        ({"reward_funcs": [{"name": "reward_model", "model": "no/such"}]}, "model no/such"),
        ({"reward_funcs": [{"name": "log_ratio", "expert": {"ngram": "pydoc"}}]}, "corpus"),
        ({"trainer": "grpo", "process_reward": "no/such"}, "process_reward no/such"),
        (
            {"trainer": "ppo", "num_generations": 1, "critic": "model"}
            | {"critic_model_name_or_path": "no/such"},
            "the critic no/such",
        ),
    ],
)
def test_a_config_that_is_not_to_be_had_is_left_out_and_said(tmp_path, changed, item):
    notes = plan_recipe(recipe(tmp_path, **changed)).notes
    assert any(note.startswith("Not counted: ") and item in note for note in notes)


def test_a_damaged_adapter_is_left_out_and_said(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    given = recipe(
        tmp_path, reward_funcs=[{"name": "reward_model", "model": str(tmp_path / "bad")}]
    )
    assert any("config is not to be had" in note for note in plan_recipe(given).notes)


def test_a_critic_that_gives_its_head_alone_is_no_second_model(tmp_path):
    ppo = {"trainer": "ppo", "num_generations": 1, "critic_model_name_or_path": "no/such"}
    assert not plan_recipe(recipe(tmp_path, critic="head", **ppo)).notes


def test_lighter_experts_before_lighter_weights(tmp_path):
    large = "Qwen/Qwen2.5-1.5B"
    given = experts(tmp_path, {"a": large, "b": large}, expert_dtype="float32")
    half = experts(tmp_path, {"a": large, "b": large})
    need = plan_recipe(half)
    card = card_of_size(need.peak(need.worst) / 2**30 * 1.05 + 0.6)
    given = experts(tmp_path, {"a": large, "b": large}, expert_dtype="float32")
    assert suggest(given, [], card) == ["expert_dtype=bfloat16"]


def test_evaluation_counts(tmp_path):
    evaluating = {"eval_on_start": True, "per_device_eval_batch_size": 64}
    quiet, loud = (plan_recipe(recipe(tmp_path, **LORA, **e)) for e in ({}, evaluating))
    # Keys and values of 28 layers, 2·128 numbers of 2 bytes, of 64 rows in place of 32; while
    # prompts are read, or at the last token.
    caches = [plan.phases["generate"]["KV cache"] for plan in (quiet, loud)]
    assert caches in [[n * t * 28 * 2 * 256 * 2 for n in (32, 64)] for t in (256, 456)]
    assert any("64 rows at once" in note for note in loud.notes) and not quiet.notes
    assert "score" in loud.phases and "score" not in quiet.phases


def test_smaller_evaluations_are_suggested(tmp_path):
    given = recipe(tmp_path, **LORA, eval_on_start=True, per_device_eval_batch_size=256)
    small_enough = recipe(tmp_path, **LORA, eval_on_start=True, per_device_eval_batch_size=64)
    need = plan_recipe(small_enough)
    card = card_of_size(need.peak(need.worst) / 2**30 * 1.05 + 0.6)
    given = recipe(tmp_path, **LORA, eval_on_start=True, per_device_eval_batch_size=256)
    assert suggest(given, [], card) == ["per_device_eval_batch_size=64"]


def test_what_learns_beside_is_not_sharded(tmp_path):
    given = {"trainer": "grpo", "beta": 0.0}
    assert may_shard(recipe(tmp_path, **given))
    assert not may_shard(recipe(tmp_path, **given, process_learning_rate=1e-4))
    assert not may_shard(recipe(tmp_path, trainer="ppo", num_generations=1))


def test_a_critic_keeps_its_embedding_where_the_head_is_not_tied(tmp_path):
    ppo = {"trainer": "ppo", "num_generations": 1, "critic": "model"}
    plan = plan_recipe(recipe(tmp_path, model_name_or_path="Qwen/Qwen2.5-7B", **ppo))
    # All but the head of 152064 by 3584, whose shape the embedding has; and the values' head.
    below = numel(plan.shapes.parameters) - 152064 * 3584
    assert plan.phases["load"]["critic"] == 2 * below + 4 * 3585
