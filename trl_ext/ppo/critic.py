"""The critic: a value for each prefix, from hidden states of the policy or of its own."""

import copy
import json
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from trl_ext.errors import ConfigError, RunError

Kind = Literal["head", "adapter", "model"]
# What a critic's folder holds.
ABOUT, HEAD, ADAPTER, BACKBONE = "critic.json", "head.safetensors", "adapter", "backbone"


class Critic(nn.Module):
    """V(y_≤t) = w·h_t + b, h_t the last hidden state after the prefix y_≤t. Equation E39.

    Source: Schulman et al. (2017), the value function of PPO. The head is float32 and begins as 0.

    Args:
        kind: "head" reads hidden states that it is given (`of_hidden`), "adapter" and "model" have
            a backbone (`forward`).
        hidden_size: H.
        backbone: gives `last_hidden_state`; None for "head".
        base: the name or path of the weights below, for `critic.json`.
    """

    def __init__(
        self, kind: Kind, hidden_size: int, backbone: nn.Module | None = None, base: str = ""
    ):
        super().__init__()
        self.kind = kind
        self.base = base
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """(…, H) -> (…) values in reward units, float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype)).squeeze(-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S) tokens -> (B, S) values: [:, s] is that of the prefix that ends with token s."""
        assert self.backbone is not None, "a critic that is a head takes hidden states: of_hidden"
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self.of_hidden(output.last_hidden_state)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        """Write the head, and what else is its own: an adapter or a backbone."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {"kind": self.kind, "hidden_size": self.head.in_features, "base": self.base}
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        head = {name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(head, folder / HEAD)
        if isinstance(self.backbone, PeftModel):
            self.backbone.save_pretrained(str(folder / ADAPTER))
        elif isinstance(self.backbone, PreTrainedModel):
            self.backbone.save_pretrained(folder / BACKBONE)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, into a critic of the same make.

        Raises:
            RunError: if the folder holds no critic, or one of another make.
        """
        about = read_about(folder)
        own = {"kind": self.kind, "hidden_size": self.head.in_features}
        if {key: about[key] for key in own} != own:
            raise RunError(
                f"{folder} holds a critic of kind {about['kind']!r} for {about['hidden_size']} "
                f"hidden units; this one is of kind {self.kind!r} for {self.head.in_features}."
            )
        self.head.load_state_dict(load_file(folder / HEAD))
        if isinstance(self.backbone, PeftModel):
            set_peft_model_state_dict(self.backbone, load_peft_weights(str(folder / ADAPTER)))
        elif isinstance(self.backbone, PreTrainedModel):
            saved = AutoModel.from_pretrained(folder / BACKBONE, dtype=self.backbone.dtype)
            self.backbone.load_state_dict(saved.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path, policy: nn.Module | None = None) -> "Critic":
        """The critic that a run left in `output_dir/critic`, to be used again.

        Args:
            folder: that folder.
            policy: for "adapter", a model with the policy's frozen weights, which it shares; for
                "head", not needed: its hidden states are what `of_hidden` takes.

        Raises:
            RunError: if the folder holds no critic.
            ConfigError: if it needs a policy.
        """
        folder = Path(folder)
        about = read_about(folder)
        backbone: nn.Module | None = None
        if (folder / BACKBONE).is_dir():
            backbone = AutoModel.from_pretrained(folder / BACKBONE)
        elif (folder / ADAPTER).is_dir():
            if policy is None and about["kind"] == "adapter":
                raise ConfigError(
                    f"{folder} is an adapter of {about['base']!r}: give that model as `policy`."
                )
            lora = LoraConfig.from_pretrained(str(folder / ADAPTER))
            below = _opened(about["base"])[0] if policy is None else shared_backbone(policy)
            backbone = get_peft_model(below, lora)  # pyright: ignore[reportArgumentType]
        critic = cls(about["kind"], about["hidden_size"], backbone, about["base"])
        critic.load(folder)
        return critic


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
    """
    lora = _lora_of(policy)
    base = getattr(policy.config, "_name_or_path", "")
    hidden_size = policy.config.get_text_config().hidden_size
    start = _Start(begins_as)
    if kind == "head":
        critic = Critic("head", hidden_size, base=base)
    elif kind == "adapter":
        if lora is None:
            raise ConfigError(
                "critic='adapter' shares the policy's frozen weights, and here they are trained. "
                "Use critic='head' or 'model', or train an adapter (use_peft: true, peft_config)."
            )
        backbone = get_peft_model(shared_backbone(policy), start.lora or lora)  # pyright: ignore
        critic = Critic("adapter", hidden_size, backbone, base)
    else:
        backbone = start.backbone(base, **loading)
        hidden_size = backbone.config.get_text_config().hidden_size
        if lora is not None:
            backbone = get_peft_model(backbone, start.lora or lora)  # pyright: ignore
        critic = Critic("model", hidden_size, backbone, begins_as or base)
    start.fill(critic)
    return critic


def shared_backbone(policy: nn.Module) -> PreTrainedModel:
    """The backbone of a model once more, its weights shared and its adapters left out."""
    tensors = chain(policy.parameters(), policy.buffers())
    twin = copy.deepcopy(policy, {id(tensor): tensor for tensor in tensors})
    if isinstance(twin, PeftModel):
        twin = twin.unload()
    return twin.base_model  # pyright: ignore[reportReturnType]


def read_about(folder: Path) -> dict[str, Any]:
    """What `critic.json` says.

    Raises:
        RunError: if there is none.
    """
    if not (folder / ABOUT).is_file():
        raise RunError(f"{folder} holds no critic: there is no {ABOUT}.")
    return json.loads((folder / ABOUT).read_text())


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
    lora = _of_a_backbone(copy.deepcopy(lora))
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


def _of_a_backbone(lora: LoraConfig) -> LoraConfig:
    lora.task_type, lora.modules_to_save, lora.inference_mode = None, None, False
    return lora


class _Start:
    """What a critic begins as: nothing, an earlier critic, a reward model or its adapter."""

    def __init__(self, path: str | None):
        self.path = path
        self.is_critic = path is not None and (Path(path) / ABOUT).is_file()
        self.is_adapter = path is not None and (Path(path) / "adapter_config.json").is_file()
        self._head: dict[str, Tensor] | None = None

    @property
    def lora(self) -> LoraConfig | None:
        if self.path is None or not (self.is_adapter or self.is_critic):
            return None
        folder = Path(self.path) / ADAPTER if self.is_critic else Path(self.path)
        if not (folder / "adapter_config.json").is_file():
            return None
        return _of_a_backbone(cast(LoraConfig, LoraConfig.from_pretrained(str(folder))))

    def backbone(self, base: str, **loading: Any) -> PreTrainedModel:
        """The backbone of a model of its own."""
        path = base if self.path is None else self.path
        if self.is_critic and self.path:
            below = Path(self.path) / BACKBONE
            path = str(below) if below.is_dir() else read_about(Path(self.path))["base"]
        elif self.is_adapter and self.path:
            path = LoraConfig.from_pretrained(self.path).base_model_name_or_path or base
        backbone, self._head = _opened(path, **loading)
        return backbone

    def fill(self, critic: Critic) -> None:
        """Give the critic the head and the adapter that it begins with."""
        if self.path is None:
            return
        if self.is_critic:
            critic.load(Path(self.path))
            return
        if self.is_adapter:
            weights = load_peft_weights(self.path)
            self._head = _head_of(weights)
            if isinstance(critic.backbone, PeftModel):
                # Of a causal model or a classifier; here it sits on the backbone alone.
                inner = {
                    name.replace("base_model.model.model.", "base_model.model.", 1): tensor
                    for name, tensor in weights.items()
                    if "lora_" in name
                }
                set_peft_model_state_dict(critic.backbone, inner)
        elif self._head is None and critic.kind != "model":
            self._head = _opened(self.path)[1]
        if self._head is None:
            if critic.kind == "model":
                return
            raise ConfigError(
                f"critic_model_name_or_path: {self.path!r} is neither a reward model nor a critic, "
                f"and critic={critic.kind!r} takes only a head from it. Use critic='model'."
            )
        if self._head["weight"].shape != critic.head.weight.shape:
            raise ConfigError(
                f"critic_model_name_or_path: {self.path!r} has a head of shape "
                f"{tuple(self._head['weight'].shape)}; the critic's is "
                f"{tuple(critic.head.weight.shape)}."
            )
        critic.head.load_state_dict(
            {"weight": self._head["weight"].float(), "bias": torch.zeros(1)}
            | {name: tensor.float() for name, tensor in self._head.items()}
        )


def _opened(path: str, **loading: Any) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
    """The backbone of any model, and the head if it is a sequence classifier.

    Raises:
        ConfigError: if there is no such model.
    """
    try:
        [architecture, *_] = AutoConfig.from_pretrained(path).architectures or [""]
        if architecture.endswith("ForSequenceClassification"):
            model = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, **loading
            )
            return model.base_model, _head_of(model.state_dict())
        # A causal model read without its head would be reported as half read.
        reader = AutoModelForCausalLM if architecture.endswith("ForCausalLM") else AutoModel
        return cast(PreTrainedModel, reader.from_pretrained(path, **loading).base_model), None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"critic_model_name_or_path: {path!r} cannot be opened: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def _head_of(weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Weight, and bias if there is one, of the head of a sequence classifier: `score`."""
    found = {
        name.rpartition(".")[2]: tensor
        for name, tensor in weights.items()
        if ".score." in f".{name}" and "lora_" not in name
    }
    return found if "weight" in found else None
