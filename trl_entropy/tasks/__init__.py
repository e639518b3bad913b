"""Tasks: their prompts, the rewards of completions, and the comparison of an answer with the correct one."""
