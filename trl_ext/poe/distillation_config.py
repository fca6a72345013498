"""Options of distilling a product of experts, and the inherited ones that it refuses."""

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from trl import DistillationConfig as TRLDistillationConfig

from trl_ext.options import OwnOptions
from trl_ext.poe.distillation_rules import EVEN, distillation_findings


@dataclass
class PoEDistillationConfig(OwnOptions, TRLDistillationConfig):
    """`trl.DistillationConfig` for a product of experts as the teacher.

    TRL's `beta` is an interpolation between divergences, and not a KL coefficient, which the name
    means everywhere else here: `divergence` and `jsd_weight` take its place, and it is set from
    them.

    Args:
        experts: name -> path, hub id or `bundled:` name of a model, a LoRA adapter or a counted
            expert. None if the trainer gets a `ProductOfExperts`.
        expert_weights: name -> weight in the product (Equation E14). Negative ones push away.
        expert_dtype: of the experts' weights.
        plausibility: keep only tokens with at least this times the probability of the likeliest,
            as the expert of the largest weight sees them.
        divergence: between student π and product π*, of the next token at each prefix that the
            student sampled. "reverse_kl": KL(π‖π*), what reinforcement learning with the reward
            `log_ratio` minimises, and sampling from the student; "forward_kl": KL(π*‖π); "jsd":
            λ KL(π*‖m) + (1 − λ) KL(π‖m), m = λπ* + (1 − λ)π.
        jsd_weight: λ of "jsd", 0.5 by default.
        temperature: TRL's: of sampling, and of both distributions in the divergence.
    """

    beta: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "Not used: divergence and jsd_weight set TRL's beta."}
    )
    experts: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Name -> path or hub id of a model, adapter or counted expert."},
    )
    expert_weights: dict[str, float] | None = field(
        default=None, metadata={"help": "Name -> weight of the expert in the product."}
    )
    expert_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "What the experts' weights are loaded as."}
    )
    plausibility: float | None = field(
        default=None,
        metadata={"help": "Keep tokens with at least this times the likeliest's probability."},
    )
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = field(
        default="reverse_kl",
        metadata={"help": "KL(student||product), KL(product||student), or Jensen-Shannon."},
    )
    jsd_weight: float | None = field(
        default=None, metadata={"help": "Weight of the product in jsd's mixture; 0.5 by default."}
    )

    # Inherited options without a meaning here: name -> reason. A literal, so that it can be read
    # without import.
    refused: ClassVar[dict[str, str]] = {
        "beta": "it is a KL coefficient in every config here; divergence and jsd_weight say which "
        "divergence is meant",
        "teacher_model_init_kwargs": "the teacher is the product of the experts",
        "teacher_model_name_or_path": "the teacher is the product of the experts",
        "teacher_model_revision": "the teacher is the product of the experts",
    }

    def __post_init__(self):
        self.check()
        self.beta = self._trls_beta
        super().__post_init__()

    def findings(self) -> list[str]:
        """What is wrong with these options, a line each."""
        # dataclasses.replace hands back the beta that was set from the divergence.
        found = self.refused_findings(self._trls_beta)
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        return found + [f"  {name}: {problem}" for name, problem in distillation_findings(options)]

    @property
    def _trls_beta(self) -> float | None:
        """TRL's interpolation: 0 is the forward KL, 1 the reverse, in between λ of the JSD."""
        even = EVEN if self.jsd_weight is None else self.jsd_weight
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": even}.get(self.divergence)
