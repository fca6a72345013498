import json
import shutil
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.tiny import QUIET, VOCABULARY, prompts, save_byte_llama, save_tiny_llama
from trl_ext import PoEDistillationConfig, PoEDistillationTrainer
from trl_ext.errors import ConfigError, DataError, RunError
from trl_ext.launch import train
from trl_ext.oracle import tabular_tokenizer
from trl_ext.poe import Adapter, NGramExpert, ProductOfExperts
from trl_ext.recipe import read_recipe

NONE = object()  # a dataset that is None


def shaken(path: str, seed: int) -> LlamaForCausalLM:
    """Another model of the same shape."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def product(student) -> ProductOfExperts:
    return ProductOfExperts(
        {"a": shaken(student, 1), "b": shaken(student, 2)}, {"a": 0.5, "b": 0.8}
    )


def ngram() -> NGramExpert:
    corpus = [torch.randint(1, VOCABULARY, (30,)).tolist() for _ in range(5)]
    return NGramExpert.fit(corpus, order=2, vocab_size=VOCABULARY, pseudo_count=0.5)


class Forbidding:
    """An expert that knows three tokens only."""

    vocab_size = VOCABULARY

    def log_probs(self, input_ids, attention_mask=None):
        scores = torch.full((*input_ids.shape, VOCABULARY), -torch.inf)
        return scores.index_fill(-1, torch.tensor([0, 1, 2]), 0.0).log_softmax(-1)


@pytest.fixture
def make(tmp_path, student, product):
    """make(**options) -> a trainer of the tiny model; model, experts, data may be given too."""

    def trainer(
        model=None, experts=product, train_dataset=None, eval_dataset=None, more=None, **options
    ):
        settings: dict[str, Any] = (
            QUIET | {"per_device_train_batch_size": 4, "max_steps": 2} | options
        )
        args = PoEDistillationConfig(str(tmp_path / "out"), **settings)
        data = prompts() if train_dataset is None else train_dataset
        data = None if data is NONE else data
        return PoEDistillationTrainer(
            model or student, experts, args, data, eval_dataset, **(more or {})
        )

    return trainer


# Prompts padded on the left, completions on the right.
BATCH = {
    "prompt_ids": torch.tensor([[0, 0, 3], [1, 2, 3], [0, 5, 4]]),
    "prompt_mask": torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]]),
    "completion_ids": torch.tensor([[4, 5, 1, 2], [3, 0, 0, 0], [2, 2, 0, 0]]),
    "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
}
DIVERGENCES = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd"},
    {"divergence": "jsd", "jsd_weight": 0.1},
    {"divergence": "jsd", "jsd_weight": 0.9},
    {"divergence": "reverse_kl", "temperature": 0.7},
]


def exact_loss(student, product, divergence, jsd_weight=0.5, temperature=1.0):
    """The mean over completion tokens, from the whole logits of both, as the definitions say."""
    ids = torch.cat([BATCH["prompt_ids"], BATCH["completion_ids"]], dim=1)
    mask = torch.cat([BATCH["prompt_mask"], BATCH["completion_mask"]], dim=1)
    logits = student(ids, attention_mask=mask).logits[:, 2:-1]
    own = (logits / temperature).log_softmax(-1)
    target = (product.log_probs(ids, mask)[:, 2:-1] / temperature).log_softmax(-1)

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    mixture = (jsd_weight * target.exp() + (1 - jsd_weight) * own.exp()).log()
    per_token = {
        "forward_kl": lambda: kl(target, own),
        "reverse_kl": lambda: kl(own, target),
        "jsd": lambda: jsd_weight * kl(target, mixture) + (1 - jsd_weight) * kl(own, mixture),
    }[divergence]()
    kept = BATCH["completion_mask"].bool()
    return per_token[kept].mean()


@pytest.mark.equation("E14")
@pytest.mark.parametrize("teacher", ["two models", "a model and an n-gram"])
@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda o: "-".join(map(str, o.values())))
def test_loss_and_gradient_are_exact(make, student, product, teacher, options):
    if teacher != "two models":
        product = ProductOfExperts([shaken(student, 1), ngram()], [0.7, 0.5])
    trainer = make(experts=product, gradient_checkpointing=False, **options)
    assert trainer.teacher_model.is_linear == (teacher == "two models")
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(BATCH)).backward()
    loss = trainer.compute_loss(trainer.model, dict(BATCH))
    other = LlamaForCausalLM.from_pretrained(student)
    wanted = exact_loss(other, product, **options)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=0)
    for (name, given), expected in zip(
        trainer.model.named_parameters(), other.parameters(), strict=True
    ):
        torch.testing.assert_close(given.grad, expected.grad, atol=1e-5, rtol=0, msg=name)


def test_accumulated_micro_batches_are_one_batch(make):
    """GA = 1 and GA = 4 have the same gradient: TRL divides by the tokens of all."""
    norms = []
    for rows, accumulated in ((8, 1), (2, 4)):
        trainer = make(
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
        )
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_only_the_student_trains_and_is_saved(make, product, tmp_path):
    before = {name: value.clone() for name, value in product.state_dict().items()}
    trainer = make(
        max_steps=3,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        gradient_checkpointing=True,
        more={"peft_config": LoraConfig(r=2, target_modules=["q_proj", "up_proj"])},
    )
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(torch.equal(before[name], v) for name, v in product.state_dict().items())
    assert all(p.grad is None for p in product.parameters())
    assert not product.training
    moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert moved == list(start)
    assert any(
        not torch.equal(p, start[n]) for n, p in trainer.model.named_parameters() if n in start
    )
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert [file.name for file in checkpoint.glob("*.safetensors")] == ["adapter_model.safetensors"]
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert len(saved) == len(start) and all("lora" in name for name in saved)
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == len(start)


def test_a_product_of_adapters_teaches_a_new_adapter(make, student):
    lora = {"init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
    torch.manual_seed(4)
    teacher = get_peft_model(LlamaForCausalLM.from_pretrained(student), LoraConfig(**lora), "x")
    product = ProductOfExperts(
        {"x": Adapter(teacher, "x"), "base": Adapter(teacher, None)}, [1.5, -0.5]
    )
    trainer = make(
        experts=product,
        max_steps=12,
        learning_rate=3e-2,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",
        more={"peft_config": LoraConfig(r=8, target_modules=["q_proj", "down_proj"])},
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert isinstance(trainer.model, PeftModel) and teacher.active_adapters == ["x"]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_bf16_runs(make):
    trainer = make(bf16=True, max_steps=1)
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))


def test_evaluation_measures_the_divergence(make):
    trainer = make(eval_dataset=prompts(8), per_device_eval_batch_size=8)
    assert trainer.evaluate()["eval_loss"] > 0


def test_resume_goes_on_as_if_nothing_had_happened(make, tmp_path):
    """Two steps an epoch, stopped in the second: prompts, samples and weights are the same."""
    options = {
        "train_dataset": prompts(8),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 3,
        "more": {"peft_config": LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"])},
    }
    whole = make(**options)
    whole.train()
    resumed = make(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    keys = ("loss", "grad_norm", "entropy", "completions/mean_length")
    logs = [
        [{k: line[k] for k in keys} for line in t.state.log_history if "loss" in line]
        for t in (whole, resumed)
    ]
    assert len(logs[0]) == 5 and logs[0] == logs[1]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


# What is refused.


def test_shared_weights(make, student):
    model = LlamaForCausalLM.from_pretrained(student)
    product = ProductOfExperts({"base": model, "b": shaken(student, 2)}, [0.5, 0.5])
    wanted = (
        "The expert 'base' shares weights with the student, and would move as it trains. Load it "
        "separately: from_pretrained(...) once more, or give the student as a path."
    )
    with pytest.raises(ConfigError) as error:
        make(model=model, experts=product)
    assert str(error.value) == wanted
    adapters = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), "x")
    adapters.add_adapter("new", LoraConfig(target_modules=["q_proj"]))
    product = ProductOfExperts({"base": Adapter(adapters, "x")}, [1.0])
    with pytest.raises(ConfigError) as error:
        make(model=adapters, experts=product)
    assert str(error.value) == wanted


def test_vocabularies(make, student, tmp_path):
    model = shaken(student, 1)
    folder = tmp_path / "expert"
    model.save_pretrained(folder)
    tokenizer = tabular_tokenizer(VOCABULARY)
    swapped = json.loads(tokenizer.backend_tokenizer.to_str())
    swapped["model"]["vocab"] |= {"b": 3, "c": 2}
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(swapped))
    product = ProductOfExperts({"other": LlamaForCausalLM.from_pretrained(folder)}, [1.0])
    with pytest.raises(ConfigError) as error:
        make(experts=product)
    assert str(error.value) == (
        "The student cannot learn from this product. 'the student' and 'other' have different "
        "vocabularies: token 2 is 'b' for 'the student' and 'c' for 'other'. Their probabilities "
        "of one token are put together; take models of one tokenizer."
    )
    # A model in memory, with a tokenizer of its own.
    with pytest.raises(ConfigError, match="token 2 is 'b'"):
        make(
            model=LlamaForCausalLM.from_pretrained(student),
            experts=product,
            more={"processing_class": AutoTokenizer.from_pretrained(student)},
        )


REFUSED = {
    "a teacher": (
        {"more": {"teacher_model": "some/model"}},
        ConfigError,
        "takes no teacher_model: the teacher is the product. Give a ProductOfExperts as `experts`.",
    ),
    "no experts": (
        {"experts": None},
        ConfigError,
        "There are no experts. Give a ProductOfExperts as `experts`, or set experts and "
        "expert_weights in the config.",
    ),
    "experts of another kind": (
        {"experts": {"a": "some/path"}},
        ConfigError,
        "experts is a dict; it must be a trl_ext.poe.ProductOfExperts. Paths and weights go into "
        "the config: experts and expert_weights.",
    ),
    "experts twice": (
        {"plausibility": 0.1, "divergence": "jsd"},
        ConfigError,
        "plausibility is set in the config, and a ProductOfExperts is given, which has its own.",
    ),
    "too few prompts": (
        {"train_dataset": prompts(3)},
        DataError,
        "The train dataset has 3 prompts, and one step takes 4 (per_device_train_batch_size x "
        "gradient_accumulation_steps x processes): no step could be taken. Give more prompts, or a "
        "smaller batch.",
    ),
    "no dataset": (
        {"train_dataset": NONE},
        DataError,
        "PoEDistillationTrainer needs a train_dataset, got None. Give a datasets.Dataset with the "
        "column 'prompt'.",
    ),
    "no prompts": (
        {"train_dataset": Dataset.from_dict({"text": ["a"]})},
        DataError,
        "The dataset train_dataset has no column 'prompt'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(make, case):
    options, kind, text = REFUSED[case]
    with pytest.raises(kind) as error:
        make(**options)
    assert text in str(error.value)


def test_a_config_of_trls(student, product, tmp_path):
    args = trl.DistillationConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ConfigError) as error:
        PoEDistillationTrainer(student, product, args, prompts())  # pyright: ignore
    assert str(error.value) == (
        "PoEDistillationTrainer takes args of type PoEDistillationConfig, got DistillationConfig "
        "of trl. Build it as trl_ext.PoEDistillationConfig(...): it has the same fields and adds "
        "its own."
    )


def test_zeros_and_the_reverse_divergence(make, student):
    experts = [shaken(student, 1), shaken(student, 2)]
    product = ProductOfExperts(experts, [1, -1], plausibility=0.1)
    with pytest.raises(ConfigError) as error:
        make(experts=product)
    assert str(error.value) == (
        "The product's plausibility=0.1 gives tokens probability 0, and KL(student‖product), "
        "divergence: reverse_kl, is then infinite. Use divergence: forward_kl or jsd."
    )
    for divergence in ("forward_kl", "jsd"):
        trainer = make(experts=product, divergence=divergence)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] < 10
    trainer = make(experts=ProductOfExperts([experts[0], Forbidding()], [1.0, 1.0]))
    with pytest.raises(RunError, match="An expert of the product gives tokens probability 0"):
        trainer.train()


def test_a_student_that_does_not_say_where_completions_begin(make, student, monkeypatch):
    product = ProductOfExperts([shaken(student, 1), shaken(student, 2)], [lambda at: 0.1 * at, 0.5])
    make(experts=product).train()
    forward = LlamaForCausalLM.forward

    def without(self, input_ids=None, attention_mask=None, **more):
        return forward(self, input_ids, attention_mask, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", without)
    with pytest.raises(ConfigError) as error:
        make(experts=product)
    assert str(error.value) == (
        "A weight of the product is a function of positions, and the student's forward takes no "
        "logits_to_keep, by which TRL says where completions begin. Give numbers as weights."
    )


def test_deepspeed(student, product, tmp_path):
    args = PoEDistillationConfig(str(tmp_path), use_cpu=True, bf16=False)
    args.deepspeed_plugin = cast(Any, SimpleNamespace(zero_stage=2))
    with pytest.raises(ConfigError) as error:
        PoEDistillationTrainer(student, product, args, prompts())
    assert str(error.value) == (
        "DeepSpeed wraps the experts too, and in PoE distillation the student alone is sharded. "
        "Use FSDP2 (accelerate_config=fsdp2), or one process a device (DDP)."
    )


def test_fsdp1(make, monkeypatch):
    init = trl.DistillationTrainer.__init__

    def sharded(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(trl.DistillationTrainer, "__init__", sharded)
    with pytest.raises(ConfigError, match=r"This is FSDP1, and in .* Use FSDP2"):
        make()


# Options.


@pytest.mark.parametrize(
    ("options", "beta"),
    [
        ({}, 1.0),
        ({"divergence": "reverse_kl"}, 1.0),
        ({"divergence": "forward_kl"}, 0.0),
        ({"divergence": "jsd"}, 0.5),
        ({"divergence": "jsd", "jsd_weight": 0.2}, 0.2),
        ({"divergence": "jsd", "jsd_weight": 0.2, "beta": 0.2}, 0.2),
    ],
)
def test_the_divergence_sets_trls_beta(tmp_path, options, beta):
    args = PoEDistillationConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    assert args.beta == beta


TEMPERATURE = "it must be a number greater than 0: the student samples, and both distributions are "
EXPERTS = {"experts": {"base": "some/model", "style": "some/other"}}
WRONG_OPTIONS = [
    (
        {"beta": 0.5},
        "beta=0.5 does nothing here: it is a KL coefficient in every config here; divergence and "
        "jsd_weight say which divergence is meant. Remove it.",
    ),
    (
        {"teacher_model_name_or_path": "x"},
        "teacher_model_name_or_path='x' does nothing here: the teacher is the product of the "
        "experts. Remove it.",
    ),
    (
        {"divergence": "kl"},
        "divergence: got 'kl'; it must be one of reverse_kl, forward_kl, jsd.",
    ),
    (
        {"expert_dtype": "bf16"},
        "expert_dtype: got 'bf16'; it must be one of float32, bfloat16, float16.",
    ),
    (
        {"jsd_weight": 0.5},
        "jsd_weight: got 0.5, which does nothing with divergence: reverse_kl. Remove it, or set "
        "divergence: jsd.",
    ),
    (
        {"jsd_weight": 1.0, "divergence": "jsd"},
        "jsd_weight: got 1.0; it must lie between 0 and 1, both excluded: at 0 the divergence is "
        "forward_kl and at 1 reverse_kl, which have names of their own.",
    ),
    (
        {"plausibility": 2},
        "plausibility: got 2; it must be greater than 0 and at most 1, or null.",
    ),
    (
        {"plausibility": 0.1},
        "plausibility: got 0.1, which gives tokens probability 0, and KL(student‖product), "
        "divergence: reverse_kl, is then infinite. Use divergence: forward_kl or jsd.",
    ),
    ({"temperature": 0.0}, f"temperature: got 0.0; {TEMPERATURE}compared, at it."),
    ({"temperature": "1"}, f"temperature: got '1'; {TEMPERATURE}compared, at it."),
    ({"experts": ["a"]}, "experts: got a list; it must map names to paths or hub ids."),
    (
        {"experts": {}, "expert_weights": {}},
        "experts: names no expert; a product needs at least one, name: path or hub id.",
    ),
    (
        {"experts": {"base": ""}, "expert_weights": {"base": 1}},
        "experts: the expert 'base' lies at ''; give a path, a hub id or bundled:name.",
    ),
    (
        {"expert_weights": {"base": 1}},
        "expert_weights: given without experts: name the experts that they weigh.",
    ),
    (EXPERTS, "expert_weights: missing; give each expert a number: base, style."),
    (
        {**EXPERTS, "expert_weights": [0.5, 0.5]},
        "expert_weights: got a list; give each expert a number: base, style.",
    ),
    (
        {**EXPERTS, "expert_weights": {"base": 0.5, "stile": 0.5, "style": 1}},
        "expert_weights: names 'stile', which is no expert. Did you mean style? The experts: base, "
        "style.",
    ),
    (
        {**EXPERTS, "expert_weights": {"base": 0.5}},
        "expert_weights: has no weight for the expert 'style'.",
    ),
    (
        {**EXPERTS, "expert_weights": {"base": 0.5, "style": True}},
        "expert_weights: the weight of 'style' is True; it must be a finite number.",
    ),
    (
        {**EXPERTS, "expert_weights": {"base": 0, "style": 0}},
        "expert_weights: all are 0 (base=0, style=0): the product would know nothing.",
    ),
    (
        {**EXPERTS, "expert_weights": {"base": 1, "style": -1}},
        "expert_weights: sum to 0 (base=1, style=-1), and must sum to more than 0, or the product "
        "is no distribution that the experts would recognise. A contrast needs plausibility: 0.1, "
        "which cuts it off, and divergence: forward_kl or jsd.",
    ),
]


@pytest.mark.parametrize(("options", "text"), WRONG_OPTIONS)
def test_wrong_options(tmp_path, options, text):
    with pytest.raises(ConfigError) as error:
        PoEDistillationConfig(str(tmp_path), **options)
    assert str(error.value) == f"PoEDistillationConfig:\n  {text}"


# Recipes.

RECIPE = """\
trainer: poe_distillation
output_dir: {out}
model_name_or_path: {student}
experts:
  base: {student}
  style: {style}
  counted: {counted}
