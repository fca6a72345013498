"""`OfflineRWRTrainer`: its gradients against a loop over rows, its data, its metrics."""

import math
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from tests.tiny import QUIET, save_byte_llama, save_tiny_llama
from trl_ext import trl_sft_adapter
from trl_ext.errors import ConfigError, DataError
from trl_ext.rwr import OfflineRWRConfig, OfflineRWRTrainer, RWRConfig

OPTIONS: dict[str, Any] = {
    **{name: value for name, value in QUIET.items() if name != "max_completion_length"},
    "beta": 1 / math.log(2),
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
LETTERS = "abcde"


def logged(rows: int = 22) -> list[dict]:
    """Completions of one to four letters for prompts of one or two, groups of unequal size."""
    found = []
    for i in range(rows):
        prompt = ("ab", "c", "de")[i % 7 % 3]
        completion = (LETTERS * 2)[i % 5 :][: 1 + i * 3 % 4]
        found.append({"prompt": prompt, "completion": completion, "reward": float(i * 5 % 4)})
    return found


def ids_of(text: str) -> list[int]:
    return [1 + LETTERS.index(letter) for letter in text]


class KeepGradients(TrainerCallback):
    """The gradient of each optimizer step, all parameters in one vector."""

    def __init__(self):
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(parts).clone())


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(model_path, tmp_path):
    def trainer(rows: Any = None, model: Any = None, eval_dataset: Any = None, **options):
        arguments = {
            key: options.pop(key)
            for key in ("peft_config", "quantization_config", "callbacks", "reward_funcs")
            if key in options
        }
        rows = logged() if rows is None else rows
        return OfflineRWRTrainer(
            model or model_path,
            OfflineRWRConfig(str(tmp_path / "out"), **(OPTIONS | options)),
            Dataset.from_list(rows) if isinstance(rows, list) else rows,
            eval_dataset,
            **arguments,
        )

    return trainer


def weights_by_hand(rows: list[dict]) -> list[float]:
    """2^r over the sum in its prompt, times rows over prompts."""
    total = {row["prompt"]: 0.0 for row in rows}
    for row in rows:
        total[row["prompt"]] += 2 ** row["reward"]
    return [2 ** row["reward"] / total[row["prompt"]] * len(rows) / len(total) for row in rows]


def nll_of(model, row: dict) -> torch.Tensor:
    """−log π of each token of a completion, the end token included; alone, without padding."""
    prompt, completion = ids_of(row["prompt"]), [*ids_of(row["completion"]), 0]
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return -logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def gradient_by_hand(path: str, rows: list[dict], weights: list[float], reduction: str):
    """Of the mean over rows of weight·(−log π), or its token mean, or the sum by tokens."""
    model = AutoModelForCausalLM.from_pretrained(path)
    nlls = [nll_of(model, row) for row in rows]
    reduced = [nll.mean() if reduction == "mean" else nll.sum() for nll in nlls]
    count = sum(map(len, nlls)) if reduction == "batch" else len(rows)
    loss = sum(w * n for w, n in zip(weights, reduced, strict=True)) / count
    gradients = torch.autograd.grad(loss, list(model.parameters()))  # pyright: ignore
    return torch.cat([gradient.flatten() for gradient in gradients]), float(loss)


BATCHES = {
    "one batch": {"per_device_train_batch_size": 22},
    "micro-batches": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6},
    "one row at a time": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 22},
    "padded to 8": {"per_device_train_batch_size": 11, "gradient_accumulation_steps": 2}
    | {"pad_to_multiple_of": 8},
    "padding-free": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6}
    | {"padding_free": True, "max_length": None},
    "packed": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 30}
    | {"packing": True, "max_length": 12},
}


