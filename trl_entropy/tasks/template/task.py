"""NAME: its problems, its reward, and a metric that is watched and not trained on."""

import random
import re


def problems(split):
    """The rows of the split `train` or `test`: a prompt, and whatever the functions below read."""
    numbers = [(a, b) for a in range(2, 20) for b in range(2, 20)]
    random.Random(0).shuffle(numbers)
    chosen = numbers[:240] if split == "train" else numbers[240:]
    return [
        {"prompt": f"Ana has {a} stamps and gets {b} more. How many stamps?", "answer": str(a + b)} for a, b in chosen
    ]


def right(prompts, completions, answer, **kwargs):
    """The reward: 1 where the last number of the completion is the answer. One number for each completion."""
    return [float(last_number(text) == one) for text, one in zip(completions, answer, strict=True)]


def num_words(prompts, completions, **kwargs):
    """A metric: how many words there are."""
    return [len(text.split()) for text in completions]


def last_number(text):
    found = re.findall(r"\d+", text)
    return found[-1] if found else None
