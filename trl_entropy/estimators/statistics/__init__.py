"""Estimates with standard errors, importance weights (T3), (T6), and sums that merge over ranks and steps."""
