"""Per-completion gradients of one parameter as the factors of a backward pass, and what is made of them."""
