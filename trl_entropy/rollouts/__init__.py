"""Completions: the batch of a step and its prompt groups, their generation, and drawing probe batches."""
