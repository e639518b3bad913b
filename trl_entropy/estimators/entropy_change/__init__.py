"""How much one step changed the entropy, measured and predicted."""
