"""Runs `trl_entropy.train` as its command line does, on recorded completions in place of sampled ones.

    accelerate launch --config_file launch/zero2-cpu.yaml tests/distributed/replay_module.py ARGUMENTS_JSON...

Each ARGUMENTS_JSON is the command line of one run. A completion depends on its prompt and its place in the prompt's
group only, so that any number of processes trains on the same ones.
"""

import json
import random
import sys

from probe_worker import replayed_on_all_ranks
from rank_script import leave, prepare_rank


def completion(tokenizer, prompt_ids: list[int], place: int) -> list[int]:
    """Random tokens; every second one or so goes on as `format_reward` wants it."""
    draw = random.Random(f"{prompt_ids} {place}")
    thoughts = [draw.randrange(2, 300) for _ in range(draw.randint(1, 6))]
    return thoughts + tokenizer(" </think> <answer>7</answer>")["input_ids"] * (draw.random() < 0.5)


def main(command_lines: list[list[str]]) -> None:
    prepare_rank()
    from trl import GRPOTrainer

    from trl_entropy.train import main as train

    def replay(trainer, prompt_ids, *args, **kwargs):
        return replayed_on_all_ranks(prompt_ids, lambda ids, place: completion(trainer._tokenizer, ids, place)), None

    GRPOTrainer._generate_single_turn = replay
    for command_line in command_lines:
        train(command_line)


if __name__ == "__main__":
    main([json.loads(text) for text in sys.argv[1:]])
    leave()
