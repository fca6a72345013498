"""Rounds of collecting, scoring and fitting offline: each tilts the policy once more.

Equation E3, round after round: with `reference: moving` the target of round k is
π_{k-1}·exp(r/β)/Z, so that k rounds tilt the first policy by exp(k·r/β); with `reference: fixed`
it is π_0·exp(r/β)/Z each time, and the samples of π_{k-1} are weighted by π_0/π_{k-1} as well.
"""

from trl_ext.iterate.progress import Round
from trl_ext.iterate.rounds import iterate

__all__ = ["Round", "iterate"]
