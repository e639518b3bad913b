"""Evaluation of a run's checkpoints: what to do (plan), one checkpoint's samples (sampling) and numbers (summary)."""
