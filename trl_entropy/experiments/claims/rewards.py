"""The reward of the planted collapse."""

from collections.abc import Sequence


def brevity(prompts: object, completions: object, completion_ids: Sequence[Sequence[int]], **kwargs: object) -> list:
    """1 for an empty completion, 0 for one of 32 tokens or more: every prompt is answered best by the same."""
    return [1.0 - min(len(ids), 32) / 32 for ids in completion_ids]
