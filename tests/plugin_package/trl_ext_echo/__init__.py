"""A trl_ext plugin: the trainer `echo` and the reward `short_answers`."""
