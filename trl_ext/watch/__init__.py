"""The reward-hacking watch: a reward that training never sees, beside the one that it climbs."""

from trl_ext.watch.callback import RewardHackingWatch, watch_of
from trl_ext.watch.files import BEST, HACKING, PICTURE

__all__ = ["BEST", "HACKING", "PICTURE", "RewardHackingWatch", "watch_of"]
