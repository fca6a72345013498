"""What a graphics card leaves to a training run."""

import difflib
import math
from dataclasses import dataclass

from trl_ext.errors import ConfigError, UnknownNameError

MIB = 2**20
GIB = 2**30
# Driver and CUDA context of one process: 0.3 to 0.6 GiB, more on newer cards. Assumed.
CONTEXT_BYTES = GIB // 2
# Share of the card that stays free between blocks of the caching allocator, whose sizes are rounded
# up, and for work areas of cuBLAS. Assumed.
FRAGMENTS = 0.03

# Name -> MiB as `nvidia-smi` reports them: the printed size less what the card keeps for itself
# (error correction, firmware). H100, A100, A10, L40S, L4 and T4 from a cloud provider's table
# (github.com/modal-labs/modal-client/pull/2797), the others from vendors' sizes and public logs.
CARDS = {
    "rtx-3060": 12288,
    "rtx-4060ti-16": 16380,
    "rtx-4080": 16376,
    "rtx-3090": 24576,
    "rtx-4090": 24564,
    "rtx-5090": 32607,
    "t4": 15360,
    "v100-16": 16384,
    "v100-32": 32768,
    "l4": 23034,
    "a10": 23028,
    "a6000": 49140,
    "l40s": 46068,
    "a100-40": 40960,
    "a100-80": 81920,
    "h100": 81559,
    "h200": 143771,
    "b200": 183359,
}


WITHOUT_BF16 = ("t4", "v100")  # older than Ampere; transformers refuses bf16 there


@dataclass(frozen=True)
class Card:
    """A card's memory, in bytes.

    Attributes:
        name: as in `CARDS`, or the size as it was given.
        total: what the driver reports; vLLM's share is a share of it.
    """

    name: str
    total: int

    @property
    def usable(self) -> int:
        """What tensors can have: total − context − fragments, bytes."""
        return int(self.total * (1 - FRAGMENTS)) - CONTEXT_BYTES


def find_card(name: str) -> Card:
    """The card of a name.

    Raises:
        UnknownNameError: if it is not known; it names the nearest ones.
    """
    plain = name.lower().replace(" ", "-").replace("_", "-").removeprefix("nvidia-")
    if plain in CARDS:
        return Card(plain, CARDS[plain] * MIB)
    near = difflib.get_close_matches(plain, CARDS, n=3, cutoff=0.4)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    raise UnknownNameError(
        f"--gpu: there is no card called {name!r}.{hint} Known: {', '.join(CARDS)}. For another "
        "card give its memory: --vram 24."
    )


def card_of_size(gigabytes: float) -> Card:
    """A card with this much memory, in GiB as `nvidia-smi` counts it.

    Raises:
        ConfigError: if nothing is left beside driver and context.
    """
    if not math.isfinite(gigabytes) or gigabytes < 1:
        raise ConfigError(
            f"--vram: got {gigabytes!r}; allowed: GiB of memory, 1 or more, such as --vram 24."
        )
    return Card(f"{gigabytes:g} GiB", int(gigabytes * GIB))