@pytest.mark.equation("E8")
@pytest.mark.parametrize("reduction", ["sum", "mean", "batch"])
@pytest.mark.parametrize("batches", BATCHES)
def test_the_gradient_is_that_of_the_objective(make, model_path, batches, reduction):
    """All 22 rows in one optimizer step, the last micro-batch smaller than the others."""
    keep, rows = KeepGradients(), logged()
    trainer = make(
        rows, token_reduction=reduction, num_train_epochs=1, callbacks=[keep], **BATCHES[batches]
    )
    trainer.train()
    weights = weights_by_hand(rows)
    exact, loss = gradient_by_hand(model_path, rows, weights, reduction)
    (gradient,) = keep.gradients
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_model_that_takes_no_count_of_items(make, model_path):
    """transformers would then divide by the items of each micro-batch alone."""
    keep, rows = KeepGradients(), logged()
    model = AutoModelForCausalLM.from_pretrained(model_path)
    model.accepts_loss_kwargs = False  # pyright: ignore
    trainer = make(rows, model, num_train_epochs=1, callbacks=[keep], **BATCHES["micro-batches"])
    trainer.train()
    exact, _ = gradient_by_hand(model_path, rows, weights_by_hand(rows), "sum")
    (gradient,) = keep.gradients
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_a_last_incomplete_step_is_the_mean_over_its_rows(make, model_path):
    """22 rows, 16 in the first step (4 × 4), 6 in the second (4 + 2); the learning rate is 0."""
    keep, rows = KeepGradients(), logged()
    trainer = make(
        rows,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=0.0,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        callbacks=[keep],
    )
    trainer.train()
    weights = weights_by_hand(rows)
    for gradient, part in zip(keep.gradients, (slice(0, 16), slice(16, 22)), strict=True):
        exact, _ = gradient_by_hand(model_path, rows[part], weights[part], "sum")
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_token_ids_are_used_as_they_are(make, model_path):
    """ "ab" as sampled, cut off: no end token. The text alone would get one."""
    rows = [
        row | {"prompt_ids": ids_of(row["prompt"]), "completion_ids": ids_of(row["completion"])}
        for row in logged()
    ]
    trainer = make(rows)
    assert (
        trainer.train_dataset[0]["input_ids"] == rows[0]["prompt_ids"] + rows[0]["completion_ids"]
    )
    assert trainer.train_dataset[0]["labels"] == [-100, -100, *rows[0]["completion_ids"]]
    assert make().train_dataset[0]["input_ids"][-1] == 0
    ended = [row | {"completion_ids": [*row["completion_ids"], 0]} for row in rows]
    assert make(ended).train_dataset["input_ids"] == make().train_dataset["input_ids"]


def test_the_first_token_of_all_is_predicted_by_nothing():
    """Without a prompt: of two tokens one is trained on, and has the whole weight."""
    for reduction in ("sum", "mean", "batch"):
        assert trl_sft_adapter.token_weights(2.0, [5, 6], reduction) == [0.0, 2.0]
    assert trl_sft_adapter.token_weights(2.0, [-100, 5, 6], "mean") == [0.0, 1.0, 1.0]
    assert trl_sft_adapter.token_weights(2.0, [5], "mean") == [0.0]


@pytest.mark.parametrize("ids", [[1, 1], [5], [6], [2, 1, 9]])
def test_token_ids_of_another_tokenizer(make, ids):
    rows = [row | {"prompt_ids": [1], "completion_ids": ids} for row in logged()]
    with pytest.raises(
        DataError, match=r"(its completion_ids are|Are the ids) of another tokenizer"
    ):
        make(rows)
    beyond = [
        row | {"prompt_ids": [1], "completion_ids": [*ids_of(row["completion"]), 6]}
        for row in logged()
    ]
    with pytest.raises(DataError, match=r"row 0 .*: .* 6 is out of the vocabulary of the model"):
        make(beyond)


