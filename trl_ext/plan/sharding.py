"""How a run's state is divided over cards: what the Accelerate config of a recipe says."""

from dataclasses import dataclass
from typing import Any, Literal

from trl_ext.recipe import Recipe
from trl_ext.recipe.shipped import read_accelerate_config

Sharding = Literal["none", "ddp", "zero1", "zero2", "zero3"]
_STAGES: dict[int, Sharding] = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}


@dataclass(frozen=True)
class Division:
    """State over cards.

    Attributes:
        kind: what each card has a share of. "zero1" optimizer states, "zero2" gradients too,
            "zero3" and FSDP weights too; "ddp" nothing.
        cards: number of them.
        is_deepspeed: bfloat16 weights, with float32 copies of what is trained beside them.
        gathers: whether TRL puts whole weights together to generate, unless told not to.
    """

    kind: Sharding
    cards: int
    is_deepspeed: bool
    gathers: bool

    def over(self, *kinds: Sharding) -> int:
        """By how much something is divided that these kinds divide."""
        return self.cards if self.kind in kinds else 1


def division_of(recipe: Recipe, processes: int | None) -> Division:
    """How a recipe's run is divided.

    Args:
        recipe: from `read_recipe`.
        processes: number of cards; None: as the recipe or its Accelerate config says.
    """
    config = read_accelerate_config(recipe.launcher.get("accelerate_config"))
    asked = recipe.launcher.get("num_processes") or config.get("num_processes") or 1
    cards = processes or asked
    kind = str(config.get("distributed_type", "NO")).upper()
    if kind == "DEEPSPEED":
        stage = int((config.get("deepspeed_config") or {}).get("zero_stage", 2))
        return Division(_STAGES.get(stage, "ddp"), cards, True, stage == 3)
    if kind == "FSDP":
        return Division(_of_fsdp(config.get("fsdp_config") or {}), cards, False, False)
    return Division("none" if cards == 1 else "ddp", cards, False, False)


def _of_fsdp(options: dict[str, Any]) -> Sharding:
    divides = options.get("fsdp_sharding_strategy", "FULL_SHARD") in ("FULL_SHARD", 1)
    return "zero3" if divides and options.get("fsdp_reshard_after_forward", True) else "zero2"
