"""The Gibbs policy as a process reward model: read it, check it, rank and search with it.

Equations E22-E25. The names below are imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trl_ext.models.quiet import without_messages

if TYPE_CHECKING:
    from trl_ext.gibbs_prm.choosing import Choice, answers_of, choose
    from trl_ext.gibbs_prm.curves import accuracy_curve
    from trl_ext.gibbs_prm.files import Row, read_rows
    from trl_ext.gibbs_prm.monte_carlo import MonteCarloScorer
    from trl_ext.gibbs_prm.page import write_page
    from trl_ext.gibbs_prm.ranking import agreement, rank_prefixes
    from trl_ext.gibbs_prm.rollout_vllm import VLLMSampler
    from trl_ext.gibbs_prm.sampling import GenerateSampler
    from trl_ext.gibbs_prm.scored import GibbsScores, MonteCarloScores, PrefixScores
    from trl_ext.gibbs_prm.scored_file import read_scored
    from trl_ext.gibbs_prm.scorer import GibbsScorer
    from trl_ext.gibbs_prm.search import StepSearch
    from trl_ext.gibbs_prm.search_results import SearchResult
    from trl_ext.gibbs_prm.separating import separation
    from trl_ext.gibbs_prm.streaming import score_rows
    from trl_ext.gibbs_prm.to_file import score_to_file

_HOMES = {
    "Choice": "choosing",
    "GenerateSampler": "sampling",
    "GibbsScorer": "scorer",
    "GibbsScores": "scored",
    "MonteCarloScorer": "monte_carlo",
    "MonteCarloScores": "scored",
    "PrefixScores": "scored",
    "Row": "files",
    "SearchResult": "search_results",
    "StepSearch": "search",
    "VLLMSampler": "rollout_vllm",
    "accuracy_curve": "curves",
    "agreement": "ranking",
    "answers_of": "choosing",
    "choose": "choosing",
    "rank_prefixes": "ranking",
    "read_rows": "files",
    "read_scored": "scored_file",
    "score_rows": "streaming",
    "score_to_file": "to_file",
    "separation": "separating",
    "write_page": "page",
}

__all__ = [
    "Choice",
    "GenerateSampler",
    "GibbsScorer",
    "GibbsScores",
    "MonteCarloScorer",
    "MonteCarloScores",
    "PrefixScores",
    "Row",
    "SearchResult",
    "StepSearch",
    "VLLMSampler",
    "accuracy_curve",
    "agreement",
    "answers_of",
    "choose",
    "rank_prefixes",
    "read_rows",
    "read_scored",
    "score_rows",
    "score_to_file",
    "separation",
    "write_page",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trl_ext.gibbs_prm' has no attribute {name!r}")
    with without_messages():
        return getattr(importlib.import_module(f"trl_ext.gibbs_prm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
