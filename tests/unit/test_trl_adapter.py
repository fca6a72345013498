"""What `PolicyTrainer` adds to TRL: stops, checks, NF4 gradients, resume, evaluation rewards."""

from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig

from tests.tiny import QUIET, VOCABULARY, count_a, prompts, save_tiny_llama
from trl_ext.errors import ConfigError, DataError, RewardError, RunError
from trl_ext.oracle import tabular_tokenizer
from trl_ext.policy_config import PolicyConfig
from trl_ext.ppo import PPOTrainer
from trl_ext.reinforce import ReinforceTrainer
from trl_ext.rwr import RWRConfig, RWRTrainer
from trl_ext.trl_adapter import PolicyTrainer
from trl_ext.trl_adapter import trainer as trainer_module


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def make(model_path, tmp_path, *, trainer=PolicyTrainer, parts=None, **options):
    settings: dict[str, Any] = QUIET | {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 2,
    }
    args = trainer.config_class(str(tmp_path / "out"), **(settings | options))
    parts = {"reward_funcs": count_a, "train_dataset": prompts()} | (parts or {})
    if not isinstance(model_path, str):
        parts["processing_class"] = tabular_tokenizer(VOCABULARY)
    return trainer(model=model_path, args=args, **parts)


def test_a_completion_ends_with_the_first_token_that_contains_a_stop_string(model_path, tmp_path):
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return count_a(completions)

    make(model_path, tmp_path, stop_strings=["b"], parts={"reward_funcs": reward}).train()
    assert any("b" in text for text in seen)
    assert all("b" not in text[:-1] for text in seen)


def test_a_stop_string_that_no_token_contains_is_refused(model_path, tmp_path):
    with pytest.raises(ConfigError, match=r"no token of .* contains"):
        make(model_path, tmp_path, stop_strings=["\n"])


def test_the_args_of_trl_are_refused_by_name(model_path, tmp_path):
    with pytest.raises(ConfigError, match=r"RWRTrainer takes .* RWRConfig, got GRPOConfig"):
        args: Any = GRPOConfig(str(tmp_path), **QUIET)
        RWRTrainer(model_path, count_a, args, prompts())


def test_a_dataset_without_prompts_is_refused_before_a_model_is_loaded(tmp_path):
    dataset = Dataset.from_dict({"promt": ["a"]})
    with pytest.raises(DataError, match="promt"):
        make("no/such/model", tmp_path, parts={"train_dataset": dataset})


def test_a_reward_that_fails_is_named_with_its_sample(model_path, tmp_path):
    def picky(completions, **kwargs):
        return [float("nan") if "c" in text else 0.0 for text in completions]

    with pytest.raises(RewardError, match=r"(?s)picky.*nan"):
        make(model_path, tmp_path, parts={"reward_funcs": picky}).train()


def test_evaluation_rewards_are_kept_by_prompt(model_path, tmp_path):
    trainer = make(
        model_path,
        tmp_path,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        parts={"eval_dataset": prompts(6)},
    )
    metrics = trainer.evaluate()
    rewards = trainer.evaluation_rewards()
    assert [len(group) for group in rewards] == [2] * 6
    flat = [reward for group in rewards for reward in group if reward is not None]
    assert metrics["eval_reward"] == pytest.approx(sum(flat) / 12)
    trainer.evaluate()
    assert len(trainer.evaluation_rewards()) == 6, "an evaluation starts anew"


def test_evaluations_under_persistent_workers_meet_the_prompts_in_one_order(model_path, tmp_path):
    seen: list[list[str]] = []

    def reward(prompts, completions, **kwargs):
        seen[-1].extend(prompts)
        return count_a(completions)

    dataset = Dataset.from_dict({"prompt": ["a", "b", "c", "aa", "bb", "cc"]})
    trainer = make(
        model_path,
        tmp_path,
        num_generations_eval=1,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        parts={"eval_dataset": dataset, "reward_funcs": reward},
    )
    for _ in range(2):
        seen.append([])
        trainer.evaluate()
    assert seen[0] == seen[1] and len(seen[0]) == 6


