"""Completions of a recipe's policy, sampled and scored into a file. A kill loses no more than one
batch of it.
"""

from trl_ext.collect.collector import Collector, collect
from trl_ext.collect.forms import FORMS
from trl_ext.collect.summary import Summary

__all__ = ["FORMS", "Collector", "Summary", "collect"]
