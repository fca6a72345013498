"""The seam to TRL: these files alone name the underscore methods of TRL's policy trainer.

`PolicyTrainer` post-processes what `trl.GRPOTrainer` computes and copies none of it. It is made in
layers, a file each: `hooks` (what an algorithm overrides), `passes` (log-probabilities), `rollouts`
(completions, rewards, credit), `redraw` (other prompts for groups without signal), `evaluation`,
`micro_batches`, `loss`, `checkpoints`, and `trainer` on top.
"""

from trl_ext.trl_adapter.checkpoints import end_training, load_checkpoint, load_weights
from trl_ext.trl_adapter.trainer import PolicyTrainer

__all__ = ["PolicyTrainer", "end_training", "load_checkpoint", "load_weights"]
