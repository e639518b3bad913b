"""What is trained on: prompts, the rewards of completions, and how an answer is compared with the right one."""
