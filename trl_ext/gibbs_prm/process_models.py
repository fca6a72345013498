"""The models of a process reward in training, on the policy's frozen weights where that is so."""

import copy
import logging
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model

from trl_ext.bundled import resolve_model
from trl_ext.errors import ConfigError
from trl_ext.gibbs_prm.saved_run import saved_run
from trl_ext.gibbs_prm.scorer import GibbsScorer
from trl_ext.models.adapter import Adapter, Causal, wrapped_model
from trl_ext.models.loading import base_of, is_adapter, load_causal, load_model
from trl_ext.models.twin import can_share, place_of, without_adapters

logger = logging.getLogger(__name__)

# Adapters of a model that learns; peft saves the first of these names at the top of a folder.
LEARNS, BEGAN_AS = "default", "began_as"


def open_frozen(trainer: Any, tokenizer: Any) -> GibbsScorer:
    """The scorer that the options name, on the policy's frozen weights where it is made for them.

    Raises:
        ConfigError: if it cannot be opened, or nothing tells its β or its reference.
    """
    args = trainer.args
    policy: Any = resolve_model(args.process_reward)
    run = saved_run(policy)
    reference = args.process_reference or (run.start if run else None)
    beta = args.process_beta or (run.beta if run else None)
    _check_told(args.process_reward, policy, beta, reference)
    place = _place_below("process_reward", policy)
    if can_share(trainer.model, place) and is_adapter(policy) and not is_sharded(trainer):
        twin = without_adapters(trainer.model)
        policy = Adapter(PeftModel.from_pretrained(twin, policy, adapter_name="0"), "0")
        reference = None if reference and place_of(reference) == place else reference
    try:
        scorer = GibbsScorer(
            policy,
            reference,
            tokenizer,
            beta,
            temperature=run.temperature if run else None,
            dtype=_dtype(trainer),
            device=trainer.args.device,
        )
    except ConfigError as error:
        # Its "policy" is not the one that trains.
        raise ConfigError(f"process_reward={args.process_reward!r}: {error}") from error
    for note in run.notes if run else []:
        logger.warning("process_reward %s: %s", args.process_reward, note)
    return scorer


def is_sharded(trainer: Any) -> bool:
    """Whether the policy's weights are spread over processes."""
    return trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled


def _check_told(name: str, path: str, beta: float | None, reference: str | None) -> None:
    beside = "no recipe.yaml beside it" if Path(path).is_dir() else "there is no such folder here"
    if beta is None:
        raise ConfigError(
            f"process_beta is not known for process_reward={name!r}: {beside} that tells the β it "
            "was trained with. Correct the path, or set process_beta, in reward units per nat."
        )
    if reference is None and not is_adapter(path):
        raise ConfigError(
            f"process_reference is not known: process_reward={name!r} is no adapter, and {beside} "
            "that tells what it began as. Correct the path, or set process_reference."
        )
    if reference is not None and place_of(reference) == place_of(path):
        raise ConfigError(
            f"process_reference is process_reward, {name!r}: its log-ratio to itself is 0, and "
            "rewards nothing. Set process_reference to what it began as."
        )


def open_learner(trainer: Any, name: str) -> Causal:
    """π_φ of the online mode, with what learns of it trainable.

    Raises:
        ConfigError: if it cannot be opened, or takes no adapter like the policy's.
    """
    path = resolve_model(name)
    base = _place_below("process_reward", path)
    if can_share(trainer.model, base):
        model = without_adapters(trainer.model)
    else:
        model = load_model("process_reward", base, _dtype(trainer), trainer.args.device)
    if is_adapter(path):
        adapted = PeftModel.from_pretrained(model, path, adapter_name=LEARNS, is_trainable=True)
    elif isinstance(trainer.model, PeftModel):
        adapted = _with_new_adapter(model, trainer.model, name)
    else:
        return model.requires_grad_(True)
    return Adapter(adapted.to(trainer.args.device), LEARNS)


def _with_new_adapter(model: Any, policy: PeftModel, name: str) -> PeftModel:
    lora = copy.deepcopy(policy.peft_config[policy.active_adapters[0]])
    if not isinstance(lora, LoraConfig):
        raise ConfigError(
            f"The policy's adapter is a {type(lora).__name__}; a process reward that learns takes "
            "LoRA. Train LoRA, or give process_reward a LoRA adapter."
        )
    lora.modules_to_save, lora.inference_mode, lora.base_model_name_or_path = None, False, None
    # Others subtract what they begin with from the weights below, which are the policy's.
    lora.init_lora_weights, lora.bias = True, "none"
    try:
        return cast(PeftModel, get_peft_model(model, lora, adapter_name=LEARNS))
    except ValueError as error:
        raise ConfigError(
            f"process_reward={name!r} takes no LoRA adapter like the policy's: {error}"
        ) from error


def open_reference(trainer: Any, began_as: str, learner: Causal) -> Causal:
    """π_ref: on the learner's own model where it is that without an adapter or with another.

    Args:
        trainer: its option `process_reference` names it; None: what the learner began as.
        began_as: that.
        learner: π_φ.
    """
    path = place_of(trainer.args.process_reference or began_as)
    model = wrapped_model(learner)
    if isinstance(model, PeftModel):
        base = _place_below("process_reward", place_of(began_as))
        if path == base:
            return Adapter(model, None)
        if is_adapter(path) and _place_below("process_reference", path) == base:
            model.load_adapter(path, adapter_name=BEGAN_AS)
            return Adapter(model, BEGAN_AS)
    name = "process_reference"
    return load_causal({name: path}, dtype=_dtype(trainer), device=trainer.args.device)[name]


def _place_below(name: str, path: str) -> str:
    """Where the whole model is of which there is one, or an adapter, at a path."""
    return base_of(name, path) if is_adapter(path) else place_of(path)


def _dtype(trainer: Any) -> str:
    return str(trainer.causal_lm.dtype).removeprefix("torch.")
