"""How completions act on one another: the empirical Fisher kernel, exact and sketched, and what it predicts."""
