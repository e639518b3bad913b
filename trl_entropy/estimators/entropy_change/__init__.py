"""How much one step changes the entropy, measured and predicted."""