@pytest.mark.parametrize("kind", ["rows", "stream", "evaluation"])
def test_an_id_that_no_embedding_has_is_found_wherever_it_is(make, kind):
    """Row 21, far behind the rows whose texts are compared; 6 tokens have the ids 0 to 5."""
    rows = [
        row | {"prompt_ids": [1], "completion_ids": ids_of(row["completion"])} for row in logged()
    ]
    wrong = [*rows[:-1], rows[-1] | {"completion_ids": [6]}]
    given: Any = {
        "rows": lambda: make(wrong),
        "stream": lambda: make(Dataset.from_list(wrong).to_iterable_dataset(), max_steps=1),
        "evaluation": lambda: make(rows).evaluate(Dataset.from_list(wrong)),
    }[kind]
    last = len(rows) - 1
    with pytest.raises(DataError, match=rf"row {last} .*: completion_ids is .6.\. 6 is out of"):
        given()


@pytest.mark.parametrize("with_ids", [False, True])
def test_a_completion_that_nothing_predicts_from_its_start_is_refused(make, with_ids):
    """log π(y|x) would lack its first token: this tokenizer puts none in front of a text."""
    rows = logged()
    if with_ids:
        rows = [
            row | {"prompt_ids": [1], "completion_ids": ids_of(row["completion"])} for row in rows
        ]
    rows[3] |= {"prompt_ids": []} if with_ids else {"prompt": ""}
    with pytest.raises(DataError, match=f"1 of {len(rows)} completions have no token in front"):
        make(rows, beta=math.inf)


def test_attention_without_gradients_on_a_cpu_is_refused(make):
    with pytest.raises(ConfigError, match="'flex_attention' has no gradients on a CPU"):
        make(model_init_kwargs={"attn_implementation": "flex_attention"})


def test_messages(make, tmp_path):
    """The completion is what the chat template adds; its tokens alone are trained on."""
    path = save_byte_llama(tmp_path / "bytes")
    rows = [
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "completion": [{"role": "assistant", "content": text}],
            "reward": reward,
        }
        for text, reward in (("yes", 1.0), ("no", 0.0))
    ]
    trainer = make(rows, path, max_steps=1)
    tokenizer: Any = trainer.processing_class
    for row, text in zip(trainer.train_dataset, ("yes", "no"), strict=True):
        assert tokenizer.decode(row["input_ids"]) == f"user: Hi\nassistant: {text}\n"
        assert tokenizer.decode([t for t in row["labels"] if t >= 0]) == f"{text}\n"
    trainer.train()


def test_evaluation_is_weighted_and_not(make, model_path):
    """22 rows in batches of 4, in training packed: means over rows, to rounding."""
    rows, model = logged(), AutoModelForCausalLM.from_pretrained(model_path)
    nlls = torch.stack([nll_of(model, row).sum() for row in rows])
    weighted = (nlls * torch.tensor(weights_by_hand(rows))).mean().item()
    options = {"per_device_eval_batch_size": 4, "packing": True, "max_length": 12}
    found = make(rows, eval_dataset=Dataset.from_list(rows), **options).evaluate()
    assert found["eval_loss"] == pytest.approx(weighted, rel=1e-5)
    assert found["eval_unweighted_loss"] == pytest.approx(nlls.mean().item(), rel=1e-5)
    trainer = make(rows)
    trainer.evaluate(Dataset.from_list(rows[:10]))
    later = trainer.evaluate(Dataset.from_list(rows))
    assert later["eval_unweighted_loss"] == pytest.approx(nlls.mean().item(), rel=1e-5)
    assert later["eval_loss"] == pytest.approx(weighted, rel=1e-5)
    stream = IterableDataset.from_generator(logged)
    streamed = trainer.evaluate({"stream": stream})
    assert streamed["eval_stream_loss"] == pytest.approx(weighted, rel=1e-5)
    named = make(rows, eval_dataset={"mine": Dataset.from_list(rows)}).evaluate()
    assert named["eval_mine_unweighted_loss"] == pytest.approx(nlls.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("reduction", "of"), [("mean", "rows"), ("batch", "tokens")])
