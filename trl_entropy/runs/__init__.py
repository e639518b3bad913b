"""The run directory: metrics and their table, probe files, checkpoints, console and TensorBoard."""
