"""Passes through the model: scores, derivatives along an update, gradients of single completions and groups."""