def test_evaluation_by_tokens(make, model_path, reduction, of):
    rows, model = logged(), AutoModelForCausalLM.from_pretrained(model_path)
    nlls = [nll_of(model, row).detach() for row in rows]
    expected = {
        "rows": torch.stack([nll.mean() for nll in nlls]).mean(),
        "tokens": torch.cat(nlls).mean(),
    }[of]
    found = make(rows, token_reduction=reduction, per_device_eval_batch_size=4).evaluate(
        Dataset.from_list(rows)
    )
    assert found["eval_unweighted_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_first_log_says_what_the_weights_are_like(make):
    """Two prompts, 2^r = 1, 4 and 1, 2: 25/17 and 9/5 effective samples."""
    rows = [
        {"prompt": prompt, "completion": completion, "reward": reward}
        for prompt, completion, reward in (("a", "a", 0.0), ("a", "b", 2.0), ("b", "a", 0.0))
    ] + [{"prompt": "b", "completion": "b", "reward": 1.0}]
    trainer = make(rows, max_steps=2)
    trainer.train()
    first, second, _ = trainer.state.log_history
    assert first["offline_rwr/effective_sample_size"] == pytest.approx((25 / 17 + 9 / 5) / 2)
    assert first["offline_rwr/beta_used"] == pytest.approx(1 / math.log(2))
    assert {"offline_rwr/uniform_groups", "offline_rwr/mass_clipped"} <= first.keys()
    assert "offline_rwr/weight_entropy" in first
    assert not any(name.startswith("offline_rwr") for name in second)
    assert trainer.train_dataset["weight"] == pytest.approx([0.4, 1.6, 2 / 3, 4 / 3])


def rows_of(**rewards: list[float]) -> list[dict]:
    """For each prompt a completion for each reward."""
    return [
        {"prompt": prompt, "completion": LETTERS[at], "reward": reward}
        for prompt, each in rewards.items()
        for at, reward in enumerate(each)
    ]


# 1/β = log 2. Prompts a and b have 2^r = 1, 4 and 1, 2: 25/17 and 9/5 effective samples, on average
# 1.64; together 64/22 = 2.91 of 4. c is uniform: left out, or 2 samples, on average 1.76.
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "1.64 of 2 effective samples a group; 33.3% of groups are uniform, left out."),
        (
            {"drop_uniform_groups": False},
            "1.76 of 2 effective samples a group; 33.3% of groups are uniform.",
        ),
    ],
)
def test_what_the_weights_are_like_is_said_before_training(make, caplog, options, says):
    make(rows_of(a=[0.0, 2.0], b=[0.0, 1.0], c=[3.0, 3.0]), **options)
    assert caplog.messages.count(f"Weights with beta = 1.443: {says}") == 1


def test_what_the_weights_of_all_rows_are_like_is_said(make, caplog):
    make(rows_of(a=[0.0, 2.0], b=[0.0, 1.0]), baseline="dataset")
    assert "Weights with beta = 1.443: 2.91 effective samples of 4." in caplog.messages


def test_with_infinite_beta_no_group_is_said_to_be_left_out(make, caplog):
    make(rows_of(a=[0.0, 2.0], c=[3.0, 3.0]), beta=math.inf)
    assert (
        "Weights with beta = inf: 2 of 2 effective samples a group; 50.0% of groups are uniform."
    ) in caplog.messages


def test_a_beta_that_was_raised_is_said(make, caplog):
    """(1 + t)² = 1.9(1 + t²) for t = exp(−1/β): 0.9t² − 2t + 0.9 = 0, t = (2 − √0.76)/1.8."""
    make(rows_of(b=[0.0, 1.0]), beta=0.5, min_effective_sample_size=1.9)
    beta = -1 / math.log((2 - math.sqrt(0.76)) / 1.8)
    says = f"Weights with beta = {beta:.4g}, raised from 0.5 by min_effective_sample_size: 1.9 of"
    assert any(message.startswith(says) for message in caplog.messages)