def test_a_dataset_that_fills_no_batch_is_refused(model_path, tmp_path):
    with pytest.raises(DataError, match=r"has 1 prompts, and one generation batch takes 2"):
        make(model_path, tmp_path, parts={"train_dataset": prompts(1)})
    make(model_path, tmp_path, parts={"train_dataset": prompts(2)})


def test_a_bundled_model_is_opened_by_its_name(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "resolve_model", {"bundled:x": model_path}.__getitem__)
    trainer = make("bundled:x", tmp_path)
    assert trainer.model.config.vocab_size == VOCABULARY


def test_credit_may_be_per_token(model_path, tmp_path):
    class TokenCredit(PolicyTrainer):
        def assign_credit(self, rollout):
            return super().assign_credit(rollout)[:, None] * rollout.mask

    runs = [
        make(model_path, tmp_path / t.__name__, trainer=t) for t in (PolicyTrainer, TokenCredit)
    ]
    for run in runs:
        run.train()
    for ours, theirs in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("trainer", [PolicyTrainer, RWRTrainer])
@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 3},
        {"steps_per_generation": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
        {"parts": {"train_dataset": prompts(4)}},  # two steps an epoch
    ],
    ids=str,
)
def test_a_checkpoint_between_two_uses_of_a_rollout_resumes_to_the_same_parameters(
    model_path, tmp_path, trainer, options
):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "seed": 3} | options
    whole = make(model_path, tmp_path / "whole", trainer=trainer, **options)
    whole.train()
    for step in (1, 2, 4):
        resumed = make(model_path, tmp_path / "resumed", trainer=trainer, **options)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs), f"resumed at step {step}"


def test_nf4_adapters_train_after_an_evaluation_pass(tmp_path):
    """All LoRA gradients of a 4-bit model, against the same model with dequantised weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tabular_tokenizer(VOCABULARY).save_pretrained(tmp_path / "model")
    lora = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    trainer = make(
        str(tmp_path / "model"),
        tmp_path,
        trainer=RWRTrainer,
        parts={"quantization_config": nf4, "peft_config": lora},
        gradient_checkpointing=False,
    )
    model = trainer.model.eval()
    ids = torch.randint(1, VOCABULARY, (4, 12))
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    quantised = lora_gradients(model, ids)
    reference = lora_gradients(model.dequantize().float(), ids)
    assert len(quantised) == len(reference) == 2 * 2 * 7
    ours, exact = (torch.cat([g.flatten().float() for g in gs]) for gs in (quantised, reference))
    assert torch.nn.functional.cosine_similarity(ours, exact, dim=0) > 0.99


def lora_gradients(model, ids) -> list[torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    assert all(p.grad is not None for p in lora)
    return [p.grad.clone() for p in lora]


def test_policy_config_keeps_the_defaults_of_trl(tmp_path):
    ours, theirs = (
        PolicyConfig(str(tmp_path), use_cpu=True),
        GRPOConfig(str(tmp_path), use_cpu=True),
    )
    changed = {name for name in vars(theirs) if getattr(ours, name) != getattr(theirs, name)}
    assert changed <= {"distributed_state"}


def test_rwr_config_refuses_what_it_would_ignore(tmp_path):
    with pytest.raises(ConfigError) as caught:
        RWRConfig(str(tmp_path), use_cpu=True, epsilon=0.1, loss_type="grpo", beta=-1.0)
    text = str(caught.value)
    assert "epsilon=0.1" in text and "loss_type='grpo'" in text and "beta=-1.0" in text
    assert "num_generations" not in text


def test_the_table_of_completions_shows_the_weights(model_path, tmp_path):
    trainer = make(model_path, tmp_path, trainer=RWRTrainer, log_completions=True, max_steps=1)
    trainer.train()
    (table,) = (tmp_path / "out" / "completions").glob("*.parquet")
    weights = load_dataset("parquet", data_files=str(table), split="train")["advantage"]
    sums = torch.tensor(list(weights)).view(-1, 4).sum(dim=1)
    assert set(sums.round(decimals=5).tolist()) <= {0.0, 1.0}
    assert sums.max() > 0


def test_several_evaluation_sets_by_name(model_path, tmp_path):
    parts = {"eval_dataset": {"short": prompts(2), "long": prompts(4)}}
    trainer = make(
        model_path, tmp_path, parts=parts, eval_strategy="steps", per_device_eval_batch_size=4
    )
    assert {"eval_short_runtime", "eval_long_runtime"} <= trainer.evaluate().keys()
    broken = parts["eval_dataset"] | {"long": Dataset.from_dict({"text": ["a"]})}
    with pytest.raises(DataError, match="eval_dataset long has no column"):
        make(model_path, tmp_path, parts={"eval_dataset": broken})


def test_a_reference_that_would_be_another_model_is_refused(model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    make(model, tmp_path, beta=0.1)  # as it is on disk
    make(model.bfloat16().float(), tmp_path, trainer=RWRTrainer)  # needs none
    for trainer, options in ((PolicyTrainer, {"beta": 0.1}), (RWRTrainer, {"log_kl": True})):
        with pytest.raises(ConfigError, match=r"q_proj.*Save the policy and give its path"):
            changed = AutoModelForCausalLM.from_pretrained(model_path)
            with torch.no_grad():
                changed.model.layers[1].self_attn.q_proj.weight[0, 0] += 1e-3
            make(changed, tmp_path, trainer=trainer, **options)


def asking(seen: list):
    """A reward that asks for the trainer's columns and keeps them."""

    def reward(completions, completion_ids, prompt_ids, ref_per_token_logps, **columns):
        seen.append((prompt_ids, completion_ids, ref_per_token_logps))
        return count_a(completions)

    return reward


