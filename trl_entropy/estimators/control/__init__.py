"""Entropy control: the correction of a step, the choice of tokens to leave out, and what either costs in reward."""
