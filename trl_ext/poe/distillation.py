"""Distil a product of experts into one model, on top of TRL's DistillationTrainer."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, ClassVar, cast

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import DistillationTrainer as TRLDistillationTrainer
from trl.trainer.utils import RepeatSampler

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError, DataError
from trl_ext.models.adapter import keep_nf4_gradients_on_cpu
from trl_ext.models.vocabulary import check_vocabularies
from trl_ext.options import own_config
from trl_ext.poe.checks import device_of, model_of, tokenizer_of
from trl_ext.poe.distillation_config import PoEDistillationConfig
from trl_ext.poe.distillation_rules import NO_ZEROS
from trl_ext.poe.loading import load_product
from trl_ext.poe.product import ProductOfExperts
from trl_ext.poe.teacher import ProductTeacher
from trl_ext.tasks.columns import check_datasets

__all__ = ["PoEDistillationConfig", "PoEDistillationTrainer"]


class PoEDistillationTrainer(TRLDistillationTrainer):
    """Train one model towards a product of experts: π → Π_k p_k^{w_k} / Z, token by token.

    Equation E14; source: Hinton (2002), "Training products of experts by minimizing contrastive
    divergence", and for on-policy distillation Agarwal et al. (2024), "On-policy distillation of
    language models". At each prefix that the student samples, a divergence between its next-token
    distribution and the product's, over the whole vocabulary. Reinforcement learning with the
    reward log P_N − log P_θ and γ = 0 has the same fixed point (Equation E15); this has no reward
    and no sampling noise in the target, and needs experts whose probabilities are known.

    Differs from `trl.DistillationTrainer`: the teacher is a product (`ProductTeacher`), and the
    divergence has a name. Everything else is TRL's: generation, the fused and tiled divergence,
    `loss` and `entropy`.

    Args:
        model: the student: path, hub id, `bundled:` name or object. It shares no weights with the
            experts; load them separately.
        experts: a `ProductOfExperts`; None makes it of `args.experts` and `args.expert_weights`.
        args: a `PoEDistillationConfig`.
        train_dataset, eval_dataset: of prompts, as `trl.DistillationTrainer` takes them.
        trl_arguments: further arguments of `trl.DistillationTrainer`, such as `peft_config`.

    Raises:
        ConfigError: if student and experts do not fit together.
        DataError: if a dataset is not of prompts, or too small for a step.
    """

    args: PoEDistillationConfig

    _tag_names: ClassVar[list[str]] = ["trl_ext", "poe_distillation"]
    _name = "PoE distillation"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        experts: ProductOfExperts | None = None,
        args: PoEDistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **trl_arguments: Any,
    ):
        model = resolve_model(model) if isinstance(model, str) else model
        args = own_config(PoEDistillationConfig, "PoEDistillationTrainer", model, args)
        if "teacher_model" in trl_arguments:
            raise ConfigError(
                "PoEDistillationTrainer takes no teacher_model: the teacher is the product. Give a "
                "ProductOfExperts as `experts`."
            )
        if args.deepspeed_plugin is not None:
            raise ConfigError(_NOT_SHARDED.format(what="DeepSpeed wraps the experts too"))
        if train_dataset is None:
            raise DataError(
                "PoEDistillationTrainer needs a train_dataset, got None. Give a datasets.Dataset "
                "with the column 'prompt'."
            )
        check_datasets(train_dataset, eval_dataset)
        _check_size(train_dataset, args)
        product = _product(experts, args)
        _check_tokens(model, product, args, trl_arguments.get("processing_class"))
        _check_apart(model, product)
        teacher = ProductTeacher(
            product, _vocab_size(model, args), may_forbid=args.divergence != "reverse_kl"
        )
        super().__init__(model, teacher, args, train_dataset, eval_dataset, **trl_arguments)  # pyright: ignore[reportArgumentType]
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ConfigError(_NOT_SHARDED.format(what="This is FSDP1"))
        if product.weights.is_scheduled and "logits_to_keep" not in self.model_kwarg_keys:
            raise ConfigError(
                "A weight of the product is a function of positions, and the student's forward "
                "takes no logits_to_keep, by which TRL says where completions begin. Give numbers "
                "as weights."
            )
        keep_nf4_gradients_on_cpu(cast(nn.Module, self.model))
        self.add_callback(_OrderOfPrompts())


_NOT_SHARDED = (
    "{what}, and in PoE distillation the student alone is sharded. Use FSDP2 "
    "(accelerate_config=fsdp2), or one process a device (DDP)."
)


class _OrderOfPrompts(TrainerCallback):
    """On resume, draw the orders of the epochs that are over: all come from one generator."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batches: Any = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        sampler = getattr(batches, "sampler", None)
        if isinstance(sampler, RepeatSampler):
            # An epoch is counted in steps, by division.
            for _ in range(int((state.epoch or 0) + 1e-6)):
                next(iter(sampler), None)


