"""Evaluation of checkpoints: which and how (plan), one process for each (worker), its samples and its numbers."""