expert_weights: {{base: 0.4, style: 0.4, counted: 0.2}}
divergence: forward_kl
bf16: false
use_cpu: true
dataset_name: char_reverse
dataset_kwargs: {{size: 16, eval_size: 4}}
eval_on_start: true
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
max_completion_length: 6
max_steps: 2
save_steps: 1
logging_steps: 1
report_to: none
dataloader_pin_memory: false
use_peft: true
lora_target_modules: [q_proj, v_proj]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A byte-level student, a LoRA adapter on it, and a counted expert of its tokens."""
    root = tmp_path_factory.mktemp("experts")
    student = save_byte_llama(root / "student")
    torch.manual_seed(5)
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(student), lora).save_pretrained(root / "style")
    tokenizer = AutoTokenizer.from_pretrained(student)
    corpus = tokenizer(["abcabc", "cab"])["input_ids"]
    counted = NGramExpert.fit(corpus, order=2, tokenizer=tokenizer, pseudo_count=0.5)
    counted.save(root / "counted")
    return {"student": student, "style": str(root / "style"), "counted": str(root / "counted")}


def write(folder, folders, change=("", "")):
    recipe = folder / "recipe.yaml"
    text = RECIPE.format(out=folder / "out", **folders)
    assert change[0] in text
    recipe.write_text(text.replace(*change))
    return recipe


@pytest.mark.parametrize("counted", [True, False])
def test_a_recipe(tmp_path, folders, capsys, counted):
    change = () if counted else ("  counted: " + folders["counted"] + "\n", "")
    recipe = write(tmp_path, folders, change or ("", ""))
    settings = [] if counted else ["expert_weights={base: 0.5, style: 0.5}"]
    train(read_recipe(recipe, settings))
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2]
    assert (out / "adapter_model.safetensors").is_file()
    assert (out / "checkpoint-1" / "optimizer.pt").is_file()
    assert "LoRA adapter is in" in capsys.readouterr().out
    assert "PoE distillation" in (out / "README.md").read_text()
    again = read_recipe(out / "recipe.yaml")
    assert again.values["experts"]["style"] == folders["style"]
    train(again, resume=str(out / "checkpoint-1"))
    resumed = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in resumed if "loss" in x] == [x["loss"] for x in lines if "loss" in x]


FINDINGS = [
    (("experts:\n  base", "expertz:\n  base"), [4], "expertz: unknown key"),
    (("experts:\n", "beta: 0.5\nexperts:\n"), [4], "beta: got 0.5, which does nothing here"),
    (
        ("base: 0.4", "bass: 0.4"),
        [8, 8],
        "expert_weights: names 'bass', which is no expert. Did you",
    ),
    ((", counted: 0.2", ""), [8], "expert_weights: has no weight for the expert 'counted'."),
    (("0.4, style: 0.4", "-0.4, style: 0.2"), [8], "expert_weights: sum to 0 (base=-0.4, style"),
    (("counted: 0.2", "counted: .nan"), [8], "expert_weights: the weight of 'counted' is nan"),
    (("base: 0.4", "base: much"), [8], "expert_weights: got {'base': 'much'"),
    (("divergence: forward_kl", "divergence: kl"), [9], "divergence: got 'kl'; allowed"),
    (("divergence: forward_kl", "jsd_weight: 0.5"), [9], "jsd_weight: got 0.5, which does nothing"),
    (("divergence: forward_kl", "plausibility: 0.5"), [9], "plausibility: got 0.5, which gives"),
    (
        ("divergence: forward_kl", "reward_funcs: [exact_match]"),
        [9],
        "reward_funcs: got ['exact_match'], and trainer: poe_distillation takes no reward_funcs.",
    ),
    (
        ("divergence: forward_kl", "reward_model_name_or_path: some/model"),
        [9],
        "reward_model_name_or_path: got 'some/model', and trainer: poe_distillation takes no",
    ),
]


@pytest.mark.parametrize(("change", "lines", "text"), FINDINGS)
def test_findings(tmp_path, folders, change, lines, text):
    recipe = write(tmp_path, folders, change)
    with pytest.raises(ConfigError) as error:
        read_recipe(recipe)
    assert f"recipe.yaml:{lines[0]}: {text}" in str(error.value)


def test_a_recipe_without_experts(tmp_path, folders):
    text = RECIPE.format(out=tmp_path, **folders)
    start, end = text.index("experts:"), text.index("divergence:")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text[:start] + text[end:])
    with pytest.raises(ConfigError) as error:
        read_recipe(recipe)
    assert str(error.value).endswith(
        "recipe.yaml: experts: missing; name the experts of the product, each with its path or hub "
        "id"
    )
    recipe.write_text(text[:start] + "experts: {}\n" + text[end:])
    with pytest.raises(
        ConfigError, match=r"recipe.yaml:4: experts: names no expert; a product needs"
    ):
        read_recipe(recipe)


def test_an_expert_that_is_not_there(tmp_path, folders):
    recipe = write(tmp_path, folders, ("style: " + folders["style"], "style: /no/such/folder"))
    with pytest.raises(ConfigError, match="/no/such/folder"):
        train(read_recipe(recipe))


def test_a_run_does_not_replace_its_own_expert(tmp_path, folders):
    expert = tmp_path / "out" / "style"
    shutil.copytree(folders["style"], expert)
    for file in ("recipe.yaml", "environment.json"):  # what marks a run
        (tmp_path / "out" / file).touch()
    recipe = write(tmp_path, folders, ("style: " + folders["style"], f"style: {expert}"))
    with pytest.raises(ConfigError, match=r"would remove experts.style .*, which lies in the "):
        train(read_recipe(recipe), overwrite=True)
    assert expert.is_dir()


REWARDS_OF_RUNS = {
    "reward_funcs.0.expert": "reward_funcs: [{{name: log_ratio, expert: {path}}}]",
    "reward_funcs.1.reward.model": (
        "reward_funcs: [exact_match, {{name: minus_reference, reward: {{name: reward_model, "
        "model: {path}}}}}]"
    ),
    "reward_funcs.0.expert.ngram": (
        "reward_funcs: [{{name: log_ratio, expert: {{ngram: {path}}}, tokenizer: x}}]"
    ),
    "reward_model_name_or_path": "reward_model_name_or_path: {path}",
}


@pytest.mark.parametrize("key", REWARDS_OF_RUNS)
def test_a_run_does_not_replace_what_its_rewards_are_made_of(tmp_path, key):
    out = tmp_path / "out"
    out.mkdir()
    for file in ("recipe.yaml", "environment.json", "kept"):  # the first two mark a run
        (out / file).touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"trainer: reinforce\noutput_dir: {out}\nmodel_name_or_path: some/model\n"
        f"dataset_name: char_reverse\n{REWARDS_OF_RUNS[key].format(path=out / 'kept')}\n"
    )
    with pytest.raises(ConfigError, match=f"would remove {key} '.*kept', which lies in the output"):
        train(read_recipe(recipe), overwrite=True)
    assert (out / "kept").is_file()


def test_a_broken_expert_does_not_break_the_student(make, student):
    broken = shaken(student, 1)
    broken.model.embed_tokens.weight.data[2:] = torch.nan
    experts = {"broken": broken, "b": shaken(student, 2)}
    with pytest.raises(RunError, match="The expert 'broken' gives NaN or infinite"):
        make(experts=ProductOfExperts(experts, [0.5, 0.5]), max_steps=1).train()
