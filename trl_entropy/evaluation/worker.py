"""The program that evaluates one checkpoint: `python -m trl_entropy.evaluation.worker JOB`, with JOB as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from trl_entropy.evaluation.plan import VLLM, Job, Settings
from trl_entropy.evaluation.sampling import Sampler, load_policy
from trl_entropy.evaluation.summary import metrics_of, position_table, prompt_table
from trl_entropy.evaluation.vllm_engine import VllmEngine
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.directory import CHECKPOINT_SUMMARY, CheckpointSummary
from trl_entropy.runs.durable import replacing
from trl_entropy.runs.file_errors import describe
from trl_entropy.runs.strict_json import Row
from trl_entropy.tasks import rewards
from trl_entropy.tasks.answers import clean_answer
from trl_entropy.tasks.arguments import TaskArguments, load_task
from trl_entropy.tasks.word_problems import MAX_PROBLEMS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROGRESS, FAILED = "progress", "failed"  # begin the lines that are for whoever started the worker
_EVERY_HELD_OUT = {"word_problems": MAX_PROBLEMS["test"], "gsm8k": 10**9}


def evaluate(job: Job) -> None:
    """Draw completions, score and check them, and write the results; the output folder appears when it is complete."""
    start = time.monotonic()
    device = _device(job.device)
    model, tokenizer = load_policy(job.target.model, job.settings, device)
    problems = held_out_problems(job.settings, tokenizer)
    engine = VllmEngine(model, tokenizer, job.settings) if job.settings.sampler == VLLM else None
    sampler = Sampler(model, tokenizer, job.settings, job.batch_size, engine)
    records = pd.DataFrame(_judged(list(_drawn(sampler, problems)), job.settings))
    prompts = prompt_table(records)
    summary: CheckpointSummary = {
        "step": job.target.step,
        "model": Path(job.target.model).name,
        "fingerprint": job.target.fingerprint(),
        "settings": asdict(job.settings),
        "device": device,
        "batch_size": sampler.batch_size,
        "num_prompts": len(prompts),
        "seconds": time.monotonic() - start,
        "metrics": metrics_of(records, prompts),
    }
    _write(Path(job.output), records, prompts, summary)


def held_out_problems(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The held-out problems to evaluate on; with the same seed a smaller selection is part of a larger one."""
    task = TaskArguments(**{**settings.task, "num_train_problems": 1})
    task.num_eval_problems = _EVERY_HELD_OUT[task.task]
    _, problems = load_task(task, tokenizer, seed=0)
    chosen = np.random.default_rng(settings.seed).permutation(len(problems))[: settings.num_of(len(problems))]
    return [problems[int(row)] for row in chosen]


def _drawn(sampler: Sampler, problems: list[Row]) -> Iterator[Row]:
    """A greedy completion and the samples of each problem, with the problem's columns; prints the progress."""
    num_samples = sampler.settings.num_samples
    total, done = len(problems) * (num_samples + 1), 0
    for greedy, copies in ((True, 1), (False, num_samples)):
        prompts = [problem["prompt"] for problem in problems for _ in range(copies)]
        for place, row in sampler.draw(prompts, greedy):
            problem = problems[place // copies]
            own = {name: problem[name] for name in ("prompt_id", "prompt", "answer")}
            yield {**own, "greedy": greedy, "sample": place % copies, **row}
            done += 1
            if done % sampler.batch_size == 0 or done == total:
                print(PROGRESS, done, total, flush=True)


def _judged(rows: list[Row], settings: Settings) -> list[Row]:
    """The rows with a column for each reward function, and the columns that the metrics count."""
    texts, answers = [row["completion"] for row in rows], [row["answer"] for row in rows]
    names = settings.task.get("reward_funcs", ["tag_pref"])
    right = next((name for name in names if name != "format_reward"), "tag_pref")
    given = {
        name: getattr(rewards, name)([row["prompt"] for row in rows], texts, answer=answers)
        for name in dict.fromkeys([*names, right])
    }
    extracted = [rewards.extract_answer(text) for text in texts]
    verdicts = rewards.answer_verdicts(answers, extracted)
    for place, (row, text, answer) in enumerate(zip(rows, texts, extracted, strict=True)):
        row |= {
            "extracted": None if answer is None else clean_answer(answer),
            "answer_tags": text.count(rewards.ANSWER_OPEN) == 1 == text.count(rewards.ANSWER_CLOSE)
            and answer is not None,
            "well_formed": rewards.is_well_formed(text),
            "correct": bool(given[right][place]),
            "verdict": verdicts[place].value,
            **{name: values[place] for name, values in given.items()},
        }
    return rows


def _write(output: Path, records: pd.DataFrame, prompts: pd.DataFrame, summary: CheckpointSummary) -> None:
    with replacing(output) as temporary:
        temporary.mkdir()
        records.to_parquet(temporary / "records.parquet", index=False)
        prompts.to_parquet(temporary / "prompts.parquet", index=False)
        position_table(records).to_csv(temporary / "positions.csv", index=False)
        (temporary / CHECKPOINT_SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _device(wanted: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


if __name__ == "__main__":
    quiet_libraries()
    try:
        evaluate(Job.from_json(sys.argv[1]))
    except OSError as error:  # said where it is read even if the disk is full
        print(FAILED, describe(error), flush=True)
        raise
