"""The smallest changes to a recipe after which it fits a card."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trl_ext.errors import ConfigError
from trl_ext.plan.cards import Card
from trl_ext.plan.estimate import plan_recipe
from trl_ext.plan.run import eval_rows, settings_of
from trl_ext.recipe import Recipe, read_recipe

Change = dict[str, Any]
# What a recipe says now -> changes of one kind, from mild to strong.
Ladder = Callable[[dict[str, Any]], Iterator[Change]]
# Below this a completion is hardly one; halving stops here.
_SHORTEST = 64
_CARDS = (2, 4, 8)
# What they hold beside the model, a critic or experts, is not sharded.
_WHOLE = ("ppo", "poe_distillation")


def suggest(
    recipe: Recipe,
    overrides: Sequence[str],
    card: Card,
    *,
    prompt_length: int = 256,
    processes: int | None = None,
) -> list[str] | None:
    """Changes as `key=value`, after which the recipe fits the card by this plan's own account.

    One change if one will do; else changes are added, harmless ones first, until it fits, and then
    those that are not needed are taken away again, or made milder. The steps of the optimizer keep
    their size: a smaller micro-batch comes with more of them.

    Returns:
        The changes, or None if none of those known is enough.
    """

    def changed(changes: Sequence[Change]) -> Recipe | None:
        """None where the recipe does not take them: a group that no longer divides the batch."""
        try:
            return read_recipe(recipe.path, [*overrides, *_as_text(changes)])
        except ConfigError:
            return None

    def fits(changes: Sequence[Change]) -> bool:
        new = changed(changes)
        if new is None:
            return False
        plan = plan_recipe(new, card, prompt_length=prompt_length, processes=processes)
        return plan.fits(card)

    ladders = _ladders(recipe, processes)
    known = settings_of(recipe)
    for change in (change for ladder in ladders for change in ladder(known)):
        if fits([change]):
            return _as_text([change])
    return _several(ladders, changed, fits)


def _as_text(changes: Sequence[Change]) -> list[str]:
    """Each key once, as the last change to it says."""
    merged = {key: value for change in changes for key, value in change.items()}
    return [f"{key}={value}" for key, value in merged.items()]


def _several(
    ladders: list[Ladder],
    changed: Callable[[Sequence[Change]], Recipe | None],
    fits: Callable[[Sequence[Change]], bool],
) -> list[str] | None:
    """The strongest change of each kind on top of the others, until they fit."""
    chosen: list[Change] = []
    milder: list[list[Change]] = []
    for ladder in ladders:
        now = changed(chosen)
        assert now is not None
        taken = [c for c in ladder(settings_of(now)) if changed([*chosen, c]) is not None]
        if not taken:
            continue
        chosen, milder = [*chosen, taken[-1]], [*milder, taken[:-1]]
        if fits(chosen):
            return _as_text(_mildest(chosen, milder, fits))
    return None


def _mildest(
    chosen: list[Change], milder: list[list[Change]], fits: Callable[[Sequence[Change]], bool]
) -> list[Change]:
    """Each change left out, or the mildest of its kind, as far as the others let it.

    The harmful ones first, so that the harmless ones are those that stay.
    """
    for place in reversed(range(len(chosen))):
        for change in ({}, *milder[place]):
            instead = [*chosen[:place], change, *chosen[place + 1 :]]
            if fits(instead):
                chosen = instead
                break
    return chosen


def _ladders(recipe: Recipe, processes: int | None) -> list[Ladder]:
    """Kinds of change, the harmless ones first."""
    found = [
        _attention,
        _checkpointing,
        _smaller_batches,
        _smaller_rollouts,
        _smaller_evaluations,
        _vllm,
        _lighter_optimizer,
        _lighter_experts,
        _lighter_weights,
        _shorter,
    ]
    if processes == 1 or not may_shard(recipe):
        return found
    return [*found, lambda known: _sharded(processes)]


def may_shard(recipe: Recipe) -> bool:
    """Whether a recipe that is not spread over cards may be by ZeRO, with all that it trains."""
    learns_beside = recipe.values.get("process_learning_rate") or recipe.values.get("order_effect")
    is_whole = recipe.trainer in _WHOLE or learns_beside
    return not is_whole and not recipe.launcher.get("accelerate_config")


def _sharded(processes: int | None) -> Iterator[Change]:
    if processes is not None:
        yield {"accelerate_config": "zero2"}
        yield {"accelerate_config": "zero3"}
    else:
        for number in _CARDS:
            yield {"accelerate_config": "zero3", "num_processes": number}


def _attention(known: dict[str, Any]) -> Iterator[Change]:
    if known.get("attn_implementation") == "eager":
        yield {"attn_implementation": "sdpa"}


def _checkpointing(known: dict[str, Any]) -> Iterator[Change]:
    if not known.get("gradient_checkpointing"):
        yield {"gradient_checkpointing": "true"}


def _smaller_batches(known: dict[str, Any]) -> Iterator[Change]:
    """Micro-batches of half the rows, as often as they halve, and more of them in a step."""
    rows = known.get("per_device_train_batch_size") or 8
    steps = known.get("gradient_accumulation_steps") or 1
    of_rollout = known.get("steps_per_generation")
    factor = 2
    while rows % factor == 0:
        change = {
            "per_device_train_batch_size": rows // factor,
            "gradient_accumulation_steps": steps * factor,
        }
        yield change | ({"steps_per_generation": of_rollout * factor} if of_rollout else {})
        factor *= 2


def _smaller_rollouts(known: dict[str, Any]) -> Iterator[Change]:
    """Fewer completions generated at once; each optimizer step has as many as before."""
    is_fixed = known.get("generation_batch_size") or known.get("use_vllm")
    if "steps_per_generation" not in known or is_fixed:
        return
    accumulation = known.get("gradient_accumulation_steps") or 1
    steps = known["steps_per_generation"] or accumulation
    least = accumulation if steps > accumulation else 1
    while steps % 2 == 0 and steps // 2 >= least:
        steps //= 2
        yield {"steps_per_generation": steps}


def _smaller_evaluations(known: dict[str, Any]) -> Iterator[Change]:
    """Fewer rows evaluated at once; evaluation has as many as before."""
    rows = eval_rows(known)
    while rows and rows % 2 == 0:
        rows //= 2
        yield {"per_device_eval_batch_size": rows}


def _vllm(known: dict[str, Any]) -> Iterator[Change]:
    is_beside = known.get("use_vllm") and known.get("vllm_mode") == "colocate"
    if is_beside and not known.get("vllm_enable_sleep_mode"):
        yield {"vllm_enable_sleep_mode": "true"}


def _lighter_optimizer(known: dict[str, Any]) -> Iterator[Change]:
    if not known.get("use_peft") and "8bit" not in str(known.get("optim")):
        yield {"optim": "adamw_8bit"}
        yield {"optim": "paged_adamw_8bit"}


def _lighter_experts(known: dict[str, Any]) -> Iterator[Change]:
    if known.get("experts") and known.get("expert_dtype", "float32") == "float32":
        yield {"expert_dtype": "bfloat16"}


def _lighter_weights(known: dict[str, Any]) -> Iterator[Change]:
    """An adapter on bfloat16 weights, then on weights in 4 bits."""
    if known.get("load_in_4bit") or known.get("load_in_8bit"):
        return
    change = {}
    if not known.get("use_peft"):
        change |= {"use_peft": "true", "lora_target_modules": "all-linear"}
    if known.get("dtype") not in ("bfloat16", "float16", "auto"):
        change |= {"dtype": "bfloat16"}
    if change:
        yield change
    yield change | {"load_in_4bit": "true", "use_bnb_nested_quant": "true"}


def _shorter(known: dict[str, Any]) -> Iterator[Change]:
    key = "max_completion_length" if "max_completion_length" in known else "max_length"
    length = known.get(key)
    while isinstance(length, int) and length // 2 >= _SHORTEST:
        length //= 2
        yield {key: length}
