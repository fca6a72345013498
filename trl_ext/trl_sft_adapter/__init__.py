"""The seam to TRL's SFTTrainer: a weight for each row, carried through to the loss.

Nothing of TRL is copied: its preparation, collator and loss run as they are, on rows that bring
weights along and on a model whose log-probabilities are multiplied by them.
"""

from trl_ext.trl_sft_adapter.checks import check_rows_stay_whole
from trl_ext.trl_sft_adapter.trainer import WeightedSFTTrainer
from trl_ext.trl_sft_adapter.weights import WeightedCollator, token_weights

__all__ = ["WeightedCollator", "WeightedSFTTrainer", "check_rows_stay_whole", "token_weights"]
