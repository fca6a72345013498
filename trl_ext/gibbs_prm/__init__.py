"""The Gibbs policy as a process reward model: read it, check it, rank and search with it.

Equations E22-E25. The names below are imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_ext.gibbs_prm.scored import GibbsScores, MonteCarloScores, PrefixScores
    from trl_ext.gibbs_prm.scorer import GibbsScorer

_HOMES = {
    "GibbsScorer": "scorer",
    "GibbsScores": "scored",
    "MonteCarloScores": "scored",
    "PrefixScores": "scored",
}

__all__ = ["GibbsScorer", "GibbsScores", "MonteCarloScores", "PrefixScores"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trl_ext.gibbs_prm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trl_ext.gibbs_prm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
