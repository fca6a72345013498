"""The memory of each phase of a run, added up item by item."""

import json
from dataclasses import dataclass, replace
from functools import cache

from trl_ext.plan.beside import EXPERTS, Beside
from trl_ext.plan.cards import WITHOUT_BF16, Card
from trl_ext.plan.moments import generating, scoring, training
from trl_ext.plan.opening import open_config
from trl_ext.plan.places import shapes_at
from trl_ext.plan.run import Run, lora_of, run_of, settings_of, shaping
from trl_ext.plan.scorers import scorers_of
from trl_ext.plan.shapes import CHECKED_TYPES, Shapes, shapes_of
from trl_ext.plan.standing import Items, loading, standing
from trl_ext.recipe import Recipe

PHASES = ("load", "generate", "score", "train", "save")
# All items, in the order in which a table has them.
ITEMS = (
    "weights",
    "adapters",
    "reference",
    "critic",
    "reward models",
    "process reward",
    "experts",
    "master copies",
    "optimizer states",
    "DDP buckets",
    "gradients",
    "optimizer step",
    "gathered weights",
    "half-precision copies",
    "activations",
    "layer at work",
    "LM head",
    "KV cache",
    "sampling",
    "vLLM",
)


@dataclass(frozen=True)
class Plan:
    """What a run needs on each card.

    Attributes:
        run: what was planned.
        shapes: the model.
        phases: phase -> item -> bytes, at the phase's worst moment; phases that a run has.
        notes: what is left out or assumed, in words.
    """

    run: Run
    shapes: Shapes
    phases: dict[str, Items]
    notes: tuple[str, ...]

    def peak(self, phase: str) -> int:
        """Bytes of a phase: the sum of its items."""
        return sum(self.phases[phase].values())

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.peak)

    def fits(self, card: Card) -> bool:
        """Whether every phase fits into what the card leaves."""
        return self.peak(self.worst) <= card.usable


def plan_recipe(
    recipe: Recipe,
    card: Card | None = None,
    *,
    prompt_length: int = 256,
    processes: int | None = None,
) -> Plan:
    """The memory that a recipe's run takes, from its model's config alone.

    Args:
        recipe: from `read_recipe`.
        card: vLLM takes a share of it; None: of no size, which is noted.
        prompt_length: tokens of the longest prompt.
        processes: number of cards; None: as the recipe says.

    Raises:
        ConfigError: if the model's config cannot be had, or the recipe cannot be trained.
    """
    shapes = _shapes(recipe)
    run = _with_critic(run_of(recipe, shapes.dtype, prompt_length, processes), recipe)
    beside, missed = scorers_of(settings_of(recipe), recipe.groups["model"], run)
    run = replace(run, not_counted=(*run.not_counted, *missed))
    stays = standing(shapes, run) | _weights_of(beside)
    vllm = int(run.vllm * card.total) if card else 0
    early = _weights_of([each for each in beside if each.loads])
    phases: dict[str, Items] = {"load": loading(shapes, run, stays, vllm) | early}
    if run.rollout_rows:
        phases["generate"] = generating(shapes, run, stays, vllm)
    scorers = [each for each in beside if each.item != EXPERTS]
    if run.scores or scorers or run.eval_rows:
        phases["score"] = stays | scoring(shapes, run, beside) | _awake(run, vllm)
    experts = [each for each in beside if each.item == EXPERTS]
    phases["train"] = training(shapes, run, stays, experts) | _awake(run, vllm)
    phases["save"] = stays | _awake(run, vllm)
    shown = {
        phase: {item: items[item] for item in ITEMS if items.get(item)}
        for phase, items in phases.items()
    }
    return Plan(run, shapes, shown, tuple(_notes(shapes, run, card)))


def _shapes(recipe: Recipe) -> Shapes:
    return _counted(json.dumps(shaping(recipe.groups["model"]), sort_keys=True))


@cache
def _counted(model_fields: str) -> Shapes:
    """One model is counted once, however many changes to its recipe are tried."""
    fields = json.loads(model_fields)
    config = open_config(fields["model_name_or_path"], fields.get("model_revision"))
    return shapes_of(config, lora_of(fields))


def _with_critic(run: Run, recipe: Recipe) -> Run:
    """The run with the shapes of a critic that begins as a model of its own."""
    path = settings_of(recipe).get("critic_model_name_or_path")
    if run.critic != "model" or not path:
        return run
    shapes = shapes_at(path, recipe.groups["model"])
    if shapes is not None:
        return replace(run, critic_shapes=shapes)
    note = f"what the critic {path}, whose config is not to be had here, has more than the policy"
    return replace(run, not_counted=(*run.not_counted, note))


def _weights_of(beside: list[Beside]) -> Items:
    total: Items = {}
    for each in beside:
        total[each.item] = total.get(each.item, 0) + each.standing
    return total


def _awake(run: Run, vllm: int) -> Items:
    return {"vLLM": 0 if run.vllm_sleeps else vllm}


def _notes(shapes: Shapes, run: Run, card: Card | None) -> list[str]:
    notes = [f"Not counted: {each}." for each in run.not_counted]
    if run.eval_rows > max(run.rollout_rows, run.rows):
        notes.append(f"Evaluation takes {run.eval_rows} rows at once (per_device_eval_batch_size).")
    if run.trainer == "reward":
        notes.append("Rows are counted as pairs; rankings of K completions take K/2 times as much.")
    if run.vllm and card is None:
        notes.append("Not counted: vLLM's share, which is a share of the card (--gpu, --vram).")
    if shapes.model_type not in CHECKED_TYPES:
        notes.append(f"Activations of {shapes.model_type} are counted as those of a Llama layer.")
    if card is not None and card.name.startswith(WITHOUT_BF16) and run.is_bf16:
        notes.append(f"{card.name} has no bfloat16: set bf16=false fp16=true dtype=float16.")
    if run.optimizer.startswith("paged_"):
        notes.append("Paged optimizer states go to the host's memory when the card is full.")
    return notes