def expected_logps(model, prompt_ids, completion_ids) -> list[float]:
    """log π of each token of one completion, by one pass without padding."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits.log_softmax(-1)[0]
    first = len(prompt_ids)
    return [logps[first + t - 1, token].item() for t, token in enumerate(completion_ids)]


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        (PolicyTrainer, {}),
        (PolicyTrainer, {"beta": 0.1, "num_iterations": 2}),
        (PolicyTrainer, {"beta": 0.1, "kl_estimator": "exact", "kl_is_correction": False}),
        (PolicyTrainer, {"use_peft": True}),
        (PolicyTrainer, {"use_peft": "trained before", "beta": 0.1}),
        (RWRTrainer, {}),
        (RWRTrainer, {"reference": "fixed"}),
        (ReinforceTrainer, {"beta": 0.0}),
        (PPOTrainer, {"beta": 0.0, "num_generations": 4}),
    ],
    ids=str,
)
def test_a_reward_that_asks_is_given_prompts_and_the_references_log_probabilities(
    model_path, tmp_path, trainer, options
):
    """In every step and in evaluation those of the model before training, whatever β."""
    seen, options = [], dict(options)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    parts: dict[str, Any] = {"reward_funcs": asking(seen)}
    model: Any = model_path
    if adapter := options.pop("use_peft", None):
        parts["peft_config"] = lora
    if adapter == "trained before":
        torch.manual_seed(5)
        base = AutoModelForCausalLM.from_pretrained(model_path)
        get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
        del parts["peft_config"]
    made = make(
        model,
        tmp_path,
        trainer=trainer,
        parts=parts | {"eval_dataset": prompts(2)},
        learning_rate=0.1,
        eval_strategy="steps",
        per_device_eval_batch_size=8,
        **options,
    )
    beta = made.args.beta
    made.train()
    made.evaluate()
    assert made.args.beta == beta
    reference = AutoModelForCausalLM.from_pretrained(model_path)
    if adapter == "trained before":
        reference = PeftModel.from_pretrained(reference, str(tmp_path / "adapter"))
    assert len(seen) >= 2
    for prompt_ids, completion_ids, logps in seen:
        assert [len(row) for row in logps] == [len(ids) for ids in completion_ids]
        for row in zip(prompt_ids, completion_ids, logps, strict=True):
            assert row[2] == pytest.approx(expected_logps(reference, *row[:2]), abs=1e-4)


def test_without_a_reward_that_asks_no_reference_runs(model_path, tmp_path):
    columns = []

    def reward(completions, **given):
        columns.append(set(given))
        return count_a(completions)

    made = make(model_path, tmp_path, parts={"reward_funcs": reward}, max_steps=1)
    made.train()
    assert made.ref_model is None
    assert not columns[0] & {"prompt_ids", "ref_per_token_logps"}


def test_losses_do_not_depend_on_what_a_reward_asks_for(model_path, tmp_path):
    parameters = []
    for reward in (count_a, asking([])):
        # Where a KL is logged, rows without credit are run too: sums would be rounded otherwise.
        whole: dict[str, Any] = {"trim_padding": False, "skip_zero_credit": False}
        parts = {"reward_funcs": reward}
        run = make(model_path, tmp_path, parts=parts, learning_rate=1e-2, **whole)
        run.train()
        parameters.append([p.detach().clone() for p in run.model.parameters()])
    assert all(map(torch.equal, *parameters))


def test_a_partial_an_object_and_an_async_reward_may_ask(model_path, tmp_path):
    seen = []

    class Asking:
        def __call__(self, completions, prompt_ids, **columns):
            seen.append(("object", prompt_ids))
            return count_a(completions)

    def partly(factor, completions, prompt_ids, **columns):
        seen.append(("partial", prompt_ids))
        return count_a(completions)

    async def later(completions, prompt_ids, **columns):
        seen.append(("async", prompt_ids))
        return count_a(completions)

    rewards = [Asking(), partial(partly, 2), later]
    made = make(model_path, tmp_path, parts={"reward_funcs": rewards}, max_steps=1)
    made.train()
    assert made.ref_model is None, "nobody asked for its log-probabilities"
    assert {kind for kind, _ in seen} == {"object", "partial", "async"}
    assert all(ids == seen[0][1] for _, ids in seen)


def test_what_keeps_the_reference_from_scoring_is_refused(model_path, tmp_path):
    reward = {"reward_funcs": asking([])}
    with pytest.raises(ConfigError, match=r"'reward' asks for ref_per_token_logps.*truncated"):
        make(model_path, tmp_path, parts=reward, mask_truncated_completions=True)
    nowhere = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=8, num_attention_heads=2)
    )
    with pytest.raises(ConfigError, match=r"never saved.*give its path, or train an adapter"):
        make(nowhere, tmp_path, parts=reward)
    with_column = prompts().add_column("prompt_ids", [[1]] * 64)  # pyright: ignore[reportCallIssue]
    trainer = make(model_path, tmp_path, parts=reward | {"train_dataset": with_column})
    with pytest.raises(DataError, match=r"has a column 'prompt_ids'.*Rename"):
        trainer.train()


def test_the_phase_is_what_it_is_at(model_path, tmp_path, monkeypatch):
    """The last one set is what ran out of memory, and what the error names."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    seen = []

    def reward(completions, **kwargs):
        seen.append(trainer.phase)
        return count_a(completions)

    def rollout(prompts, trainer):
        seen.append(trainer.phase)
        ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": [[1, 2]] * len(prompts), "logprobs": None}

    class Watched(PolicyTrainer):
        def policy_loss(self, micro_batch):
            seen.append(self.phase)
            return micro_batch.per_token_logps

        def assign_credit(self, rollout):
            self.sampler_logps(rollout)
            seen.append(self.phase)
            return super().assign_credit(rollout)

    parts = {"reward_funcs": reward, "rollout_func": rollout}
    trainer = make(model_path, tmp_path, trainer=Watched, parts=parts, max_steps=1)
    assert trainer.phase == "load"
    trainer.train()
    assert seen == ["generate", "reward", "score", "train"]
    trainer.save_model()
    assert trainer.phase == "save"


def test_a_rollout_is_shared_out_to_more_micro_batches_and_to_no_fewer(model_path, tmp_path):
    trainer = make(model_path, tmp_path, steps_per_generation=4, per_device_train_batch_size=2)
    rows = torch.arange(8)
    kept = {"step": 3, "steps_per_generation": 2}
    halves = [{"completion_ids": part} for part in rows.split(4)]
    trainer._take_rollout(kept | {"buffered_inputs": halves})
    assert trainer._step == 6
    buffered: Any = trainer._buffered_inputs
    parts = [batch["completion_ids"].tolist() for batch in buffered]
    assert parts == [[0, 1], [2, 3], [4, 5], [6, 7]]
    trainer._take_rollout(kept | {"buffered_inputs": None})
    assert trainer._buffered_inputs is None
    with pytest.raises(RunError, match="in 8 micro-batches, and cannot be shared out to 4"):
        trainer._take_rollout(kept | {"steps_per_generation": 8, "buffered_inputs": None})
