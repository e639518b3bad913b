"""How completions act on one another: the empirical Fisher kernel."""
