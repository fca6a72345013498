"""The experts of `trl_ext generate`: where they go, how they are opened, what is said of them."""

import argparse
import logging
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trl_ext.errors import ConfigError

if TYPE_CHECKING:
    from trl_ext.poe.product import ProductOfExperts


def check_device(name: str | None) -> None:
    """Whether --device is there, before an expert is loaded for it.

    Raises:
        ConfigError: if not; with those that are.
    """
    if name is None:
        return
    import torch

    try:
        torch.zeros(1, device=name).tolist()  # `meta` holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".!")
        raise ConfigError(
            f"--device {name}: it cannot be used: {reason}. Here are: {', '.join(there)}. Give one "
            "of them, or leave --device out."
        ) from error


def quiet_loading() -> None:
    """Keep out of the output what other libraries say as models load, and no user can act on."""
    # Said at import of a kernel that nothing here uses; it reads as if the installation had failed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # peft's own use of a name that transformers renames.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()


def load(
    args: argparse.Namespace, experts: Mapping[str, str], weights: Mapping[str, float]
) -> "ProductOfExperts":
    """The product, with its tokenizer.

    Raises:
        ConfigError: if an expert cannot be opened, or none has a tokenizer.
    """
    quiet_loading()
    from trl_ext.poe.loading import load_product

    product = load_product(
        experts, weights, dtype=args.dtype, device=args.device, plausibility=args.plausibility
    )
    if product.tokenizer is None:
        raise ConfigError(
            f"No expert has a tokenizer: {', '.join(experts.values())}. Save it beside one of "
            "them with tokenizer.save_pretrained(folder)."
        )
    return product


def advise(product: "ProductOfExperts", weights: Mapping[str, float]) -> None:
    """What makes text fall apart, said before it does."""
    from trl_ext.poe.counted import NGramExpert

    if product.plausibility is not None:
        return
    pushing = [name for name, weight in weights.items() if weight < 0]
    if pushing:
        _note(
            f"the weight of {pushing[0]} is negative, and tokens that it finds improbable win. If "
            "the text falls apart, add --plausibility 0.1."
        )
    counted = [
        name
        for name, expert in product.experts.items()
        if isinstance(expert, NGramExpert) and weights[name] > 0
    ]
    others = [name for name in weights if name not in counted]
    left = sum(weights[name] for name in others)
    if counted and others and 0 < left < 1:
        _note(
            f"{counted[0]} counts n-grams: behind tokens that it has not seen it says nothing, and "
            f"the product is {others[0]} at temperature {1 / left:.2g}. If the text falls apart: "
            f"--weight {others[0]}=1 --weight {counted[0]}=0.3, or --plausibility 0.05."
        )


def _note(text: str) -> None:
    print(f"Note: {text}", file=sys.stderr, flush=True)
