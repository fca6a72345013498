"""The truth table of KL penalties: each way that libraries have, graded exactly on an oracle."""

from trl_ext.kl_table.grade import Bench, Grade, distance_after_training
from trl_ext.kl_table.methods import OTHERS, OURS, Method, user_method
from trl_ext.kl_table.samples import Placement, Samples, penalty_terms
from trl_ext.kl_table.table import Row, graded, markdown

__all__ = [
    "OTHERS",
    "OURS",
    "Bench",
    "Grade",
    "Method",
    "Placement",
    "Row",
    "Samples",
    "distance_after_training",
    "graded",
    "markdown",
    "penalty_terms",
    "user_method",
]
