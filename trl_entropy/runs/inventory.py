"""
The files that a run leaves: what each holds, in which format, and who reads it. The page of the documentation is made
from this table, and a test compares it with a real run. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """
    A tensor of a file of probes, or a column of a table.

    Attributes:
        help: what it holds.
        unit: of its numbers; empty for texts, numbers of things, and masks.
        shape: the axes of a tensor: B completions, T tokens of a completion, L of prompt and completion together, P
            prompt groups, N completions of the kernel, K parameters by name. Empty for a column and a single number.
    """

    help: str
    unit: str = ""
    shape: str = ""


@dataclass(frozen=True)
class RunFile:
    """
    A kind of file.

    Attributes:
        pattern: its path below the run directory; {step} stands for digits, {...} for any other part of a name.
        format: as those who read files call it.
        holds: what is in it, in a sentence.
        readers: which commands and functions read it.
        snippet: Python that reads it, where `run` is `load_run(RUN)`; empty if nothing but this package need read it.
        parts: its tensors or columns by name. A name that ends in `*` stands for all that begin so.
    """

    pattern: str
    format: str
    holds: str
    readers: str
    snippet: str = ""
    parts: dict[str, Part] = field(default_factory=dict)

    def matches(self, path: str) -> bool:
        """Whether a path below the run directory, with `/` between folders, is of this kind."""
        words = re.split(r"(\{\w+\})", self.pattern)
        known = {"{step}": r"\d+", "{any}": r".+"}
        written = (known.get(word, r"[^/]+") if word.startswith("{") else re.escape(word) for word in words)
        return re.fullmatch("".join(written), path) is not None

    def has_part(self, name: str) -> bool:
        """Whether the table says what the tensor or column of this name holds."""
        return name in self.parts or any(name.startswith(known[:-1]) for known in self.parts if known.endswith("*"))


def file_of(path: str) -> RunFile | None:
    """The row of the table for a path below the run directory; None if the table has none."""
    return next((file for file in RUN_FILES if file.matches(path)), None)


_IDS = Part("prompts on the left, completions in the last T columns, padded on both sides", shape="B L")
_PROMPT_INDEX = Part("number of each row's prompt group, counted over the run", shape="B")
_COMPLETIONS = {
    "input_ids": _IDS,
    "attention_mask": Part("1 for tokens of prompt and completion", shape="B L"),
    "completion_mask": Part("1 for the tokens of a completion, its end token included", shape="B T"),
    "loss_mask": Part(
        "1 for the tokens that the policy drew; only where tools or environments wrote others", "", "B T"
    ),
    "prompt_index": _PROMPT_INDEX,
}
_PROBE = "a safetensors file, rows of all processes; its metadata has step, temperature, learning rate and sampler"
_OF_LAST_STEPS = "Of a long run at most `probe_files_keep` evenly spaced steps have one."
_PAGE = "`trl-entropy report`, `view`"

RUN_FILES = [
    RunFile(
        "config.yaml",
        "YAML",
        "Every setting of the run with the value that was used, secrets masked.",
        "`trl-entropy evaluate`, `report`, `experiment`",
        "run.config['learning_rate']",
    ),
    RunFile(
        "environment.json",
        "JSON",
        "Versions, machine, command, commit, number of processes, and the settings that differ from their defaults.",
        _PAGE,
        "run.environment['packages']",
    ),
    RunFile(
        "starts.jsonl",
        "JSON lines",
        "A line for each time that training began or went on: after which step, from which checkpoint, with which "
        "command, versions and changed settings.",
        _PAGE,
        "run.starts",
    ),
    RunFile(
        "metrics.jsonl",
        "JSON lines",
        "A line for each step with every number that it logged, by the keys of the page on metric keys. What is known "
        "only when the next step begins stands in a second line of the same step, with `added_later`. nan and "
        "infinities are null, and `not_finite` names them; `load_run` joins and restores all this.",
        "every command that reads a run",
        "run.steps['entropy/delta_measured'].dropna()",
    ),
    RunFile(
        "tensorboard/{any}",
        "TensorBoard events",
        "The same numbers, for `report_to: tensorboard`.",
        "`tensorboard --logdir RUN`",
    ),
    RunFile(
        "completions/completions_{step}.parquet",
        "Parquet, written by TRL",
        "What a step was trained on: texts, rewards, advantage. With `log_completions`; of a long run at most "
        "`completions_files_keep` evenly spaced steps have one.",
        _PAGE,
        "run.completions_of(step=10)",
        {
            "step": Part("the optimizer step"),
            "prompt": Part("the prompt's text"),
            "completion": Part("the completion's text"),
            "advantage": Part("reward less the group's mean, as the loss scales it (T1)"),
            "resample_round": Part("round in which the group was drawn, with `resample_uninformative_groups`"),
            "*": Part("a column for each reward function and each metric function, by its name"),
        },
    ),
    RunFile(
        "completions/evaluation_{step}.parquet",
        "Parquet, written by TRL",
        "What was evaluated after a step during training, with the columns of the table above.",
        _PAGE,
        "run.completions_of(step=20, kind='evaluation')",
    ),
    RunFile(
        "completions/evaluation_{step}_{set}.parquet",
        "Parquet, written by TRL",
        "The same for an evaluation set that has a name.",
        _PAGE,
    ),
    RunFile(
        "completions/dropped_{step}.parquet",
        "Parquet",
        "Groups that were drawn for a step and not trained on, with the rule that dropped each.",
        _PAGE,
        "run.completions_of(step=10, kind='dropped')",
    ),
    RunFile(
        "probes/tokenizer.json",
        "tokenizers' JSON",
        "The tokenizer, which gives token ids their texts.",
        "`run.tokens`, `trl-entropy report`",
    ),
    RunFile(
        "probes/rollouts/step_{step}.safetensors",
        _PROBE,
        f"The completions that a probed step was trained on. {_OF_LAST_STEPS}",
        _PAGE,
        "run.probe_file('rollouts', 10)['rewards']",
        {
            **_COMPLETIONS,
            "rewards": Part("weighted sum of the reward functions", "reward", "B"),
            "advantages": Part("advantage of each completion (T1)", "reward", "B"),
        },
    ),
    RunFile(
        "probes/entropy/step_{step}.safetensors",
        _PROBE,
        "The probe batch E, on which the change of the step was measured. The entry `drawn` of its metadata says "
        "which policy drew it; with its log-probabilities every measured number of the step can be computed again.",
        f"`run.tokens`, {_PAGE}",
        "run.probe_file('entropy', 10)['entropy_before']",
        {
            **_COMPLETIONS,
            "logps_before": Part("log-probability of each token, with the parameters before the step", "nats", "B T"),
            "logps_after": Part("the same with the parameters after it", "nats", "B T"),
            "entropy_before": Part("entropy of the distribution at each token, before the step", "nats", "B T"),
            "entropy_after": Part("the same after it", "nats", "B T"),
            "sampling_logps": Part("log-probability under what drew E, if it was neither policy", "nats", "B T"),
            "value/*": Part("reward, or another quantity of `change_of`, of each completion", "its own", "B"),
            "accepted": Part("whether the group's rewards differ, with resampled groups", "", "B"),
        },
    ),
    RunFile(
        "probes/attribution/step_{step}.safetensors",
        _PROBE,
        "What training on each token, or completion, of the step added to its entropy change (T9).",
        _PAGE,
        "run.probe_file('attribution', 10)['attribution'].sum()",
        {
            "completion_mask": _COMPLETIONS["completion_mask"],
            "loss_mask": _COMPLETIONS["loss_mask"],
            "prompt_index": _PROMPT_INDEX,
            "raw_advantages": Part("reward less the group's mean", "reward", "B"),
            "loss_coefficients": Part(
                "alpha (T2): minus the derivative of the loss by the token's log-probability", "", "B T"
            ),
            "attribution": Part(
                "change that the token made, to first order; their sum is entropy/delta_gradient",
                "nats/token",
                "B T, or B",
            ),
            "attribution_reward": Part("the same of the expected reward (T22)", "reward", "B T, or B"),
            "logps": Part("log-probability of each token before the step", "nats", "B T"),
            "entropy": Part("entropy of the distribution at each token before the step", "nats", "B T"),
            "kind": Part("what the token is part of, for episodes with tools", "", "B T"),
        },
    ),
    RunFile(
        "probes/noise_scale/step_{step}.safetensors",
        _PROBE,
        "Products of the prompt groups' gradients, from which the noise scale of any steps can be pooled anew.",
        "`trl-entropy report`",
        "run.probe_file('noise_scale', 10)['group_sq_norms']",
        {
            "prompt_index": Part("number of each prompt group", shape="P"),
            "group_sq_norms*": Part("|Y_n|^2; `_adam`: in AdamW's metric (T16)", "", "P"),
            "group_dot_batch*": Part("Y_n . g", "", "P"),
            "batch_sq_norm*": Part("|g|^2"),
            "micro_batch_sq_norms": Part("squared norms of micro-batches, with `noise_scale_from: micro_batches`"),
            "num_prompts": Part("prompts of the step"),
        },
    ),
    RunFile(
        "probes/fisher/step_{step}.safetensors",
        _PROBE,
        "The kernel between completions (T12), and what it predicted of their log-probabilities.",
        "`run.kernel`, `trl-entropy experiment kernel`",
        "run.kernel(step=20)",
        {
            "kernel": Part("K_ij", "nats^2", "N N"),
            "rows": Part("each completion's row in the step's file of rollouts", shape="N"),
            "prompt_index": Part("number of each completion's prompt", shape="N"),
            "rewards": Part("weighted sum of the reward functions", "reward", "N"),
            "advantages": Part("advantage (T1)", "reward", "N"),
            "lengths": Part("tokens that the policy drew", "tokens", "N"),
            "logps_change_*": Part(
                "change of a completion's log-probability: predicted, measured, and the parts", "nats", "N"
            ),
            "parameter_norms": Part(
                "what each parameter of the metadata's `parameters` adds to K_ii", "nats^2", "K N"
            ),
        },
    ),
    RunFile(
        "probes/likelihood/step_{step}.safetensors",
        _PROBE,
        "The step's own completions scored before and after it; rows are those of the step's file of rollouts.",
        f"{_PAGE}, `trl-entropy experiment predictors`",
        "run.probe_file('likelihood', 10)['logps_after']",
        {
            "completion_mask": _COMPLETIONS["completion_mask"],
            "loss_mask": _COMPLETIONS["loss_mask"],
            "prompt_index": _PROMPT_INDEX,
            "logps_before": Part("log-probability of each token, with the parameters before the step", "nats", "B T"),
            "logps_after": Part("the same with the parameters after it", "nats", "B T"),
            "entropy_before": Part("entropy of the distribution at each token, before the step", "nats", "B T"),
            "entropy_after": Part("the same after it", "nats", "B T"),
            "sum_squared_before": Part(
                "sum of the squared probabilities of the distribution there, with `likelihood_probe_distribution`",
                "",
                "B T",
            ),
            "mean_discriminator_before": Part("mean of p (H + log p) over that distribution, likewise", "nats", "B T"),
        },
    ),
    RunFile(
        "probes/mutual_information/step_{step}.safetensors",
        _PROBE,
        "Completions of some prompts of the step, each scored under all of these prompts (T23), with the parameters "
        "before it.",
        "`run.probe_file`: which prompts are told apart",
        "run.probe_file('mutual_information', 10)['logps']",
        {
            "logps": Part("log-probability of the whole completion as an answer to each prompt", "nats", "N P"),
            "own": Part("the column of the completion's own prompt", shape="N"),
            "prompt_index": Part("number of each completion's prompt, as in the step's file of rollouts", shape="N"),
            "log_weights": Part(
                "log-probability less that of what drew the completion, where that is not the policy", "nats", "N"
            ),
        },
    ),
    RunFile(
        "evaluation/metrics.csv",
        "CSV",
        "What training measured on held-out prompts, a row for each evaluation.",
        _PAGE,
        "run.training_evaluation",
    ),
    RunFile(
        "evaluation/checkpoints.csv",
        "CSV",
        "A row for each checkpoint that `trl-entropy evaluate` has evaluated, with ends of intervals.",
        "`trl-entropy best`",
        "pandas.read_csv(run.path / 'evaluation/checkpoints.csv')",
    ),
    RunFile(
        "evaluation/consolidated_metrics.csv",
        "CSV",
        "A row for each number on held-out prompts, of training and of `trl-entropy evaluate`.",
        _PAGE,
        "run.evaluation",
        {
            "step": Part("step of the checkpoint"),
            "source": Part("training, or evaluate"),
            "metric": Part("name of the number"),
            "value": Part("the number"),
            "low": Part("lower end of its 95 % interval"),
            "high": Part("upper end"),
            "unit": Part("of the number"),
        },
    ),
    RunFile(
        "evaluation/step_{step}/records.parquet",
        "Parquet",
        "Every sampled and greedy completion of an evaluated checkpoint, with log-probability and entropy of each "
        "token.",
        "`run.records`, `run.evaluation_tokens`",
        "run.records.groupby('step')['correct'].mean()",
    ),
    RunFile(
        "evaluation/step_{step}/prompts.parquet",
        "Parquet",
        "A row for each held-out prompt: pass@k, counts and sums over its samples.",
        "`run.prompts`",
        "run.prompts",
    ),
    RunFile(
        "evaluation/step_{step}/positions.csv",
        "CSV",
        "Entropy and surprisal by position in the completion.",
        "`run.positions`",
        "run.positions",
    ),
    RunFile(
        "evaluation/step_{step}/summary.json",
        "JSON",
        "Settings and numbers of an evaluated checkpoint. It is written last: a folder without it is not finished.",
        "`trl-entropy evaluate`, `best`",
    ),
    RunFile("evaluation/step_{step}.log", "text", "What the process that evaluated a checkpoint printed.", "you"),
    RunFile(
        "checkpoint-{step}/{any}",
        "transformers' checkpoint",
        "Model, optimizer, random numbers and the state of every probe, so that training goes on exactly. "
        "`checkpoint_complete.json` is written last, with a hash of each file.",
        "`--resume_from_checkpoint`, `trl-entropy evaluate`, `experiment`",
    ),
    RunFile("report/{any}", "HTML, PNG", "The page of the run, and its figures.", "a browser"),
    RunFile("set_aside/{any}", "as above", "What a resumption cut: nothing is deleted.", "you"),
    RunFile(
        "README.md",
        "Markdown",
        "The model card that TRL writes for the hub: the method, the base model, versions. It is no guide to the run "
        "directory; that is this page.",
        "the hub",
    ),
    RunFile(
        ".training.lock",
        "a lock",
        "Held while a process trains in the directory; a second one is refused.",
        "training",
    ),
]