def test_of_several_processes_one_says_it(make, caplog, monkeypatch):
    monkeypatch.setattr(OfflineRWRConfig, "process_index", 1)
    make()
    assert "Weights with beta" not in caplog.text


def test_rows_that_are_cut_are_told(make, caplog):
    """Prompts of two letters fill max_length=2: nothing of their completions is left."""
    rows = logged()
    trainer = make(rows, max_length=2)
    cut = sum(len(row["prompt"]) == 2 for row in rows)
    assert len(trainer.train_dataset) == len(rows) - cut
    assert f"leaves no token of {cut} of {len(rows)} completions" in caplog.text
    with pytest.raises(DataError, match="max_length=1 leaves no token of any completion"):
        make(rows, max_length=1)


def test_a_stream_trains_as_a_dataset_does(make):
    losses = []
    for rows in (logged(), IterableDataset.from_generator(logged)):
        trainer = make(rows, max_steps=3, train_sampling_strategy="sequential")
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 3
    with pytest.raises(ConfigError, match="max_steps=-1 with a stream"):
        make(IterableDataset.from_generator(logged))


def test_a_packed_stream(make):
    trainer = make(IterableDataset.from_generator(logged), max_steps=2, packing=True, max_length=12)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_adapters_train(make, model_path):
    trainer = make(max_steps=2, peft_config=LORA)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}


def test_quantised_models_train_after_an_evaluation(make, tmp_path):
    """An evaluation-mode pass would make bitsandbytes lose gradients on CPUs with AVX512-BF16."""
    pytest.importorskip("bitsandbytes", reason="needs trl-ext[quant]")
    path = save_byte_llama(tmp_path / "bytes")
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    keep = KeepGradients()
    trainer = make(
        logged(),
        path,
        eval_dataset=Dataset.from_list(logged()),
        max_steps=1,
        eval_on_start=True,
        peft_config=LORA,
        quantization_config=quantised,
        callbacks=[keep],
    )
    trainer.train()
    lora = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(lora) == 4
    assert keep.gradients[0].abs().gt(0).float().mean() > 0.5


