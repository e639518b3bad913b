"""Equations on tensors, in folders by the question that they answer; only torch and the standard library."""
