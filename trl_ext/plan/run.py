"""What of a recipe decides how much memory its run takes."""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config

from trl_ext.errors import ConfigError
from trl_ext.plan.activations import Attention, Numbers
from trl_ext.plan.resident import DTYPE_BYTES, knows_optimizer
from trl_ext.plan.shapes import Shapes
from trl_ext.plan.sharding import Division, division_of
from trl_ext.recipe import Recipe
from trl_ext.recipe.schema import COMPUTED, REQUIRED

_ATTENTION: dict[str, Attention] = {"eager": "eager", "sdpa": "sdpa"}
# Trainers whose rows are pairs of completions.
_PAIRS = ("dpo", "reward")


@dataclass(frozen=True)
class Run:
    """A training run, as far as memory goes.

    Attributes:
        rows: sequences of a micro-batch on one card.
        prompt, completion: the longest lengths, tokens; offline trainers have one length, in
            `completion`.
        rollout_rows: completions that one card generates at once; 0 without generation.
        quantisation: of the linear maps, "4bit", "4bit nested", "8bit" or "".
        dtype: the name of the dtype that weights are loaded in.
        is_bf16: whether bfloat16 autocast surrounds training.
        scores: whether there are passes without gradients between rollout and training.
        copies_reference: whether a second model is loaded as the reference.
        uses_vllm: whether vLLM generates, beside training or on a server.
        vllm: share of the card that vLLM takes; 0 without it, and with a server.
        vllm_sleeps: whether vLLM gives its share back while the model trains.
        division: how state is divided over cards.
        gathers: whether whole weights are put together on each card to generate.
        not_counted: what the recipe has and this plan leaves out, in words.
        eval_rows: sequences of a batch of evaluation on one card; 0 without evaluation.
        critic_shapes: of a critic that is a model of another size than the policy.
    """

    trainer: str
    rows: int
    prompt: int
    completion: int
    rollout_rows: int
    accumulation: int
    checkpointing: bool
    optimizer: str
    quantisation: str
    dtype: str
    is_bf16: bool
    numbers: Numbers
    scores: bool
    copies_reference: bool
    critic: str
    kl_estimator: str
    uses_vllm: bool
    vllm: float
    vllm_sleeps: bool
    division: Division
    gathers: bool
    not_counted: tuple[str, ...]
    eval_rows: int = 0
    critic_shapes: Shapes | None = None


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Every key of a recipe with its value or default; keys whose default is computed are out."""
    known = recipe.defaults().items()
    literal = {name: value for name, value in known if value not in (COMPUTED, REQUIRED)}
    return literal | recipe.values


def lora_of(fields: dict[str, Any]) -> LoraConfig | None:
    """The adapter of the fields of TRL's `ModelConfig`, as TRL makes it; None for full training."""
    model = ModelConfig(**fields)
    targets = fields.get("lora_target_modules")
    if isinstance(targets, list) and targets != ["all-linear"]:
        model.lora_target_modules = targets  # TRL makes a text of a list of one
    lora = get_peft_config(model)
    assert lora is None or isinstance(lora, LoraConfig)
    return lora


def shaping(fields: dict[str, Any]) -> dict[str, Any]:
    """Those of TRL's `ModelConfig` that decide which parameters there are."""
    named = ("model_name_or_path", "model_revision", "use_peft", "use_rslora", "use_dora")
    return {key: value for key, value in fields.items() if key in named or key[:5] == "lora_"}


def run_of(
    recipe: Recipe, model_dtype: str | None, prompt_length: int, processes: int | None
) -> Run:
    """The run of a recipe.

    Args:
        recipe: from `read_recipe`.
        model_dtype: what `dtype: auto` stands for.
        prompt_length: tokens of the longest prompt.
        processes: number of cards; None: as the recipe says.

    Raises:
        ConfigError: if the recipe asks for what cannot be trained.
    """
    known = settings_of(recipe)
    _check(known)
    is_online = generates(known)
    pairs = 2 if recipe.trainer in _PAIRS else 1
    accumulation = known.get("gradient_accumulation_steps") or 1
    rows = known.get("per_device_train_batch_size") or 8
    division = division_of(recipe, processes)
    length = known.get("max_completion_length") if is_online else _length(known)
    critic = known.get("critic") if recipe.trainer == "ppo" else ""
    reference = _has_reference(recipe.trainer, known, is_online=is_online)
    dtype = _dtype(known, model_dtype)
    optimizer = str(known.get("optim") or "adamw_torch_fused")
    misaligned = accumulation % (_steps(known, accumulation) * (known.get("num_iterations") or 1))
    uses_vllm = is_online and bool(known.get("use_vllm"))
    is_beside = uses_vllm and known.get("vllm_mode") == "colocate"
    return Run(
        trainer=recipe.trainer,
        rows=rows * pairs,
        prompt=prompt_length if is_online else 0,
        completion=int(length or 0),
        rollout_rows=_rollout_rows(known, rows, accumulation, division.cards) if is_online else 0,
        accumulation=accumulation,
        checkpointing=bool(known.get("gradient_checkpointing")),
        optimizer=optimizer,
        quantisation=_quantisation(known),
        dtype=dtype,
        is_bf16=not known.get("fp16") and known.get("bf16") is not False,
        numbers=_numbers(known, dtype, is_deepspeed=division.is_deepspeed),
        scores=is_online and (reference or bool(misaligned) or bool(critic)),
        copies_reference=reference and not known.get("use_peft"),
        critic=str(critic or ""),
        kl_estimator=str(known.get("kl_estimator") or ""),
        uses_vllm=uses_vllm,
        vllm=float(known["vllm_gpu_memory_utilization"]) if is_beside else 0.0,
        vllm_sleeps=bool(known.get("vllm_enable_sleep_mode")),
        division=division,
        gathers=division.gathers and known.get("ds3_gather_for_generation") is not False,
        not_counted=tuple(_not_counted(known, optimizer)),
        eval_rows=eval_rows(known) * pairs,
    )


