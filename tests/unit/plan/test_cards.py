import pytest

from trl_ext.errors import ConfigError, UnknownNameError
from trl_ext.plan import CARDS, card_of_size, find_card
from trl_ext.plan.cards import GIB


def test_usable_memory():
    # By hand: 12 GiB less 3 % for fragments and half a GiB for the context.
    card = find_card("RTX 3060")
    assert (card.name, card.total) == ("rtx-3060", 12 * GIB)
    assert card.usable == int(12 * 0.97 * GIB) - GIB // 2


@pytest.mark.parametrize(
    "written", ["t4", "T4", "nvidia-t4", "NVIDIA T4", "A100-80", "rtx_4090", "h100"]
)
def test_spellings(written):
    assert find_card(written).name in CARDS


def test_an_unknown_card_names_its_neighbours():
    with pytest.raises(UnknownNameError, match=r"'rtx-3061'.*Nearest: rtx-3060.*--vram 24"):
        find_card("rtx-3061")


def test_a_size_of_ones_own():
    assert card_of_size(24).total == 24 * GIB
    for wrong in (0.5, float("nan"), float("inf"), -8):
        with pytest.raises(ConfigError, match="1 or more"):
            card_of_size(wrong)
