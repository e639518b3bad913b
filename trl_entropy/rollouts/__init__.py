"""Completions: a step's batch and its prompt groups, how they are generated, and the draws of probe batches."""
