"""What a critic begins as: a head that says 0, a reward model, or an earlier critic."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_ext.errors import ConfigError
from trl_ext.ppo.critic import (
    ABOUT,
    ADAPTER,
    BACKBONE,
    HEAD,
    Critic,
    Kind,
    head_of,
    lora_in,
    of_a_backbone,
    opened,
    read_about,
    shared_backbone,
)


def make_critic(
    kind: Kind,
    policy: PreTrainedModel | PeftModel,
    begins_as: str | None = None,
    **loading: Any,
) -> Critic:
    """The critic of a policy, before training.

    Args:
        kind: see `PPOConfig.critic`.
        policy: the model that is trained, its adapter applied.
        begins_as: see `PPOConfig.critic_model_name_or_path`.
        loading: how a model of its own is loaded (`from_pretrained`), such as its dtype.

    Raises:
        ConfigError: if the two do not go together, or there is no such model.
        RunError: if an earlier critic cannot be read.
    """
    own_base = str(getattr(policy.config, "_name_or_path", ""))
    start = _start(begins_as, own_base, kind)
    hidden_size = policy.config.get_text_config().hidden_size
    if kind == "model":
        backbone, found = opened(start.weights, **loading)
        critic = Critic(
            kind,
            backbone.config.get_text_config().hidden_size,
            _adapted(backbone, start, _lora_of(policy)),
            start.weights,
        )
        head = start.head or found
    elif kind == "adapter":
        lora = _lora_of(policy)
        if lora is None:
            raise ConfigError(
                "critic='adapter' shares the policy's frozen weights, and here they are trained. "
                "Use critic='head' or 'model', or train an adapter (use_peft: true, peft_config)."
            )
        critic = Critic(kind, hidden_size, _adapted(shared_backbone(policy), start, lora), own_base)
        head = start.head
    else:
        critic, head = Critic(kind, hidden_size, base=own_base), start.head
    if head is None and begins_as is not None and kind != "model":
        head = opened(begins_as)[1]
        if head is None:
            raise ConfigError(
                f"critic_model_name_or_path: {begins_as!r} is neither a reward model nor a critic, "
                f"and critic={kind!r} takes only a head from it. Use critic='model', or give the "
                "folder `critic` of an earlier run."
            )
    if head is not None:
        _fill(critic, head, begins_as)
    return critic


@dataclass(frozen=True)
class _Start:
    """Where the weights of a model of its own are, and what is on top of them."""

    weights: str
    lora: LoraConfig | None = None
    lora_weights: dict[str, Tensor] | None = None
    head: dict[str, Tensor] | None = None


def _start(path: str | None, own_base: str, kind: Kind) -> _Start:
    if path is None:
        return _Start(own_base)
    folder = Path(path).expanduser()
    if (folder / ABOUT).is_file():
        return _earlier(folder, kind)
    if (folder / "adapter_config.json").is_file():
        weights = load_peft_weights(str(folder))
        # Of a causal model or a classifier; a critic's sits on the backbone alone.
        inner = {
            name.replace("base_model.model.model.", "base_model.model.", 1): tensor
            for name, tensor in weights.items()
            if "lora_" in name
        }
        base = LoraConfig.from_pretrained(str(folder)).base_model_name_or_path or own_base
        return _Start(base, lora_in(folder), inner, head_of(weights))
    return _Start(path)


def _earlier(folder: Path, kind: Kind) -> _Start:
    about = read_about(folder)
    if about["kind"] != kind:
        raise ConfigError(
            f"critic_model_name_or_path: {str(folder)!r} holds a critic of kind "
            f"{about['kind']!r}, and this run has critic={kind!r}. Set critic: {about['kind']}."
        )
    has_adapter = (folder / ADAPTER).is_dir()
    return _Start(
        weights=str(folder / BACKBONE) if (folder / BACKBONE).is_dir() else about["base"],
        lora=lora_in(folder / ADAPTER) if has_adapter else None,
        lora_weights=load_peft_weights(str(folder / ADAPTER)) if has_adapter else None,
        head=load_file(folder / HEAD),
    )


def _adapted(backbone: PreTrainedModel, start: _Start, lora: LoraConfig | None) -> nn.Module:
    """The backbone with the adapter that it begins with; merged where none is to be trained."""
    begins = start.lora or lora
    if begins is None:
        return backbone
    adapted = get_peft_model(backbone, begins)
    if start.lora_weights is not None:
        set_peft_model_state_dict(adapted, start.lora_weights)
    if lora is not None:
        return adapted
    # peft froze what is below its adapter; here all of it is to learn.
    return adapted.merge_and_unload().requires_grad_(True)  # pyright: ignore


def _fill(critic: Critic, head: dict[str, Tensor], path: str | None) -> None:
    if head["weight"].shape != critic.head.weight.shape:
        raise ConfigError(
            f"critic_model_name_or_path: {path!r} has a head of shape "
            f"{tuple(head['weight'].shape)}; the critic's is {tuple(critic.head.weight.shape)}."
        )
    critic.head.load_state_dict(
        {"bias": torch.zeros(1)} | {name: tensor.float() for name, tensor in head.items()}
    )


def _lora_of(policy: nn.Module) -> LoraConfig | None:
    """The policy's adapter as one of a backbone, on layers of the same names; None without one."""
    if not isinstance(policy, PeftModel):
        return None
    lora = policy.peft_config[policy.active_adapters[0]]
    if not isinstance(lora, LoraConfig):
        raise ConfigError(
            f"The policy's adapter is a {type(lora).__name__}; a critic of its own takes LoRA. Use "
            "critic='head'."
        )
    lora = of_a_backbone(copy.deepcopy(lora))
    # As peft resolved them they may be paths from the LM head down.
    backbone: Any = policy.get_base_model().base_model
    lora.target_modules = sorted(
        {
            name.rpartition(".")[2]
            for name, layer in backbone.named_modules()
            if isinstance(layer, LoraLayer)
        }
    )
    lora.exclude_modules = None
    return lora
