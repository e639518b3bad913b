"""The evaluation of one checkpoint, from its weights to its numbers; runs in a process of its own."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from trl_entropy.config.settings_file import one_line
from trl_entropy.evaluation.episodes import SAID, EpisodeSampler
from trl_entropy.evaluation.kept import KeptBatches
from trl_entropy.evaluation.plan import VLLM, Job, Settings
from trl_entropy.evaluation.problems import held_out_problems
from trl_entropy.evaluation.sampling import Sampler, load_policy
from trl_entropy.evaluation.summary import metrics_of, position_table, prompt_table
from trl_entropy.evaluation.vllm_engine import VllmEngine
from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.directory import CHECKPOINT_SUMMARY, CheckpointSummary
from trl_entropy.runs.durable import replacing
from trl_entropy.runs.file_errors import describe
from trl_entropy.runs.strict_json import Json, Row
from trl_entropy.tasks import rewards
from trl_entropy.tasks.answers import clean_answer
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.completion_functions import (
    CompletionFunction,
    evaluated_functions,
    metric_functions,
    passing,
)
from trl_entropy.tasks.prompts import rendered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROGRESS, FAILED = "progress", "failed"  # begin the lines that are for whoever started the worker


def run(text: str) -> None:
    """Evaluate the job that `text` describes as JSON; a failure is said in one line, also if the disk is full."""
    quiet_libraries()
    try:
        evaluate(Job.from_json(text))
    except Exception as error:
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        print(FAILED, one_line(f"{kind}{describe(error)}"), flush=True)
        traceback.print_exc()
        sys.exit(1)


def _say(done: int, total: int) -> None:
    print(PROGRESS, done, total, flush=True)


def evaluate(job: Job, show: Callable[[int, int], object] = _say) -> None:
    """
    Draw completions, score and check them, and write the results; the output folder appears when it is complete.

    Args:
        show: called from time to time with the number of completions that are done and the number of all.
    """
    start, fingerprint = time.monotonic(), job.target.fingerprint()
    held_out_problems(job.settings, None)  # a fault in the data is found before the model is loaded
    device, functions = _device(job.device), _functions_of(job.settings)
    model, tokenizer = load_policy(job.target.model, job.settings, device)
    problems = held_out_problems(job.settings, tokenizer)
    kept = KeptBatches(Path(job.output), _key(job, fingerprint, device, problems))
    sampler = _sampler(model, tokenizer, job, kept, problems, functions)
    rows = list(_drawn(sampler, problems, show))
    records = pd.DataFrame(_judged(rows, problems, job.settings, functions))
    columns = {f"{one.kind}s/{one.short}": one.short for one in functions}  # metric -> column of the records
    prompts = prompt_table(records, columns)
    summary: CheckpointSummary = {
        "step": job.target.step,
        "model": Path(job.target.model).name,
        "fingerprint": fingerprint,
        "settings": asdict(job.settings),
        "device": device,
        "batch_size": sampler.batch_size,
        "num_prompts": len(prompts),
        "seconds": time.monotonic() - start + kept.seconds,
        "metrics": metrics_of(records, prompts, columns),
    }
    _write(Path(job.output), records, prompts, summary)
    kept.remove()


def _key(job: Job, fingerprint: str, device: str, problems: list[Row]) -> Json:
    """All that determines the completions."""
    asked: list[object] = [[problem["prompt_id"], problem["prompt"], problem.get("answer")] for problem in problems]
    if job.settings.max_tool_calling_iterations is not None:  # an environment sees the whole row
        asked = [*problems]
    digest = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()
    return {"settings": asdict(job.settings), "fingerprint": fingerprint, "device": device, "problems": digest}


def _drawn(sampler: Sampler, problems: list[Row], show: Callable[[int, int], object]) -> Iterator[Row]:
    """A greedy completion and the samples of each problem, with its prompt and answer; shows the progress."""
    num_samples = sampler.settings.num_samples
    total, done = len(problems) * (num_samples + 1), 0
    for greedy, copies in ((True, 1), (False, num_samples)):
        for place, row in sampler.draw([problem for problem in problems for _ in range(copies)], greedy):
            problem = problems[place // copies]
            prompt = rendered(problem["prompt"], sampler.tokenizer, **sampler.settings.chat_template_kwargs)
            own = {"prompt_id": problem["prompt_id"], "prompt": prompt, "answer": problem.get("answer")}
            yield {**own, "greedy": greedy, "sample": place % copies, **row}
            done += 1
            if done % sampler.batch_size == 0 or done == total:
                show(done, total)


def _sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    kept: KeptBatches,
    problems: list[Row],
    functions: list[CompletionFunction],
) -> Sampler:
    if job.settings.max_tool_calling_iterations is not None:
        return EpisodeSampler(model, tokenizer, job.settings, job.batch_size, kept, functions, problems)
    engine = VllmEngine(model, tokenizer, job.settings) if job.settings.sampler == VLLM else None
    return Sampler(model, tokenizer, job.settings, job.batch_size, engine, kept)


def _functions_of(settings: Settings) -> list[CompletionFunction]:
    """The functions of completions; reward models, which the trainer alone runs, are left out."""
    task = TaskArguments(**settings.task)
    return [one for one in evaluated_functions(task) + metric_functions(task) if not one.is_model]


def _given(rows: list[Row], problems: list[Row], functions: list[CompletionFunction]) -> dict[str, list[float]]:
    """The values of each function on the rows' completions, single turns."""
    by_id = {problem["prompt_id"]: problem for problem in problems}
    asked = [by_id[row["prompt_id"]] for row in rows]
    completions = [
        row["completion"]
        if isinstance(problem["prompt"], str)
        else [{"role": "assistant", "content": row["completion"]}]
        for problem, row in zip(asked, rows, strict=True)
    ]
    ids = [row["completion_ids"] for row in rows]
    return {one.short: one(asked, completions, ids) for one in functions}


