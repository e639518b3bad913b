"""The settings of the probes, which measure and leave training as it is."""

from __future__ import annotations

from dataclasses import dataclass

from trl_entropy.config.setting import setting

# Where the entropy probe draws the completions that it measures on.
_DRAWN: dict[str, tuple[object, ...]] = {"entropy_probe_completions": ("held_out", "eval")}
# Where they are independent of the step, so that its change can be measured on them without bias.
_INDEPENDENT: dict[str, tuple[object, ...]] = {"entropy_probe_completions": ("next_rollouts", "held_out", "eval")}


@dataclass
class ProbeSettings:
    """The part of [`~trl_entropy.DrGRPOConfig`] that turns probes on and says how they measure."""

    entropy_probe: bool = setting(
        "Measure how much each optimizer step changes the policy's entropy, and predict that change from the update.",
        False,
        unit="nats per token",
        probe="entropy_probe",
        changes_training=False,
        logs="`entropy/delta_measured`, `_linear`, `_trapezoid` and their `_stderr`; over the run, how well "
        "prediction and measurement agree",
        cost="about 8 forward passes over `entropy_probe_num_completions` completions; and drawing them, unless they "
        "are the next step's",
    )
    entropy_probe_every: int = setting(
        "The entropy probe measures every this many steps.",
        1,
        unit="steps",
        probe="entropy_probe",
        changes_training=False,
    )
    entropy_probe_num_completions: int | None = setting(
        "Number of completions that the entropy probe measures on, over all processes. If it is not set: with "
        "entropy_probe_completions=next_rollouts a quarter of a step's, in whole prompt groups and of 4 prompts or "
        "more if it has them; else 64, with one completion for each prompt.",
        None,
        unit="completions",
        probe="entropy_probe",
        read_with=_INDEPENDENT,
        changes_training=False,
    )
    entropy_probe_completions: str = setting(
        "Which completions the entropy probe measures on. next_rollouts: those of the next step, which are "
        "independent of this step's update; nothing is generated, and the numbers of a step are known when the next "
        "one begins. held_out: drawn for training prompts that are not in this step. eval: drawn for prompts of "
        "eval_dataset. rollouts: the step's own completions; nothing is generated, and a completion never predicts "
        "its own prompt's change (T17).",
        "next_rollouts",
        choices=("next_rollouts", "held_out", "eval", "rollouts"),
        probe="entropy_probe",
        changes_training=False,
        logs="`rollouts`: `entropy/delta_cross_prompt`, `_in_sample` (T17) in place of the others",
        cost="`rollouts`: about 3 forward and 2 backward passes over the step's completions",
    )
    entropy_probe_sampler: str = setting(
        "What draws the entropy probe's completions. model: the model's own generate. vllm: vLLM, which is faster; "
        "completions are then weighted by the ratio of the policy's probabilities to vLLM's, and a server's random "
        "state moves on.",
        "model",
        choices=("model", "vllm"),
        probe="entropy_probe",
        read_with=_DRAWN,
        changes_training=False,
    )
    entropy_prediction: str = setting(
        "How the change of the entropy is predicted from the update. linear: to first order, from the derivative "
        "before the step. trapezoid: also from the mean of the derivatives before and after it. none: it is only "
        "measured.",
        "trapezoid",
        choices=("trapezoid", "linear", "none"),
        unit="nats per token",
        probe="entropy_probe",
        read_with=_INDEPENDENT,
        changes_training=False,
        logs="`entropy/delta_linear` and `_trapezoid`, with the errors and statistics that belong to them",
        cost="about 4 forward passes over the probe's completions for each derivative",
    )
    change_of: list[str] | None = setting(
        "Whose change by each step the entropy probe measures and predicts, on the same completions and without a "
        "further pass: entropy (always), reward (the weighted sum), length (tokens), truncated (the share of "
        "completions that did not end), any reward function and any metric function by its name. A metric function "
        "named here is called at every step, whatever metric_every is. If it is not set: entropy and reward.",
        None,
        probe="entropy_probe",
        changes_training=False,
        logs="of each quantity Q what is logged of the entropy: `Q/delta_measured`, `_linear`, `_trapezoid` (T21), "
        "their `_stderr`, the sums over the run, and how well prediction and measurement agree",
        cost="of reward functions and metric functions on the probe's own completions, where the probe draws them",
    )
    entropy_second_order: bool = setting(
        "Also predict the change of the entropy to second order, before the step is made. "
        "Needs an optimizer whose metric is known (docs/optimizers.md).",
        False,
        unit="nats per token",
        probe="entropy_probe",
        changes_training=False,
        logs="`entropy/delta_second_order`, known before the step",
        cost="about 13 forward passes over the probe's completions",
    )
    reward_attribution: bool = setting(
        "Also split the predicted change of the expected reward, over the same parts as entropy_attribution splits "
        "that of the entropy, so that what each completion or token paid in entropy stands beside what it earned.",
        False,
        unit="reward",
        probe="entropy_probe",
        read_with={"entropy_attribution": ("sequence", "token")},
        changes_training=False,
        logs="`reward/delta_momentum`, `_weight_decay`, `_gradient`, `_kl`, `_entropy_bonus`, "
        "`_router_aux_loss` (T22); over the run, the mean change by category of tokens, and `reward/price_*`, nats "
        "per token for a unit of reward; the file of entropy_attribution has each completion's or token's part",
        cost="that of entropy_attribution once more",
    )
    entropy_placebo: bool = setting(
        "A control for the prediction: an earlier update, used in place of this one, predicts this step's change. It "
        "must not explain what the step's own prediction leaves over.",
        False,
        unit="nats per token",
        probe="entropy_probe",
        changes_training=False,
        logs="`entropy/delta_placebo`",
        cost="a forward-mode pass over the probe's completions, and a stored copy of an earlier update",
    )
    entropy_attribution: str = setting(
        "Split the predicted change of the entropy over momentum, weight decay and each completion of the step "
        "(sequence), or each of their tokens (token). "
        "Needs an optimizer whose metric is known (docs/optimizers.md).",
        "none",
        choices=("none", "sequence", "token"),
        unit="nats per token",
        probe="entropy_probe",
        changes_training=False,
        logs="`entropy/delta_momentum`, `_weight_decay`, `_gradient`, `_kl`, `_entropy_bonus`, "
        "`_router_aux_loss` (T9); over the run, the shares of right and wrong, rare and common tokens; each "
        "completion's or token's part in a file",
        cost="a forward and backward pass over the probe's completions, and one over the step's completions "
        "(`sequence`) or a forward-mode pass over them (`token`)",
    )

    probe_batch_size: int | None = setting(
        "Number of completions that a probe scores or differentiates at a time, at most. If it is not set, 64 or as "
        "many as the memory of the device allows by their length and the model's sizes. It is halved when memory runs "
        "out, for the rest of the run.",
        None,
        unit="completions",
        changes_training=False,
    )
    probe_precision: str = setting(
        "In what precision the entropy probe multiplies matrices where it differentiates. tf32: with operands rounded "
        "to 10 bits of mantissa, on a GPU that has TF32 (NVIDIA's from A100 on); without effect elsewhere. auto: the "
        "first step that is measured computes the first-order change in both precisions, and tf32 is taken if its "
        "noise is below a tenth of that change's standard error. Measured changes and the prediction to second order "
        "are float32 in any case.",
        "auto",
        choices=("auto", "float32", "tf32"),
        probe="entropy_probe",
        read_with=_INDEPENDENT,
        changes_training=False,
        logs="`auto`: `entropy/precision_noise` of that step, in standard errors",
        cost="`auto`: about 9 forward passes over the probe's completions, once, on a GPU that has TF32",
    )
    probe_rows_gib: float | None = setting(
        "Memory for the gradients of a process's prompt groups or completions, which the noise scale, the Fisher "
        "probe and entropy_probe_completions='rollouts' keep. If it is not set, 60 % of what the device has beside "
        "the model, its gradients and the optimizer. With less than all of them need, the noise scale takes an extra "
        "pass, and 'rollouts' measures fewer of the step's groups.",
        None,
        unit="GiB",
        changes_training=False,
    )
    probe_files_keep: int | None = setting(
        "Of how many steps each probe keeps its files: evenly spaced ones from the first on, and the newest. Every "
        "second one is deleted whenever there would be more. 0 writes none; null, in a YAML file, keeps all.",
        200,
        unit="steps",
        changes_training=False,
    )

    kl_every: int = setting(
        "Measure the KL divergence to the start policy every this many steps when beta=0. 0 turns it off.",
        0,
        unit="steps",
        changes_training=False,
        logs="`kl` to the start policy when `beta=0`",
        cost="a forward pass over the step's completions, and a stored copy of the trained parameters",
    )
    likelihood_probe: bool = setting(
        "Measure what the step did to the log-probabilities of the completions that it was trained on, and whether "
        "those of an advantage above 0 became more likely. The page shows the change of each of their tokens.",
        False,
        unit="nats per token",
        probe="likelihood_probe",
        changes_training=False,
        logs="`likelihood/delta_above_mean`, `/delta_below_mean`, `/falling_above_mean`",
        cost="two forward passes over the step's completions",
    )
    likelihood_probe_every: int = setting(
        "The likelihood probe measures every this many steps.",
        1,
        unit="steps",
        probe="likelihood_probe",
        changes_training=False,
    )
    likelihood_probe_distribution: bool = setting(
        "Also write what published formulas need of the whole distribution at each token before the step: the sum of "
        "its squared probabilities, and the mean of the discriminator of arXiv:2602.03392. `trl-entropy experiment "
        "predictors` and `claims` read them.",
        False,
        probe="likelihood_probe",
        changes_training=False,
        logs="no number; `sum_squared_before` and `mean_discriminator_before` in the step's file",
        cost="a third forward pass over the step's completions, and 8 bytes for each of their tokens",
    )
    effective_sample_size_probe: bool = setting(
        "Log the effective sample size of the loss weights: the number of equally weighted completions that they are "
        "worth.",
        False,
        unit="completions",
        probe="effective_sample_size_probe",
        changes_training=False,
        logs="`ess/loss_weights`, `ess/importance_weights` (T3)",
        cost="none",
    )
    effective_sample_size_probe_every: int = setting(
        "The effective sample size probe measures every this many steps.",
        1,
        unit="steps",
        probe="effective_sample_size_probe",
        changes_training=False,
    )

    noise_scale_probe: bool = setting(
        "Measure the gradient noise scale from each step's own prompts, and suggest a number of prompts per step.",
        False,
        unit="prompts",
        probe="noise_scale_probe",
        changes_training=False,
        logs="`noise_scale/grad_sq_norm`, `/grad_variance_trace` of each step (T14); over the steps so far the noise "
        "scale in prompts with its interval, and a suggested number of prompts; the same in the optimizer's "
        "metric (T16)",
        cost="with LoRA one float32 copy of the adapter's gradient for each prompt group, taken from training's own "
        "backward pass; with a trained head one forward and backward pass over the step's completions",
    )
    noise_scale_probe_every: int = setting(
        "The noise scale probe measures every this many steps.",
        1,
        unit="steps",
        probe="noise_scale_probe",
        changes_training=False,
    )
    noise_scale_from: str = setting(
        "What the noise scale is computed from. groups: the gradient of each prompt group. micro_batches: the norms "
        "of the micro-batches' gradients, which costs little and works for any model, but with larger errors.",
        "groups",
        choices=("groups", "micro_batches"),
        probe="noise_scale_probe",
        changes_training=False,
        logs="`micro_batches`: the same, from micro-batches of whole groups (T15), without (T16)",
        cost="`micro_batches`: reading each gradient once",
    )
    noise_scale_within_prompt: bool = setting(
        "Also split the noise into its parts within and between prompts. Takes an extra pass with the two halves of "
        "each prompt's completions, of which there must be at least 4.",
        False,
        probe="noise_scale_probe",
        changes_training=False,
        logs="the noise within and between prompts (T14)",
        cost="one forward and backward pass over the step's completions",
    )

    fisher_probe: bool = setting(
        "Measure how completions act on one another: the Fisher kernel of their gradients, and each completion's "
        "predicted and measured change of log-probability. "
        "Needs an optimizer whose metric is known (docs/optimizers.md).",
        False,
        unit="nats",
        probe="fisher_probe",
        changes_training=False,
        logs="how `fisher_num_sequences` completions act on one another (T12): cosine similarities, eigenvalues, and "
        "permutation tests to compare them with; each completion's change of log-probability, predicted by parts and "
        "measured",
        cost="one forward and backward pass over these completions and two forward passes; one float32 gradient (or "
        "`fisher_sketch_dim` numbers) for each completion, but no gradients are stored when all completions fit into "
        "one batch on one process",
    )
    fisher_probe_every: int = setting(
        "The Fisher probe measures every this many steps.",
        1,
        unit="steps",
        probe="fisher_probe",
        changes_training=False,
    )
    fisher_num_sequences: int = setting(
        "How many of the step's completions are in the Fisher kernel, over all processes, in whole prompt groups.",
        32,
        unit="completions",
        probe="fisher_probe",
        changes_training=False,
    )
    fisher_sketch_dim: int = setting(
        "Length of the random sketch that stands in for each completion's gradient (T13); 0 takes the gradient "
        "itself. In a sketch the kernel's diagonal K_ii stays exact. An entry K_ij has an error of sqrt((1 + "
        "cos^2)/dim) times sqrt(K_ii K_jj), which is 0.05 at dim = 400 (at 800 where cosines are near 1). The error "
        "of the whole kernel is 0.05 at dim = 400 (1 + fisher/participation_ratio), that of its eigenvalues 0.05 at "
        "dim = 20 fisher/effective_rank.",
        0,
        unit="numbers",
        probe="fisher_probe",
        changes_training=False,
    )

    mutual_information_probe: bool = setting(
        "Measure how much completions depend on their prompts: bounds on the mutual information of the two, from the "
        "step's completions scored under one another's prompts. Where it falls and the entropy does not, the policy "
        "says the same to every prompt.",
        False,
        unit="nats per completion",
        probe="mutual_information_probe",
        changes_training=False,
        logs="`mutual_information/lower`, `/upper` and their `_stderr` (T23); the largest value that the lower bound "
        "can have; the entropy of a whole completion given its prompt; how many completions are likeliest under their "
        "own prompt",
        cost="`mutual_information_num_prompts` forward passes over the completions of as many prompts",
    )
    mutual_information_probe_every: int = setting(
        "The mutual information probe measures every this many steps.",
        10,
        unit="steps",
        probe="mutual_information_probe",
        changes_training=False,
    )
    mutual_information_num_prompts: int = setting(
        "How many of the step's prompts have their completions scored under one another, over all processes. The "
        "lower bound is at most the logarithm of this number.",
        8,
        unit="prompts",
        probe="mutual_information_probe",
        changes_training=False,
    )

    optimizer_state_probe: bool = setting(
        "Log percentiles of the optimizer's moments, and for how many parameters the second moment is tiny.",
        False,
        probe="optimizer_state_probe",
        changes_training=False,
        logs="`optimizer_state/*`: percentiles of the moments, and how many parameters were never or hardly updated",
        cost="reading the moments once",
    )
    optimizer_state_probe_every: int = setting(
        "The optimizer state probe measures every this many steps.",
        1,
        unit="steps",
        probe="optimizer_state_probe",
        changes_training=False,
    )
