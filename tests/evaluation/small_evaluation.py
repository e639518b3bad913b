"""Prompts of different lengths and the settings of a run that was never made."""

PROMPTS = [
    "Ann has 3 apples.",
    "Ben has 4 coins and gets 2 more. How many coins?",
    "Cleo",
    "Dan has 2 bags of 3 pens.",
]
CONFIG = {"task": "word_problems", "seed": 0, "max_completion_length": 12, "temperature": 0.7, "use_cpu": True,
          "reward_funcs": ["tag_pref"]}  # fmt: skip


def rows_with(prompts):
    """The rows of a dataset with these prompts."""
    return [{"prompt": prompt} for prompt in prompts]
