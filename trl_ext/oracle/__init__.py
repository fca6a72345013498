"""A tabular language model that can be enumerated: exact expectations and exact gradients.

The judge of every algorithm in trl_ext. Importing it registers `TabularLM` with the Auto classes.

    model = TabularLM(TabularLMConfig(vocab_size=4, max_completion_length=3))
    space = Enumeration(model.config)
    rewards = space.rewards(lambda prompt, completion: completion.count(2))
    target = gibbs_logps(space.logps(reference), rewards, beta)
    distance = kl_divergence(target, space.logps(model))
    model.load_table(space.table_of(target))  # now distance is 0
"""

from trl_ext.oracle.branching import (
    branching_prefix_value,
    extinction_probability,
    generation_moments,
    offspring_moments,
)
from trl_ext.oracle.chain import absorption
from trl_ext.oracle.enumeration import Enumeration
from trl_ext.oracle.exact import (
    exact_gradient,
    expected_reward,
    gibbs_logps,
    kl_divergence,
    log_partition,
    projection_loss,
    regularised_reward,
)
from trl_ext.oracle.prefixes import TabularLMConfig
from trl_ext.oracle.ruin import (
    ruin_duration,
    ruin_positions,
    ruin_prefix_value,
    ruin_table,
    ruin_win_probability,
)
from trl_ext.oracle.tabular import TabularLM, TabularModel
from trl_ext.oracle.tokenizer import tabular_tokenizer

__all__ = [
    "Enumeration",
    "TabularLM",
    "TabularLMConfig",
    "TabularModel",
    "absorption",
    "branching_prefix_value",
    "exact_gradient",
    "expected_reward",
    "extinction_probability",
    "generation_moments",
    "gibbs_logps",
    "kl_divergence",
    "log_partition",
    "offspring_moments",
    "projection_loss",
    "regularised_reward",
    "ruin_duration",
    "ruin_positions",
    "ruin_prefix_value",
    "ruin_table",
    "ruin_win_probability",
    "tabular_tokenizer",
]
