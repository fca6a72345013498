"""Will it fit the card? The memory of a run from its model's config, before anything is loaded."""

from trl_ext.plan.cards import CARDS, Card, card_of_size, find_card
from trl_ext.plan.estimate import ITEMS, PHASES, Plan, plan_recipe
from trl_ext.plan.run import generates, settings_of
from trl_ext.plan.suggest import may_shard, suggest

__all__ = [
    "CARDS",
    "ITEMS",
    "PHASES",
    "Card",
    "Plan",
    "card_of_size",
    "find_card",
    "generates",
    "may_shard",
    "plan_recipe",
    "settings_of",
    "suggest",
]