def eval_rows(known: dict[str, Any]) -> int:
    """Rows of a batch of evaluation on one card; 0 where the run does not evaluate."""
    evaluates = known.get("eval_on_start") or known.get("eval_strategy") not in (None, "no")
    return (known.get("per_device_eval_batch_size") or 8) if evaluates else 0


def _check(known: dict[str, Any]) -> None:
    if not known.get("use_peft") and (known.get("load_in_4bit") or known.get("load_in_8bit")):
        raise ConfigError(
            "load_in_4bit and load_in_8bit train only with an adapter: quantised weights get no "
            "gradient. Set use_peft=true."
        )


def _length(known: dict[str, Any]) -> int:
    length = known.get("max_length", 1024)
    if length is None:
        raise ConfigError(
            "max_length: got none, so the longest row is not known before the data is read. Give "
            "the longest that there is, such as max_length=1024."
        )
    return int(length)


def _steps(known: dict[str, Any], accumulation: int) -> int:
    """Micro-batches of a rollout."""
    return known.get("steps_per_generation") or accumulation


def _rollout_rows(known: dict[str, Any], rows: int, accumulation: int, processes: int) -> int:
    whole = known.get("generation_batch_size")
    return whole // processes if whole else rows * _steps(known, accumulation)


def generates(known: dict[str, Any]) -> bool:
    """Whether a trainer samples completions. One that trains on rows has a length for them whole,
    and what else it says of completions is for `trl_ext collect`.
    """
    return "max_completion_length" in known and "packing" not in known


def _has_reference(trainer: str, known: dict[str, Any], *, is_online: bool) -> bool:
    """Whether a reference scores rows: rwr's own options, DPO's, or a β that is not 0."""
    if trainer == "rwr":
        return bool(known.get("log_kl")) or known.get("reference") == "fixed"
    if trainer == "dpo":
        return not known.get("precompute_ref_log_probs")
    return is_online and "num_generations" in known and bool(known.get("beta"))


def _dtype(known: dict[str, Any], model_dtype: str | None) -> str:
    dtype = known.get("dtype") or "auto"
    return (model_dtype or "float32") if dtype == "auto" else dtype


def _quantisation(known: dict[str, Any]) -> str:
    if known.get("load_in_8bit"):
        return "8bit"
    if known.get("load_in_4bit"):
        return "4bit nested" if known.get("use_bnb_nested_quant") else "4bit"
    return ""


def _numbers(known: dict[str, Any], dtype: str, *, is_deepspeed: bool) -> Numbers:
    """w, c and l of `activations`. TRL trains in bfloat16 autocast unless bf16 is false."""
    half = known.get("fp16") or known.get("bf16") is not False
    stream = 2 if is_deepspeed and half else DTYPE_BYTES[dtype]
    quantised = bool(_quantisation(known))
    # bitsandbytes' products are made in the dtype of the weights, whatever autocast says.
    compute = 2 if half and not quantised else stream
    # peft keeps adapters in float32; TRL casts those on quantised weights to bfloat16, DeepSpeed
    # everything.
    adapter = 0 if not known.get("use_peft") else 2 if quantised or (is_deepspeed and half) else 4
    implementation = str(known.get("attn_implementation") or "sdpa")
    return Numbers(
        stream=stream,
        compute=compute,
        adapter=adapter,
        trains_base=not known.get("use_peft"),
        quantised=quantised,
        dropout=bool(known.get("use_peft") and known.get("lora_dropout")),
        attention=_ATTENTION.get(implementation, "flash"),
    )


def _not_counted(known: dict[str, Any], optimizer: str) -> list[str]:
    found = []
    if not knows_optimizer(optimizer):
        found.append(f"the states of optim={optimizer} (counted as AdamW's)")
    found += [f"the recipe's own {key} options" for key in ("fsdp", "deepspeed") if known.get(key)]
    return found
