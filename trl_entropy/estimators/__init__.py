"""Equations on tensors, in folders by the question that they answer; torch and the standard library only."""
