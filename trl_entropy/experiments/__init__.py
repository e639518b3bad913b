"""One module an experiment; `trl-entropy experiment NAME` runs the `main` of `trl_entropy.experiments.NAME`."""
