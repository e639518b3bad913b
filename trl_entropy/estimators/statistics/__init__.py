"""Estimates with standard errors, and sums that can be merged over micro-batches, ranks and steps."""