def test_a_run_that_is_resumed_ends_where_it_would_have(make, tmp_path):
    ends = []
    for resume in (False, True):
        trainer = make(
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            per_device_train_batch_size=4,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2") if resume else None)
        ends.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_packed_rows_that_see_each_other_are_refused(make, model_path):
    """A model that ignores positions attends over the whole pack."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    inner = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: inner(*args, **kwargs)
    for options in (
        {"packing": True, "max_length": 12},
        {"padding_free": True, "max_length": None},
    ):
        with pytest.raises(ConfigError, match="rows of this model see each other"):
            make(model=model, **options)
    make(model=model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_do_not_see_each_other(make, attention):
    make(packing=True, max_length=12, model_init_kwargs={"attn_implementation": attention})


def test_with_zero3_packing_cannot_be_checked(make, monkeypatch):
    monkeypatch.setattr("trl_ext.trl_sft_adapter.trainer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match="ZeRO-3 it cannot be checked"):
        make(packing=True, max_length=12)


@pytest.mark.parametrize("cut", ["cp_size", "sp_size"])
def test_parallelism_that_cuts_rows_is_refused(cut):
    options: dict[str, Any] = {cut: 2}
    with pytest.raises(ConfigError, match="sequence parallelism cut rows"):
        trl_sft_adapter.check_rows_stay_whole(ParallelismConfig(**options))
    trl_sft_adapter.check_rows_stay_whole(ParallelismConfig(dp_replicate_size=2))
    trl_sft_adapter.check_rows_stay_whole(None)


def test_batches_that_are_dealt_out_are_refused(make):
    with pytest.raises(ConfigError, match="dispatch_batches=True cuts up the batches"):
        make(accelerator_config={"dispatch_batches": True})


def test_rewards_score_rows_that_have_none(make):
    rows = [{"prompt": "a", "completion": c} for c in ("a", "bbb")]

    def length(completions, **columns):
        return [float(len(c)) for c in completions]

    assert make(rows, reward_funcs=length).train_dataset["weight"] == pytest.approx([0.4, 1.6])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta": -1.0}, "beta=-1.0 must be 0 .best of n. or between 1e-15 and inf"),
        ({"beta": 1e-40}, "beta=1e-40 must be 0"),
        ({"beta": math.nan}, "beta=nan must be 0"),
        ({"beta": True}, "beta=True is a bool; it must be a number"),
        ({"beta": "1"}, "beta='1' is a str; it must be a number"),
        ({"baseline": "mean"}, "baseline='mean' must be one of group, dataset, value"),
        ({"token_reduction": "max"}, "must be one of sum, mean, batch"),
        ({"reference": "first"}, "must be one of moving, fixed"),
        ({"max_weight": 0.5}, "max_weight=0.5 must be at least 1, or None"),
        ({"max_weight": True}, "max_weight=True is a bool; it must be a number or None"),
        ({"min_effective_sample_size": math.nan}, "must be at least 1, or None"),
        ({"reward_threshold": math.nan}, "reward_threshold=nan must be a number"),
        ({"importance_weights": True, "beta": 0.0}, "has no Gibbs policy as its target"),
        ({"drop_uniform_groups": 1}, "is a int; it must be True or False"),
        ({"num_generations": 2.5}, "num_generations=2.5 is a float; it must be a whole number"),
        ({"stop_strings": "a"}, "it must be a list of texts or None"),
        ({"stop_strings": [""]}, "holds an empty text"),
        ({"reward_timeout": 0.0}, "reward_timeout=0.0 must be > 0"),
        ({"loss_type": "dft"}, "loss_type='dft' does nothing here"),
        ({"assistant_only_loss": True}, "assistant_only_loss=True does nothing here"),
        ({"dataset_text_field": "t"}, "rows have a prompt and a completion"),
        ({"label_smoothing_factor": 0.1}, "without other labels"),
        ({"completion_only_loss": False}, "would weigh the prompt's tokens"),
        ({"packing": True, "packing_strategy": "wrapped"}, "cuts completions in the middle"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "Use packing_strategy='bfd'"),
        ({"packing": True, "max_length": None}, "max_length is the size of a pack"),
        ({"padding_free": True}, "without packing nothing is cut to it"),
        ({"eval_packing": True}, "evaluation is the mean over rows"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "leaves rows without tokens"),
        ({"average_tokens_across_devices": False}, "each process would divide by its own rows"),
    ],
)
def test_bad_options(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        OfflineRWRConfig(str(tmp_path), **(OPTIONS | options))


def test_all_findings_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        OfflineRWRConfig(str(tmp_path), **OPTIONS | {"max_weight": 0.0, "loss_type": "dft"})
    assert str(error.value).count("\n") == 2


@pytest.mark.parametrize(
    "options", [{"completion_only_loss": True}, {"beta": 1}, {"beta": math.inf}]
)
def test_options_that_pass(tmp_path, options):
    OfflineRWRConfig(str(tmp_path), **(OPTIONS | options))


def test_arguments_that_do_not_fit(model_path, tmp_path):
    rows = Dataset.from_list(logged())
    with pytest.raises(ConfigError, match="takes args of type OfflineRWRConfig, got RWRConfig"):
        OfflineRWRTrainer(model_path, RWRConfig(str(tmp_path), use_cpu=True), rows)  # pyright: ignore
    args = OfflineRWRConfig(str(tmp_path), **OPTIONS)
    for name in ("data_collator", "compute_loss_func", "formatting_func"):
        with pytest.raises(ConfigError, match=f"takes no {name}"):
            OfflineRWRTrainer(model_path, args, rows, **{name: print})
    with pytest.raises(DataError, match="needs a train_dataset, got None"):
        OfflineRWRTrainer(model_path, args)
