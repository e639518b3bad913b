"""How noisy the gradient of a step is."""