def _check_size(train_dataset: Any, args: PoEDistillationConfig) -> None:
    """TRL drops the prompts that do not fill a step."""
    needed = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if isinstance(train_dataset, Dataset) and len(train_dataset) < needed:
        raise DataError(
            f"The train dataset has {len(train_dataset)} prompts, and one step takes {needed} "
            "(per_device_train_batch_size x gradient_accumulation_steps x processes): no step "
            "could be taken. Give more prompts, or a smaller batch."
        )


def _product(experts: Any, args: PoEDistillationConfig) -> ProductOfExperts:
    if experts is None:
        if args.experts is None or args.expert_weights is None:
            raise ConfigError(
                "There are no experts. Give a ProductOfExperts as `experts`, or set experts and "
                "expert_weights in the config."
            )
        return load_product(
            args.experts,
            args.expert_weights,
            dtype=args.expert_dtype,
            device=args.device,
            plausibility=args.plausibility,
        )
    if not isinstance(experts, ProductOfExperts):
        raise ConfigError(
            f"experts is a {type(experts).__name__}; it must be a trl_ext.poe.ProductOfExperts. "
            "Paths and weights go into the config: experts and expert_weights."
        )
    for name in ("experts", "expert_weights", "plausibility"):
        if getattr(args, name) is not None:
            raise ConfigError(
                f"{name} is set in the config, and a ProductOfExperts is given, which has its own. "
                "Remove one of them."
            )
    if experts.plausibility is not None and args.divergence == "reverse_kl":
        raise ConfigError(
            NO_ZEROS.format(what=f"The product's plausibility={experts.plausibility}")
        )
    for name, expert in experts.experts.items():
        device = device_of(expert)
        # TRL moves models only.
        if model_of(expert) is None and device is not None and device.type != args.device.type:
            raise ConfigError(
                f"The expert {name!r} is on {device} and training on {args.device}. Move it with "
                f'.to("{args.device}").'
            )
    return experts


def _check_tokens(
    model: Any, product: ProductOfExperts, args: PoEDistillationConfig, processing_class: Any
) -> None:
    """Whether student and product number the same tokens alike, as far as that is known."""
    named = {name: tokenizer_of(expert) for name, expert in product.experts.items()}
    known = {name: tokenizer for name, tokenizer in named.items() if tokenizer is not None}
    loaded = getattr(product, "tokenizer", None)
    name, tokenizer = next(iter(known.items()), ("the product", loaded))
    student = processing_class or _tokenizer(model, args)
    student = getattr(student, "tokenizer", student)  # a processor's
    if tokenizer is None or student is None:
        return
    try:
        check_vocabularies({"the student": student, name: tokenizer})
    except ConfigError as error:
        raise ConfigError(f"The student cannot learn from this product. {error}") from error


def _tokenizer(model: Any, args: PoEDistillationConfig) -> Any:
    if not isinstance(model, str):
        return tokenizer_of(model)
    return AutoTokenizer.from_pretrained(model, **_origin(args))


def _vocab_size(model: Any, args: PoEDistillationConfig) -> int:
    if isinstance(model, str):
        config = AutoConfig.from_pretrained(model, **_origin(args))
    else:
        config = model.config
    return config.get_text_config().vocab_size


def _origin(args: PoEDistillationConfig) -> dict[str, Any]:
    options = args.model_init_kwargs
    revision = options.get("revision") if isinstance(options, Mapping) else None
    return {"revision": revision or "main", "trust_remote_code": args.trust_remote_code}


def _check_apart(model: Any, product: ProductOfExperts) -> None:
    """Training the student must not move its own target."""
    if isinstance(model, str):
        return
    own = set(map(id, _tensors(model)))
    for name, expert in product.experts.items():
        held = model_of(expert)
        if held is not None and any(id(tensor) in own for tensor in _tensors(held)):
            raise ConfigError(
                f"The expert {name!r} shares weights with the student, and would move as it "
                "trains. Load it separately: from_pretrained(...) once more, or give the student "
                "as a path."
            )


def _tensors(model: nn.Module) -> Iterable[Any]:
    return chain(model.parameters(), model.buffers())
