"""The critic: a value for each prefix, from hidden states of the policy or of its own."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from trl_ext.errors import ConfigError, RunError, TrlExtError
from trl_ext.models.twin import without_adapters

Kind = Literal["head", "adapter", "model"]
MAKES = get_args(Kind)
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        policy: nn.Module | None = None,
    ) -> Tensor:
        """The value of every prefix of each row.

        Args:
            input_ids: (B, S) tokens.
            attention_mask: (B, S), 1 = token; None: all.
            policy: for "head", the model whose hidden states it reads, as it was trained.

        Returns:
            (B, S) in reward units: [:, s] of the prefix that ends with token s.

        Raises:
            ConfigError: a head without its policy.
        """
        backbone: Any = self.backbone
        if backbone is None and policy is None:
            raise ConfigError(
                "A critic of kind 'head' reads the hidden states of the policy that it was trained "
                "with: give that as `policy`."
            )
        if backbone is None:
            inner: Any = policy.get_base_model() if isinstance(policy, PeftModel) else policy
            backbone = inner.base_model
        output = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self.of_hidden(output.last_hidden_state)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        """Write the head, and what else is its own: an adapter or a backbone.

        Under another name first: whatever was there is replaced as a whole, or stays.
        """
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        about = {
            "kind": self.kind,
            "hidden_size": self.head.in_features,
            "has_adapter": isinstance(self.backbone, PeftModel),
            "base": str(Path(self.base).resolve()) if Path(self.base).is_dir() else self.base,
        }
        head = {name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}
        save_file(head, new / HEAD)
        if isinstance(self.backbone, PeftModel):
            self.backbone.save_pretrained(str(new / ADAPTER))
        elif isinstance(self.backbone, PreTrainedModel):
            self.backbone.save_pretrained(new / BACKBONE)
        (new / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, into a critic of the same make.

        Raises:
            RunError: if the folder holds no critic, one of another make, or a damaged one.
        """
        about = read_about(folder)
        own = {
            "kind": self.kind,
            "hidden_size": self.head.in_features,
            "has_adapter": isinstance(self.backbone, PeftModel),
        }
        if {key: about[key] for key in own} != own:
            raise RunError(
                f"{folder} holds a critic of {_make(about)}; this one is of {_make(own)}. The "
                "option `critic` says which kind a run has, and use_peft whether with an adapter."
            )
        with reading(folder):
            self.head.load_state_dict(head_in(folder))
            if isinstance(self.backbone, PeftModel):
                set_adapter_weights(self.backbone, load_peft_weights(str(folder / ADAPTER)))
            elif isinstance(self.backbone, PreTrainedModel):
                saved = AutoModel.from_pretrained(folder / BACKBONE, dtype=self.backbone.dtype)
                self.backbone.load_state_dict(saved.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path, policy: nn.Module | None = None) -> "Critic":
        """The critic that a run left in `output_dir/critic`, in evaluation mode.

            critic = Critic.from_pretrained("outputs/ppo/critic", policy)
            values = critic(**tokenizer("What is rain?", return_tensors="pt"), policy=policy)

        Args:
            folder: that folder.
            policy: for "adapter", a loaded model with the policy's frozen weights, on which it
                stands; for "head" and "model" not needed here.

        Raises:
            RunError: if the folder holds no critic, or a damaged one.
            ConfigError: if it needs a policy.
        """
        folder = Path(folder)
        about = read_about(folder)
        backbone: nn.Module | None = None
        if about["kind"] == "adapter" and not isinstance(policy, nn.Module):
            raise ConfigError(
                f"{folder} is an adapter on the weights of {about['base']!r}: give that model, "
                "loaded, as `policy`."
            )
        with reading(folder):
            if about["has_adapter"]:
                below = (
                    backbone_of(policy)
                    if about["kind"] == "adapter" and policy is not None
                    else opened(about["base"])[0]
                )
                backbone = get_peft_model(below, lora_in(folder / ADAPTER))
            elif about["kind"] == "model":
                backbone = AutoModel.from_pretrained(folder / BACKBONE)
        critic = cls(about["kind"], about["hidden_size"], backbone, about["base"])
        critic.load(folder)
        return critic.eval()


