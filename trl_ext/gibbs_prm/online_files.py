"""A process reward that learns, in files: as `GibbsScorer` opens it, and a run goes on with it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from trl_ext.errors import RunError
from trl_ext.gibbs_prm.process_models import LEARNS
from trl_ext.gibbs_prm.saved_run import RECIPE
from trl_ext.models.damage import Unreadable, reading_files


def write_learner(folder: Path, model: Any, tokenizer: Any, about: Mapping[str, Any]) -> None:
    """Write π_φ: the adapter of a PeftModel that learns, or a whole model.

    Under another name first: whatever was there is replaced as a whole, or stays.

    Args:
        folder: where.
        model: the transformers or PEFT model.
        tokenizer: of it.
        about: what `GibbsScorer` needs to know, as the recipe of a run tells it.
    """
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(new), selected_adapters=[LEARNS])
    else:
        model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    (new / RECIPE).write_text(yaml.safe_dump(dict(about), sort_keys=False))
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def read_learner(folder: Path, model: Any) -> None:
    """Take over the weights that `write_learner` wrote.

    Raises:
        RunError: if they are missing, damaged, or of another model.
    """
    if not folder.is_dir():
        raise RunError(
            f"There is no process reward in {folder}: the run that wrote the checkpoint had no "
            "process_learning_rate. Begin anew, or remove process_learning_rate."
        )
    try:
        with reading_files():
            _take_over(folder, model)
    except Unreadable as error:
        raise RunError(
            f"The process reward in {folder} cannot be read: {error}. Is a file missing or damaged?"
        ) from error


def _take_over(folder: Path, model: Any) -> None:
    if not isinstance(model, PeftModel):
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
        return
    weights = load_peft_weights(str(folder), device="cpu")
    missing = set_peft_model_state_dict(model, weights, adapter_name=LEARNS)
    if any(f".{LEARNS}." in name for name in missing.missing_keys):
        raise Unreadable("weights of the adapter are missing")
