"""What a critic begins as: a head that says 0, a reward model, or an earlier critic."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_ext.errors import ConfigError
from trl_ext.ppo.critic import (
    ABOUT,
    ADAPTER,
    BACKBONE,
    Critic,
    Kind,
    backbone_of,
    head_in,
    head_of,
    lora_in,
    of_a_backbone,
    opened,
    read_about,
    reading,
    set_adapter_weights,
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
        backbone, found = (
            (backbone_of(policy, share=False), None)
            if begins_as is None
            else opened(start.weights, **loading)
        )
        if not isinstance(policy, PeftModel):
            backbone.requires_grad_(True)
        _check_fits(backbone, policy, begins_as)
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
        critic = Critic(kind, hidden_size, _adapted(backbone_of(policy), start, lora), own_base)
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
    with reading(folder):
        head = head_in(folder)
        lora = lora_in(folder / ADAPTER) if about["has_adapter"] else None
        lora_weights = load_peft_weights(str(folder / ADAPTER)) if about["has_adapter"] else None
    has_backbone = kind == "model" and not about["has_adapter"]
    return _Start(
        weights=str(folder / BACKBONE) if has_backbone else about["base"],
        lora=lora,
        lora_weights=lora_weights,
        head=head,
    )


def _adapted(backbone: PreTrainedModel, start: _Start, lora: LoraConfig | None) -> nn.Module:
    """The backbone with the adapter that it begins with; merged where none is to be trained."""
    begins = start.lora or (_named_anywhere(lora, backbone) if lora else None)
    if begins is None:
        return backbone
    adapted = get_peft_model(backbone, begins)
    if start.lora_weights is not None:
        try:
            set_adapter_weights(adapted, start.lora_weights)
        except RuntimeError as error:
            raise ConfigError(
                "critic_model_name_or_path: its adapter does not fit the weights below: "
                f"{str(error).strip().splitlines()[-1].strip()}"
            ) from error
    if lora is not None:
        return adapted
    # peft froze what is below its adapter; here all of it is to learn.
    return adapted.merge_and_unload().requires_grad_(True)  # pyright: ignore


def _named_anywhere(lora: LoraConfig, backbone: nn.Module) -> LoraConfig:
    """As it is, or of another architecture: on layers of the same names, wherever they are."""
    targets = set(lora.target_modules or ())
    if not targets <= dict(backbone.named_modules()).keys():
        lora.target_modules = sorted({name.rpartition(".")[2] for name in targets})
    return lora


def _check_fits(backbone: PreTrainedModel, policy: nn.Module, path: str | None) -> None:
    """Whether a model of its own can read what the policy writes, and value prefixes.

    Raises:
        ConfigError: if it lacks tokens of the policy, or looks ahead.
    """
    known, needed = (
        cast(Any, model).get_input_embeddings().num_embeddings for model in (backbone, policy)
    )
    if known < needed:
        raise ConfigError(
            f"critic_model_name_or_path: {path!r} knows {known} tokens and the policy writes "
            f"{needed}: a critic must have the policy's tokenizer."
        )
    ids = torch.tensor([[1, 1, 0], [1, 1, 1]], device=backbone.device)
    with torch.no_grad():
        first, second = backbone.eval()(ids).last_hidden_state[:, 1].float()
    backbone.train()
    if not torch.allclose(first, second, rtol=0, atol=1e-4 * first.abs().max().item()):
        raise ConfigError(
            f"critic_model_name_or_path: {path!r} looks ahead: what follows a prefix changes its "
            "value. A critic must be a causal model."
        )


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
    # As peft resolved them they may be paths from the LM head down, or patterns of those.
    backbone: Any = policy.get_base_model().base_model
    lora.target_modules = sorted(
        name for name, layer in backbone.named_modules() if isinstance(layer, LoraLayer)
    )
    lora.exclude_modules, lora.layers_to_transform, lora.layers_pattern = None, None, None
    return lora
