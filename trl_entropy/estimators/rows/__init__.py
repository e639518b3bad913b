"""Per-sequence gradients as the factors that a backward pass gives, and sums, norms and products made of them."""
