"""Which models a recipe has beside the policy: rewards, a process reward, experts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl_ext.bundled import PREFIX
from trl_ext.gibbs_prm.saved_run import saved_run
from trl_ext.plan.beside import EXPERTS, PROCESS, REWARDS, Beside, computing
from trl_ext.plan.places import base_below, is_local_adapter, place, shapes_at
from trl_ext.plan.run import Run

_COUNTED_FILE = "counted_expert.json"
# Completions that a reward scores at a time (`batch_size`), and tokens that a frozen scorer reads.
_BATCH, _SCORERS_TOKENS = 8, 4096


@dataclass(frozen=True)
class _Named:
    """A model as a recipe names it.

    Attributes:
        what: what a note calls it.
        is_reward: it gives one number a completion, and has no LM head.
    """

    what: str
    path: Any
    rows: int = _BATCH
    is_reward: bool = False
    base: str | None = None


Found = tuple[list[Beside], list[str]]


def scorers_of(known: dict[str, Any], model: dict[str, Any], run: Run) -> Found:
    """The models beside the policy, and in words those that cannot be counted.

    Args:
        known: every key of the recipe with its value or default.
        model: the recipe's fields of TRL's `ModelConfig`.
        run: of the recipe.
    """
    parts = (
        _rewards(known, run),
        _process(known, model, run),
        _experts(known, run),
    )
    return [m for models, _ in parts for m in models], [n for _, notes in parts for n in notes]


def _rewards(known: dict[str, Any], run: Run) -> Found:
    entries = [*(known.get("reward_funcs") or []), *(known.get("gold_reward_funcs") or [])]
    models, notes = [], []
    if known.get("reward_model_name_or_path"):
        # TRL reads all completions of a rollout at once, in the policy's dtype.
        path = known["reward_model_name_or_path"]
        named = _Named("the reward model", path, max(run.rollout_rows, 1), True)
        found, missed = _opened([named], run.dtype, run.numbers.compute)
        models, notes = [replace(m, loads=True) for m in found], missed
    for entry in entries:
        # Adapters of one entry share a base, entries share nothing.
        found, missed = _opened(list(_of_reward(entry)), "auto", None)
        models, notes = [*models, *found], [*notes, *missed]
    return models, notes


def _of_reward(entry: Any) -> Iterator[_Named]:
    """The models of one entry of `reward_funcs`."""
    given = entry if isinstance(entry, Mapping) else {"name": entry}
    rows, name = given.get("batch_size") or _BATCH, given.get("name")
    if name == "reward_model":
        base = given.get("model")
        for path in given.get("adapters") or [base]:
            yield _Named("the reward model", path, rows, True, base)
    elif name == "reward_ensemble":
        for member in given.get("members") or []:
            yield from _of_reward(member)
    elif name == "minus_reference":
        inner = given.get("reward")
        is_model = isinstance(inner, str) and _is_model_name(inner)
        yield from _of_reward({"name": "reward_model", "model": inner} if is_model else inner)
    if name == "log_ratio":
        yield _Named("the expert of log_ratio", given.get("expert"), rows)
    if name in ("log_ratio", "minus_reference") and given.get("reference", "policy") != "policy":
        yield _Named(f"the reference of {name}", given["reference"], rows)


def _is_model_name(name: str) -> bool:
    return name.startswith(PREFIX) or "/" in name or Path(name).is_dir()


def _opened(named: list[_Named], dtype: str, compute: int | None) -> Found:
    """The models of one reward; of adapters on one base it is there once."""
    models, notes, bases = [], [], set()
    for each in named:
        shapes = shapes_at(each.path) if _may_be_model(each.path) else None
        if shapes is None:
            notes.append(_left_out(each.what, each.path))
            continue
        base = base_below(each.base or each.path)
        how = computing(shapes, dtype, compute)
        shared = base in bases and bool(shapes.adapter)
        bases.add(base)
        models.append(
            Beside(
                REWARDS,
                shapes,
                how,
                each.rows,
                is_shared=shared,
                has_head=not each.is_reward,
                loads=False,
            )
        )
    return models, notes


def _may_be_model(path: Any) -> bool:
    return isinstance(path, str) and not (Path(path) / _COUNTED_FILE).is_file()


def _left_out(what: str, path: Any) -> str:
    if not _may_be_model(path):
        return f"{what}, which is counted from a corpus"
    return f"{what} {path}, whose config is not to be had here or is of no decoder"


def _process(known: dict[str, Any], model: dict[str, Any], run: Run) -> Found:
    """The scorer of a process reward and its reference, on the policy's weights where they can."""
    learns = known.get("process_learning_rate") is not None
    own = model["model_name_or_path"]
    path = known.get("process_reward") or (own if learns else None)
    if path is None:
        return [], []
    is_whole = not is_local_adapter(path)
    adapted = learns and bool(model.get("use_peft")) and is_whole
    shapes = shapes_at(path, model if adapted else None)
    if shapes is None:
        return [], [_left_out("the model of process_reward", path)]
    frozen = bool(model.get("use_peft")) and (learns or not is_whole)
    is_sharded = run.division.is_deepspeed or run.division.kind not in ("none", "ddp")
    shares = frozen and not is_sharded and base_below(path) == base_below(own)
    length = run.prompt + run.completion
    scorer = Beside(
        PROCESS,
        shapes,
        computing(shapes, run.dtype, run.numbers.compute if learns else None, learns=learns),
        run.rows if learns else max(1, _SCORERS_TOKENS // length),
        is_shared=shares,
        learns=learns,
        checkpointing=run.checkpointing,
    )
    return _with_reference(scorer, known, path, run)


def _with_reference(scorer: Beside, known: dict[str, Any], path: str, run: Run) -> Found:
    """The scorer and what its log-ratio is to: nothing more where that is its base."""
    began = saved_run(path)
    of_run = began.start if began and not scorer.learns else None
    reference = known.get("process_reference") or of_run
    if reference is None:
        if scorer.shapes.adapter or not scorer.learns:
            return [scorer], []
        reference = path  # all of it learns, so that what it began as is a second model
    if scorer.shapes.adapter and place(reference) == base_below(path):
        return [scorer], []
    shapes = shapes_at(reference)
    if shapes is None:
        return [scorer], [_left_out("the model of process_reference", reference)]
    shares = bool(shapes.adapter) and base_below(reference) == base_below(path)
    how = computing(shapes, run.dtype, scorer.how.compute if scorer.learns else None)
    return [scorer, Beside(PROCESS, shapes, how, scorer.rows, is_shared=shares)], []


def _experts(known: dict[str, Any], run: Run) -> Found:
    """Models of a product; adapters on one base share it, and are read in one pass with it."""
    experts = known.get("experts")
    if not isinstance(experts, Mapping):
        return [], []
    dtype = known.get("expert_dtype") or "float32"
    notes, by_base = [], {}
    for name, path in experts.items():
        shapes = shapes_at(path) if _may_be_model(path) else None
        if shapes is None:
            notes.append(_left_out(f"the expert {name}", path))
        else:
            by_base.setdefault(base_below(path), []).append(shapes)
    if known.get("plausibility") is not None or not all(map(_may_be_model, experts.values())):
        notes.append("the probabilities of all tokens, which this product needs at once")
    # Without an adapter among them, models of one place are loaded once each.
    groups = [
        group
        for shapes in by_base.values()
        for group in ([shapes] if any(s.adapter for s in shapes) else [[s] for s in shapes])
    ]
    models = [
        Beside(
            EXPERTS,
            shapes,
            computing(shapes, dtype, run.numbers.compute),
            run.rows * len(group),
            is_shared=number > 0,
            stacks_head=len(groups) > 1 and number == 0,
        )
        for group in groups
        for number, shapes in enumerate(group)
    ]
    return models, notes