def _judged(
    rows: list[Row], problems: list[Row], settings: Settings, functions: list[CompletionFunction]
) -> list[Row]:
    """The rows with a column for each function, and the columns that the metrics count."""
    task = TaskArguments(**settings.task)
    has_episodes = settings.max_tool_calling_iterations is not None
    given = (
        {one.short: [row[one.short] for row in rows] for one in functions}
        if has_episodes
        else _given(rows, problems, functions)
    )
    texts = [row.pop(SAID) if has_episodes else row["completion"] for row in rows]
    right = given[passing(task, [one for one in functions if one.kind == "reward"]).short]
    extracted = [rewards.extract_answer(text) for text in texts]
    verdicts = rewards.answer_verdicts([row["answer"] for row in rows], extracted)
    for place, (row, text, answer) in enumerate(zip(rows, texts, extracted, strict=True)):
        row |= {
            "extracted": None if answer is None else clean_answer(answer),
            "answer_tags": text.count(rewards.ANSWER_OPEN) == 1 == text.count(rewards.ANSWER_CLOSE)
            and answer is not None,
            "well_formed": rewards.is_well_formed(text),
            "correct": right[place] >= task.pass_threshold,
            "verdict": verdicts[place].value,
            **{name: values[place] for name, values in given.items()},
        }
    return rows


def _write(output: Path, records: pd.DataFrame, prompts: pd.DataFrame, summary: CheckpointSummary) -> None:
    with replacing(output) as temporary:
        temporary.mkdir()
        narrow = _narrow(pa.Table.from_pandas(records, preserve_index=False))
        pq.write_table(narrow, temporary / "records.parquet", compression="zstd")
        prompts.to_parquet(temporary / "prompts.parquet", index=False, compression="zstd")
        position_table(records).to_csv(temporary / "positions.csv", index=False)
        (temporary / CHECKPOINT_SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _narrow(table: pa.Table) -> pa.Table:
    """The records with token ids as int32, and the numbers of tokens, which are computed so, as float32."""
    types = {"completion_ids": pa.int32(), "logps": pa.float32(), "entropies": pa.float32()}
    fields = [field.with_type(pa.list_(types[field.name])) if field.name in types else field for field in table.schema]
    return table.cast(pa.schema(fields, table.schema.metadata))


def _device(wanted: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