def backbone_of(policy: nn.Module, *, share: bool = True) -> PreTrainedModel:
    """The backbone of a model once more, as it was below its adapters.

    Args:
        policy: a causal LM, or a PeftModel of one.
        share: frozen weights are those of the policy and not copies. What it trains is copied.
    """
    return cast(PreTrainedModel, without_adapters(policy, share=share).base_model)


def _make(about: dict[str, Any]) -> str:
    adapter = ", with an adapter" if about["has_adapter"] else ""
    return f"kind {about['kind']!r} for {about['hidden_size']} hidden units{adapter}"


def read_about(folder: Path) -> dict[str, Any]:
    """What `critic.json` says.

    Raises:
        RunError: if there is none that can be read.
    """
    try:
        about = json.loads((folder / ABOUT).read_text())
    except OSError as error:
        raise RunError(f"{folder} holds no critic: there is no {ABOUT}.") from error
    except ValueError as error:
        raise RunError(f"{folder / ABOUT} is damaged: {error}.") from error
    wanted = {"kind", "hidden_size", "has_adapter", "base"}
    if not isinstance(about, dict) or not wanted <= about.keys() or about["kind"] not in MAKES:
        raise RunError(f"{folder / ABOUT} is damaged: it must give {', '.join(sorted(wanted))}.")
    return about


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Errors of what reads a critic's files as one that names them."""
    try:
        yield
    except TrlExtError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"The critic in {folder} cannot be read: {str(error).strip().splitlines()[0]} Is a "
            "file missing or damaged?"
        ) from error


def head_in(folder: Path) -> dict[str, Tensor]:
    """The weights of a critic's head.

    Raises:
        RunError: if one is not finite.
    """
    head = load_file(folder / HEAD)
    if not all(tensor.isfinite().all() for tensor in head.values()):
        raise RunError(f"The critic in {folder} has a head that is not finite: its run diverged.")
    return head


def set_adapter_weights(backbone: PeftModel, weights: dict[str, Tensor]) -> None:
    """Take over an adapter, all of it.

    Raises:
        RuntimeError: if a weight is missing or of another shape.
    """
    result = set_peft_model_state_dict(backbone, weights)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing:
        raise RuntimeError(f"{len(missing)} weights of the adapter are missing ({missing[0]}).")


def lora_in(folder: Path) -> LoraConfig:
    """The adapter of a folder as one of a backbone.

    Raises:
        ConfigError: if it is not LoRA.
    """
    lora = PeftConfig.from_pretrained(str(folder))
    if not isinstance(lora, LoraConfig):
        raise ConfigError(
            f"{folder} holds an adapter of type {lora.peft_type}; a critic takes LoRA."
        )
    return of_a_backbone(lora)


def of_a_backbone(lora: LoraConfig) -> LoraConfig:
    """A LoRA configuration, made anew and without what belongs to a head."""
    lora.task_type, lora.modules_to_save, lora.inference_mode = None, None, False
    lora.base_model_name_or_path = None
    # Others subtract what they begin with from the weights below, which are the policy's.
    lora.init_lora_weights = True
    # Biases below are the policy's too.
    lora.bias = "none"
    return lora


def opened(path: str, **loading: Any) -> tuple[PreTrainedModel, dict[str, Tensor] | None]:
    """The backbone of any model, and the head if it is a sequence classifier.

    Raises:
        ConfigError: if there is no such model, or it has several labels.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        [architecture, *_] = config.architectures or [""]
        if architecture.endswith("ForSequenceClassification"):
            if config.num_labels != 1:
                raise ConfigError(
                    f"critic_model_name_or_path: {path!r} is a classifier with "
                    f"{config.num_labels} labels; a reward model has one."
                )
            model = AutoModelForSequenceClassification.from_pretrained(path, **loading)
            return model.base_model, head_of(model.state_dict())
        # A causal model read without its head would be reported as half read.
        reader = AutoModelForCausalLM if architecture.endswith("ForCausalLM") else AutoModel
        return cast(PreTrainedModel, reader.from_pretrained(path, **loading).base_model), None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"critic_model_name_or_path: {path!r} cannot be opened. A critic begins as a folder "
            "with a config.json, a critic's folder, or a hub id that can be reached: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def head_of(weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Weight, and bias if there is one, of the head of a sequence classifier: `score`."""
    found = {
        name.rpartition(".")[2]: tensor
        for name, tensor in weights.items()
        if ".score." in f".{name}" and "lora_" not in name
    }
    return found if "weight" in found else None
