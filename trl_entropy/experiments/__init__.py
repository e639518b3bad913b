"""Experiments, one in each module; `trl-entropy experiment NAME` calls `main` of `trl_entropy.experiments.NAME`."""
