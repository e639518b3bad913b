"""
More than a hundred errors that a person could make, each of which some test must notice.

`MUTANTS` has for each file of `trl_entropy/` the tests that must fail, and the errors: what stands there, and what
would stand there instead. What stands there occurs once in the file, which `test_listed.py` checks, so that the list
follows the code. `python -m mutants` tries them (see `__main__.py`); docs/results/diary.md has the result.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """
    One error: in `file`, below `trl_entropy/`, `new` stands in the place of `old`.

    `tests` is the test file that must fail, below `tests/`, or one test in it.
    """

    file: str
    old: str
    new: str
    tests: str


_STATISTICS = {
    "estimators/statistics/estimate.py": (
        "estimators/statistics/test_estimate.py",
        [
            ("(num_prompts - 1) / num_prompts * (values", "num_prompts / (num_prompts - 1) * (values"),
            ("self + -1.0 * other", "self + 1.0 * other"),
            (
                "torch.vmap(function)((sums.sum(0) - sums) / left)",
                "torch.vmap(function)(sums / (len(statistics) - left))",
            ),
            ("math.sqrt(variance), float(num_prompts - 1)", "math.sqrt(variance), float(num_prompts)"),
            ("student_t_quantile(0.5 + confidence / 2, self.dof)", "student_t_quantile(confidence, self.dof)"),
        ],
    ),
    "estimators/statistics/student_t.py": (
        "estimators/statistics/test_student_t.py",
        [
            ("coefficient = m * (b - m)", "coefficient = m * (b + m)"),
            ("tail, a = 2 * min(", "tail, a = min("),
        ],
    ),
    "estimators/statistics/importance.py": (
        "estimators/statistics/test_importance.py",
        [
            ("return per_token.cumsum(1) - per_token", "return per_token.cumsum(1)"),
            (".where(loss_mask.bool(), 0.0)\n    return accumulate(", "\n    return accumulate("),
            ("where(advantages != 0, 0.0)", "where(advantages > 0, 0.0)"),
        ],
    ),
    "estimators/statistics/histogram.py": (
        "estimators/statistics/test_histogram.py",
        [
            ("math.ceil(q * count)", "math.floor(q * count)"),
            ("maximum=torch.maximum(self.maximum, other.maximum)", "maximum=other.maximum"),
            (
                "return (_ZERO_BIN + sign * distance).where(~values.isnan(), _NAN_BIN)",
                "return _ZERO_BIN + sign * distance",
            ),
        ],
    ),
    "estimators/statistics/moments.py": (
        "estimators/statistics/test_moments.py",
        [
            ("count / (count - 1)", "count / count"),
            ("(v.xy - v.error_xy) / (v.xx - v.error_xx)", "v.xy / (v.xx - v.error_xx)"),
            (
                "predicted_stderr**2 + measured_stderr**2 - difference_stderr**2) / 2",
                "predicted_stderr**2 + measured_stderr**2 - difference_stderr**2)",
            ),
            ("spread @ gradient / (count - 2)", "spread @ gradient / count"),
            ("spread, gradients) / (counts - 2)", "spread, gradients) / counts"),
        ],
    ),
    "estimators/statistics/pooled.py": (
        "estimators/statistics/test_pooled.py",
        [
            ("torch.tensor(square_bias * dof,", "torch.tensor(square_bias,"),
            ("min(self.smallest_dof, other.smallest_dof)", "max(self.smallest_dof, other.smallest_dof)"),
            ("top * bottom - cross", "top * bottom + cross"),
            ("torch.tensor(len(values) - 1,", "torch.tensor(len(values),"),
            ("weights @ self.values / count, weights / count", "weights @ self.values / count, weights"),
        ],
    ),
    "estimators/statistics/over_prompts.py": (
        "estimators/statistics/test_over_prompts.py",
        [
            ("num_prompts = counted.sum(0).double()", "num_prompts = torch.ones_like(bottoms).sum(0)"),
            ("shares * (1 - shares) / stderrs.square(), num_prompts)", "shares / stderrs.square(), num_prompts)"),
        ],
    ),
    "estimators/statistics/pass_at_k.py": (
        "estimators/statistics/test_pass_at_k.py",
        [
            ("(num_wrong - j).clamp(min=0) / (num_samples - j)", "num_wrong / num_samples"),
        ],
    ),
    "estimators/statistics/u_statistic.py": (
        "estimators/statistics/test_u_statistic.py",
        [
            ("num_prompts * both / 2 - self_products.double()", "(num_prompts - 1) * both / 2"),
            ("between_pairs = 2 * num_prompts * ", "between_pairs = 2 * (num_prompts - 1) * "),
            ("(num_prompts * (num_prompts - 2) ** 2) * float", "(num_prompts * (num_prompts - 1) ** 2) * float"),
        ],
    ),
    "estimators/statistics/calibration.py": (
        "estimators/statistics/test_calibration.py",
        [
            ("num_trials + z_sq / 4))", "num_trials + z_sq / 2))"),
            ("bias=float(values.mean()) - truth", "bias=truth - float(values.mean())"),
        ],
    ),
}
_ENTROPY = {
    "estimators/entropy_change/entropy.py": ("estimators/entropy_change/test_entropy.py", [
        ("(logits if temperature == 1 else logits / temperature)", "logits"),
    ]),
    "estimators/entropy_change/delta_entropy.py": ("estimators/entropy_change/test_delta_entropy.py", [
        ("second + 2 * first * s + entropy * r", "second + first * s + entropy * r"),
        ("surrogate - 2 * ratio_slope(means)", "surrogate - ratio_slope(means)"),
        ("ratio_slope(m[:4]) + ratio_slope(m[4:])", "ratio_slope(m[:4]) + ratio_slope(m[:4])"),
        ("(numerator_1 - numerator / denominator * denominator_1)", "(numerator_1 - denominator_1)"),
    ]),
    "estimators/entropy_change/step_estimates.py": ("estimators/entropy_change/test_step_estimates.py", [
        ("(total - sums) / (size - sizes)", "(total - sums) / size"),
        ("sums[parity::2], sizes[parity::2]", "sums[parity::2], sizes[1 - parity :: 2]"),
        ("(num_prompts - 1) / num_prompts * spread", "spread / num_prompts"),
    ]),
    "estimators/statistics/mutual_information.py": ("estimators/statistics/test_mutual_information.py", [
        ("mine - others.logsumexp(1) + counts[1]", "mine - others.logsumexp(1) + counts[0]"),
        ("rows = kept[own]", "rows = torch.ones_like(kept[own])"),
    ]),
    "estimators/entropy_change/step_change.py": ("estimators/entropy_change/test_step_change.py", [
        ("other.terms.denominator / drawn.terms.denominator", "other.terms.denominator"),
    ]),
    "estimators/entropy_change/surrogate.py": ("estimators/entropy_change/test_surrogate.py", [
        ("centred = token_entropy.detach().double()", "centred = token_entropy.double()"),
        ("weights.detach() * token_entropy.double()", "weights * token_entropy.double()"),
    ]),
    "estimators/entropy_change/rivals.py": ("estimators/entropy_change/test_rivals.py", [
        ("m[1] / m[0] * m[2] / m[0] - m[3] / m[0]", "m[3] / m[0] - m[1] / m[0] * m[2] / m[0]"),
    ]),
    "estimators/entropy_change/cross_prompt.py": ("estimators/entropy_change/test_cross_prompt.py", [
        (
            "* (float(accepted.sum()) / len(accepted) if share is None else share)",
            "* (len(accepted) / float(accepted.sum()))",
        ),
    ]),
    "estimators/attribution/shares.py": ("estimators/attribution/test_attribution.py", [
        ("(num_completions * max_completion_length)", "(len(advantages) * max_completion_length)"),
        ("(by_ratio - by_reference)", "(by_ratio + by_reference)"),
        ("boundaries, right=True", "boundaries, right=False"),
        ("- others - self.gradient", "+ others - self.gradient"),
    ]),
    "estimators/noise/noise_scale.py": ("estimators/noise/test_noise_scale.py", [
        ("big_size * big_sq_norm - small_size * small_sq_norm", "small_size * big_sq_norm - big_size * small_sq_norm"),
        ("change.outer(change) / 2", "change.outer(change)"),
        ("keepdim=True)) / (half.shape[1] - 1)", "keepdim=True)) / half.shape[1]"),
        ("self.parts.mean(self._part(1) - self._part(2))", "self.parts.mean(self._part(1) + self._part(2))"),
    ]),
    "estimators/kernel/fisher_kernel.py": ("estimators/kernel/test_fisher_kernel.py", [
        ("(1 + at_least) / (1 + num_permutations)", "at_least / num_permutations"),
        ("- sums.sum(1) + own", "- sums.sum(1)"),
    ]),
    "estimators/kernel/score_change.py": ("estimators/kernel/test_score_change.py", [
        ("coefficient * (-score_dot_gradient.double()", "coefficient * (score_dot_gradient.double()"),
    ]),
    "estimators/kernel/sketch.py": ("estimators/kernel/test_sketch.py", [
        ("weights.double().sqrt()", "weights.double()"),
    ]),
    "estimators/optimizer/adamw.py": ("estimators/optimizer/test_adamw.py", [
        ("second_moment(grad * clip_factor, exp_avg_sq, beta2)", "second_moment(grad, exp_avg_sq, beta2)"),
        ("settings.lr * clip_factor * (1 -", "settings.lr * (1 -"),
        ("(exp_avg_after - beta1 * exp_avg)", "(exp_avg_after - exp_avg)"),
        ("scale = -settings.lr / (1 - beta1**step)", "scale = -settings.lr"),
    ]),
    "estimators/rows/row_gradients.py": ("estimators/rows/test_row_gradients.py", [
        ("grads = grads[self.members].where(self.is_member[:, :, None, None], 0.0)", "grads = grads[self.members]"),
    ]),
}  # fmt: skip
_CONTROL = {
    "estimators/control/entropy_control.py": ("estimators/control/test_entropy_control.py", [
        ("return max(self.cross, _LEAST_CROSS * self.square)", "return self.cross"),
        ("m.clamp(max=count / (floor * inverse))", "m.clamp(max=count / inverse)"),
        ("(a * (whole - half) + b * half)", "(a * half + b * (whole - half))"),
        ("({name: value / self.weight for", "({name: value for"),
        ("wanted = max(0.0, wanted) if floor", "wanted = min(0.0, wanted) if floor"),
        ("cap * step_length / length", "cap * length"),
        ("max(-most, min(most, wanted))", "min(most, wanted)"),
        ("(self.target - entropy) - self.bias", "(self.target - entropy) + self.bias"),
        ("(realised - predicted - self.bias)", "(predicted - realised - self.bias)"),
        ("max(-self.max_change, min(self.max_change, wanted))", "min(self.max_change, wanted)"),
        ("slope = sum(p * value - shared for", "slope = sum(p * value + shared for"),
        ("if len(self.pairs) < self.window or", "if len(self.pairs) < 2 or"),
        ("slope + margin < 0.5 or slope - margin > 2.0", "slope < 0.5 or slope > 2.0"),
        ("        self.weight = self.gradient_ema * self.weight\n        for", "        for"),
    ]),
    "estimators/control/release.py": ("estimators/control/test_release.py", [
        ("reward >= self.level", "reward > self.level"),
        ("self.released or self.streak", "self.streak"),
    ]),
    "estimators/control/token_control.py": ("estimators/control/test_token_control.py", [
        ("(covariances > bounds[0]) & (covariances < bounds[1])", "covariances > bounds[0]"),
        ("ratio.clamp(1 - epsilons[0], 1 + epsilons[1])", "ratio.clamp(1 - epsilons[1], 1 + epsilons[0])"),
        ("_smallest(-covariances, ", "_smallest(covariances, "),
        ("per_token_logps.double() + token_entropy.double()", "per_token_logps.double() - token_entropy.double()"),
        ("torch.where(earned > 0, lost / earned, math.inf)", "lost / earned"),
        ("loss_mask.bool() & (lost > 0)", "loss_mask.bool()"),
    ]),
    "estimators/control/exchange.py": ("estimators/control/test_exchange.py", [
        ("return group_size / (group_size - 1) * (", "return (group_size - 1) / group_size * ("),
        ("(numerators.double() - values * sizes.double())", "numerators.double()"),
        ("(weights - 1) * advantages", "weights * advantages"),
    ]),
    "control/entropy_control.py": ("trainer/test_entropy_control_training.py", [
        ("-1 - engine.accelerator.gather(index)", "engine.accelerator.gather(index)",
         "test_the_entropy_is_that_of_probe_batch_and_fresh_rollouts"),
        ("realised = difference(entropy, before)", "realised = difference(before, entropy)",
         "test_report_leaves_training_bit_identical"),
        ("self.active = state[\"active\"] and self.mode", "self.active = self.mode",
         "test_what_has_switched_itself_off_stays_off_when_it_is_resumed"),
        ("follows = self.active and not asked.infeasible and", "follows = self.active and",
         "test_a_change_that_the_cap_withholds_depends_on_no_error_of_the_entropy"),
    ]),
    "control/token_control.py": ("trainer/test_token_control_loss.py", [
        ("per_loss = len(loss_logps) * self.args.max_completion_length", "per_loss = self.args.max_completion_length",
         "test_kl_cov_holds_the_largest_covariances_to_the_policy_that_sampled"),
        ("chosen[rank * num_rows : (rank + 1) * num_rows, :", "chosen[:num_rows, :",
         "test_tokens_of_all_ranks_are_chosen_together"),
        ("self.args.seed * 1_000_003 + step", "self.args.seed * 1_000_003",
         "test_chance_of_a_whole_batch_depends_on_seed_and_step_alone"),
        ("advantages.where(~chosen, 0.0)", "advantages.where(chosen, 0.0)", "test_chosen_tokens_have_no_loss"),
    ]),
    "control/token_exchange.py": ("trainer/test_token_exchange.py", [
        ("            self.running.skip()\n", "", "test_a_step_above_the_floor_ages_what_is_known"),
        ("            self.directions = None\n", "", "test_a_step_above_the_floor_ages_what_is_known"),
        ("(m * g[name]).to(m.dtype)", "g[name]", "test_the_dearest_tokens_have_no_loss"),
    ]),
}  # fmt: skip
_RETENTION = "test_the_newest_the_best_and_those_in_use_are_kept"
_SECOND_EPOCH = "test_resumed_is_uninterrupted[second epoch, evaluation]"
_ITERATIONS = "test_resumed_is_uninterrupted[two iterations, tokens by chance in micro-batches]"
_RUNS = {
    "runs/durable.py": ("runs/test_durable.py", [
        ("        sync_tree(temporary)\n", ""),
        ("        raise\n    sync(target.parent)", "        raise"),
        ("for inside in sorted(path.rglob(\"*\")):", "for inside in sorted(path.glob(\"*/*\")):"),
        ("except BaseException:", "except Exception:"),
    ]),
    "runs/checkpoints.py": ("runs/test_checkpoints.py", [
        ("    sync_tree(path)\n", ""),
        ("    (path / SEAL).unlink(missing_ok=True)\n", ""),
        ("if size != described[\"bytes\"]:", "if size is None:"),
        ("if _describe(path / name) != described:", "if _describe(path / name)[\"bytes\"] != described[\"bytes\"]:"),
        ("sorted(found, key=step_of, reverse=True)", "sorted(found, reverse=True)"),
        ("resume_from != LATEST_OR_NEW and _has_steps(run)", "_has_steps(run)"),
        ("get(\"global_step\", 0) >= max_steps", "get(\"global_step\", 0) > max_steps"),
        ("f\"{len(text)}:{text}\"", "text"),
        ("if name in old and old[name] != value}", "if old.get(name) and old[name] != value}"),
        ("zlib.crc32(chunk, checksum), size", "zlib.crc32(chunk), size"),
    ]),
    "runs/directory.py": ("runs/test_directory.py", [
        ("if file.read(1) != b\"\\n\":", "if file.read(1) == b\"\\n\":"),
        ("settings = masked(_plain(config))", "settings = _plain(config)"),
        ("rows[step] |= later", "pass"),
        ("!= (step, dataset)]", "!= (step, \"\")]"),
        ("if rows := self.metrics():", "if len(rows := self.metrics()) > 1:"),
    ]),
    "runs/set_aside.py": ("runs/test_set_aside.py", [
        ("*(row for row in rows if row[\"step\"] > step)]", "*(row for row in rows if row[\"step\"] >= step)]"),
        ("_without(row, measured_later) if row[\"step\"] == step else row", "row"),
        ("if match and int(match[1]) > step:", "if match and int(match[1]) >= step:"),
        ("> step and (path / SEAL).exists()", "> step"),
        ("(path for path in _names(run.path, step) if not path.exists())", "_names(run.path, step)"),
    ]),
    "runs/log_window.py": ("runs/test_log_window.py", [
        ("math.hypot(self.root_of_squares, value)", "self.root_of_squares + abs(value)"),
        ("            return\n", "            value = 0.0\n"),
    ]),
    "runs/reading.py": ("runs/test_reading.py", [
        ("if not text.endswith(\"\\n\") and last not in unreadable:", "if not text:"),
    ]),
    "runs/secrets.py": ("runs/test_secrets.py", [
        ("elif assigned and is_secret_name(assigned[2]):", "elif assigned and is_secret_name(argument):"),
        ("return [masked(item) for item in value]", "return value"),
    ]),
    "runs/self_checks.py": ("runs/test_self_checks.py", [
        ("abs(value) > SELF_CHECK_LIMIT", "value > SELF_CHECK_LIMIT"),
    ]),
    "runs/file_errors.py": ("runs/test_file_errors.py", [
        ("one.__cause__ or one.__context__", "one.__cause__"),
    ]),
    "runs/strict_json.py": ("runs/test_directory.py", [
        ("not math.isfinite(value)", "math.isnan(value)"),
    ]),
    "trainer/resumable.py": ("trainer/test_resume.py", [
        ("set(found[:1]) | ", "set() | ", _RETENTION),
        ("for p in reversed(found) if", "for p in found if", _RETENTION),
        ("for _ in range(epochs_trained):", "for _ in range(epochs_trained - 1):", _SECOND_EPOCH),
        ("self.args.eval_on_start = False", "pass", _SECOND_EPOCH),
        ("scheduler.last_epoch -= 1\n", "\n", "test_additional_steps_follow_the_schedule_of_the_longer_run"),
        ("kept = (\"weight_decay\",) if place else ()", "kept = ()",
         "test_a_change_that_is_asked_for_is_made_and_written_down"),
    ]),
    "trainer/training_state.py": ("trainer/test_resume.py", [
        ("(trainer.args.steps_per_generation * trainer.num_iterations) != 0", "trainer.args.steps_per_generation != 0",
         _ITERATIONS),
        ("trainer._step = state[\"step\"]", "trainer._step = 0", _ITERATIONS),
    ]),
}  # fmt: skip
_EXACT = "test_wrong_answers_that_need_no_mathematics"
_REWARDS = {
    "tasks/rewards.py": ("tasks/test_rewards.py", [
        ("text.count(ANSWER_OPEN) != 1 or", "text.count(ANSWER_OPEN) != 1 and"),
        ("text.rfind(ANSWER_OPEN, 0, max(", "text.find(ANSWER_OPEN, 0, max("),
        ("if message.get(\"role\", \"assistant\") == \"assistant\")", "if message)"),
        ("any(tag in thoughts or tag in inner", "any(tag in inner"),
        ("float(verdict is Verdict.EQUAL)", "float(verdict is not Verdict.DIFFERENT)"),
        ("verdicts.count(kind) / len(verdicts))", "verdicts.count(kind))"),
        ("THINK_CLOSE)[0])\n\n\ndef answer_verdicts", "THINK_CLOSE)[2])\n\n\ndef answer_verdicts"),
    ]),
    "tasks/answers/checker.py": ("tasks/test_rewards.py", [
        ("for _ in range(3):", "for _ in range(1):", "test_killed_in_the_middle_of_a_check"),
        ("reply is None or exit_code == -signal.SIGXCPU", "reply is None",
         "test_the_end_of_its_cpu_time_is_a_timeout_however_busy_the_machine"),
        ("            self._cache.move_to_end(key)\n", "            pass\n",
         "test_verdicts_are_remembered_within_bounds"),
        ("_checker_of_process(os.getpid())", "_checker_of_process(0)",
         "test_a_forked_process_has_a_checker_of_its_own"),
        ("num_requests >= self._CHECKS", "num_requests > self._CHECKS",
         "test_a_process_is_replaced_before_its_caches_have_grown"),
    ]),
    "tasks/answers/phrases.py": ("tasks/test_rewards.py", [
        ("_same_number(percent / 100, number))", "_same_number(percent * 100, number))"),
        ("-number if match[\"minus\"] else number", "number"),
        ("round(a, 6) == round(b, 6)", "round(a, 2) == round(b, 2)"),
        ("if match[\"whole\"] and number >= 1:", "if match[\"whole\"] and number > 1:", _EXACT),
        ("(number.denominator > 1 and", "(number and"),
    ]),
    "tasks/answers/text.py": ("tasks/test_rewards.py", [
        ("    if not gold or not answer:\n        return Verdict.DIFFERENT\n", "",
         "test_an_empty_gold_answer_earns_nothing_and_an_empty_answer_neither"),
        ("if max(len(gold), len(answer)) > MAX_CHARS:", "if len(gold) > MAX_CHARS:"),
    ]),
    "tasks/answers/limits.py": ("tasks/test_rewards.py", [
        ("deepest = max(deepest, depth)", "deepest = depth"),
        ("bound.degree > MAX_DEGREE or", ""),
    ]),
    "tasks/gsm8k.py": ("tasks/test_gsm8k.py", [
        ("worked.rpartition(ANSWER_MARK)", "worked.partition(ANSWER_MARK)"),
        ("answer.replace(\",\", \"\"))", "answer)"),
    ]),
    "tasks/prompts.py": ("tasks/test_gsm8k.py", [("if length <= longest]", "if length < longest]")]),
}  # fmt: skip
_ROUND = "test_a_round_is_as_large_as_is_expected_to_do"
_TRAINER = {
    "trainer/group_resampling.py": ("trainer/test_resampling.py", [
        ("min(-(-expected // unit) * unit, most)", "min(expected // unit * unit, most)", _ROUND),
        ("math.ceil(num_missing * num_drawn / num_informative)", "num_missing", _ROUND),
        ("enumerate(informative) if number for group", "enumerate(informative) for group",
         "test_the_first_ones_drawn_are_taken"),
    ]),
    "trainer/curriculum.py": ("trainer/test_curriculum.py", [
        ("(self.rates >= self.bounds[0])", "(self.rates > self.bounds[0])"),
        ("self.ema * (rate - self.rates[index])", "(1 - self.ema) * (rate - self.rates[index])"),
        ("argsort(descending=True)", "argsort()"),
        ("state[\"drawn\"] if self.resumes_within_epoch else []", "state[\"drawn\"]"),
    ]),
    "trainer/prompt_selection.py": ("trainer/test_trainer.py", [
        ("(self._rewards >= self.pass_reward)", "(self._rewards > self.pass_reward)",
         "test_the_curriculum_learns_from_every_scored_group"),
    ]),
    "trainer/step_log.py": ("trainer/test_step_log.py", [
        ("else self._loss + loss.detach()", "else loss.detach()",
         "test_a_step_of_several_micro_batches_has_the_sum_of_their_losses"),
        ("        self._of_line.clear()\n        hand_over(", "        hand_over(",
         "test_a_line_of_several_steps_reduces_each_key_in_its_own_way"),
    ]),
    "rollouts/groups.py": ("trainer/test_resampling.py", [
        ("scored, num_groups = ~rewards.isnan(),", "scored, num_groups = rewards.isfinite() | True,",
         "test_equal_rewards_are_uninformative_and_unscored_ones_no_evidence"),
    ]),
    "probes/agreement.py": ("probes/test_running_agreement.py", [
        ("self.integrals.get(name, start) + change", "self.integrals.get(name, 0.0) + change"),
        ("difference.stderr) if difference else 0.0", "difference.stderr) if not difference else 0.0"),
    ]),
    "probes/runner.py": ("trainer/test_probe_events.py", [
        ("        self._seconds.clear()\n\n    # ---- resuming", "\n    # ---- resuming",
         "test_seconds_are_those_of_the_step_and_of_all_its_events"),
        ("        self._micro_batches = []\n        self.last_step", "        self.last_step",
         "test_events_come_in_order_and_the_record_outlives_its_step"),
    ]),
    "probes/clock.py": ("trainer/test_probe_events.py", [
        ("    torch.get_device_module(device).synchronize()\n", "",
         "test_seconds_are_those_of_the_step_and_of_all_its_events"),
    ]),
    "probes/precision.py": ("probes/test_precision.py", [
        ("values = score(*given)", "values = slopes"),
        ("math.hypot(moved.value, moved.stderr)", "abs(moved.value)"),
    ]),
    "probes/effective_sample_size.py": ("probes/test_effective_sample_size.py", [
        ("accelerator.reduce(torch.stack([weights.sum(), weights.square().sum()]))",
         "torch.stack([weights.sum(), weights.square().sum()])"),
        ("(log_ratio.double() * mask).sum(dim=1)", "log_ratio.double().sum(dim=1)"),
    ]),
    "probes/step_statistics.py": ("probes/test_step_statistics.py", [
        ("accelerator.reduce(torch.stack([self.sums[name] for name in names]), reduction=\"sum\").tolist()",
         "torch.stack([self.sums[name] for name in names]).tolist()"),
        ("maximum=extrema[:, 0].amax()", "maximum=extrema[0, 0]"),
        ("self._add(\"tokens\", mask.sum())", "self._add(\"tokens\", torch.ones_like(mask).sum())"),
        ("start_per_token_logps.double() - per_token_logps.double()",
         "per_token_logps.double() - start_per_token_logps.double()"),
    ]),
    "probes/noise_scale.py": ("trainer/test_noise_scale_probe.py", [
        ("number**2 * norms[order]", "number * norms[order]", "test_numbers_are_those_of_float64_loops"),
    ]),
    "engine/optimizer_step.py": ("engine/test_optimizer_step.py", [
        ("rule.advanced(states[name], g * clip,", "rule.advanced(states[name], g,"),
        ("update.step_of_rule - 1, update.options", "update.step_of_rule, update.options"),
    ]),
    "engine/context.py": ("engine/test_engine_step.py", [
        ("num_steps_done() + 1", "num_steps_done()"),
    ]),
}  # fmt: skip


def _mutants() -> list[Mutant]:
    areas = _STATISTICS, _ENTROPY, _CONTROL, _RUNS, _REWARDS, _TRAINER
    return [
        Mutant(file, old, new, "::".join([tests, *test]))
        for area in areas
        for file, (tests, errors) in area.items()
        for old, new, *test in errors
    ]


MUTANTS = _mutants()
