"""Estimates with standard errors, and sums that merge over micro-batches, ranks and steps."""
