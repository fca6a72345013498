"""Causal language models that are read and not trained: opened from paths, asked for tokens."""
