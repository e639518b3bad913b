"""The settings of a run that belong to no probe and no control: loss, prompts, evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from trl_entropy.config.setting import setting


@dataclass
class TrainingSettings:
    """The part of [`~trl_entropy.DrGRPOConfig`] that says what is trained on, and when it is evaluated."""

    length_normalizer: str = setting(
        "What the Dr-GRPO loss divides a completion's sum over tokens by: the constant max_completion_length, as in "
        "the paper, or (group_max) the length of the longest completion of the same prompt.",
        "max_completion_length",
        choices=("max_completion_length", "group_max"),
        unit="tokens",
        changes_training=True,
    )
    num_prompts_per_step: int | None = setting(
        "Number of prompts in one optimizer step, over all processes. If it is set, gradient_accumulation_steps is "
        "derived from it.",
        None,
        unit="prompts",
        changes_training=False,  # what is derived from it is compared
    )
    stop_at_answer: bool = setting(
        "End each completion at its closing answer tag. What the sampler drew after the tag is dropped.",
        False,
        changes_training=True,
    )

    curriculum: str = setting(
        "Which training prompts come next. none: TRL's shuffled order. pass_rate: prompts are grouped into hard, "
        "normal and easy ones by how often their completions passed, and normal ones are drawn most often.",
        "none",
        choices=("none", "pass_rate"),
        changes_training=True,
        logs="`curriculum/num_hard`, `_normal`, `_easy`: how many training prompts are in each group",
        cost="none",
    )
    resample_uninformative_groups: bool = setting(
        "Before the step, replace each prompt whose completions all have the same reward, and so no advantage, by "
        "another prompt. Probes on the step's own completions then measure the accepted prompts, not all prompts.",
        False,
        changes_training=True,
        logs="`resampling/*`: how many prompts were replaced, in how many rounds, and how many completions and tokens "
        "are generated for each group whose rewards differ",
        cost="generating and scoring the completions of the other prompts",
    )
    max_resample_rounds: int = setting(
        "Largest number of rounds of generation that resample_uninformative_groups adds to a step. Each round draws "
        "as many prompts as are expected to fill the empty places. Groups whose rewards are still all equal after "
        "the last round are kept and counted.",
        3,
        unit="rounds",
        probe="resample_uninformative_groups",
        changes_training=True,
    )

    completions_files_keep: int | None = setting(
        "Of how many steps the tables that log_completions writes are kept: evenly spaced ones from the first on, and "
        "the newest. Every second one is deleted whenever there would be more. null, in a YAML file, keeps all.",
        200,
        unit="steps",
        read_with={"log_completions": ()},
        changes_training=False,
    )

    evaluate_checkpoints: str = setting(
        "Evaluate the start policy and each saved checkpoint on held-out problems during training, in a process of "
        "its own, as trl-entropy evaluate does. background: training goes on meanwhile. wait: training waits for the "
        "result. Works with the tasks of trl_entropy.train.",
        "none",
        choices=("none", "background", "wait"),
        changes_training=False,
        logs="`evaluation/checkpoints.csv`: pass@k, greedy accuracy, lengths and entropies of each checkpoint",
        cost="sampling from each checkpoint; in the background it shares the device with training",
    )
    metric_every: int = setting(
        "Call the metric functions (metric_funcs) every this many steps, and in every evaluation.",
        1,
        unit="steps",
        changes_training=False,
        logs="`metrics/NAME/mean` and `/std` over the step's completions, and a column NAME in their tables",
        cost="that of the functions",
    )
    evaluate_profile: str = setting(
        "How many problems and completions such an evaluation takes; trl-entropy evaluate --help lists the numbers.",
        "quick",
        choices=("quick", "full"),
        probe="evaluate_checkpoints",
        changes_training=False,
    )
    keep_best: str | None = setting(
        "Keep the checkpoint that is the best so far by this metric of its evaluation, whatever save_total_limit "
        "says. It may be a sum: pass@1 - 0.1*entropy_mean.",
        None,
        probe="evaluate_checkpoints",
        changes_training=False,
    )
    resume_allow_changes: list[str] = setting(
        "With resume_from_checkpoint: the settings that may differ from those that the checkpoint was written with, "
        "by name; data allows another dataset. What changed, and at which step, is written into starts.jsonl.",
        [],
        changes_training=False,
    )
    additional_steps: int = setting(
        "With resume_from_checkpoint: train this many steps beyond the checkpoint. Overrides max_steps. A decaying "
        "learning-rate schedule is then that of a run of the new length.",
        0,
        unit="steps",
        changes_training=False,  # max_steps is what is compared
    )
