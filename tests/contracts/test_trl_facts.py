"""What DrGRPOTrainer relies on in TRL and transformers. A failure says which override to look at after an upgrade."""

import inspect

from transformers import PreTrainedModel, Trainer
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from trl_entropy.gradients import scores


def source(function) -> str:
    return inspect.getsource(inspect.unwrap(function))


def test_prepare_inputs_looks_the_shuffle_up_in_its_module():
    assert "generation_batch = shuffle_sequence_dict(generation_batch)" in source(GRPOTrainer._prepare_inputs), (
        "whole_group_shuffling replaces trl.trainer.grpo_trainer.shuffle_sequence_dict while _prepare_inputs runs"
    )
    assert hasattr(grpo_trainer, "shuffle_sequence_dict")


def test_log_looks_the_sample_printer_up_in_its_module():
    assert "print_prompt_completions_sample(" in source(GRPOTrainer.log), "printing_plain_text replaces it there"


def test_a_step_is_logged_after_its_metrics_are_collected():
    """`StepLog` makes the line of a step between the two."""
    text = source(Trainer._run_epoch)
    step = text[text.index("self.state.global_step += 1") :]
    assert step.index("on_step_end(") < step.index("self._maybe_log_save_evaluate(")
    assert "learning_rate=learning_rate," in step and "tr_loss += tr_loss_step" in text
    logged = source(Trainer._maybe_log_save_evaluate)
    assert logged.index("self.log(") < logged.index("self._evaluate(") < logged.index("self._save_checkpoint(")
    assert "if self.control.should_log and self.state.global_step > self._globalstep_last_logged:" in logged


def test_log_averages_the_lists_of_its_mode_and_leaves_nan_out():
    text = source(GRPOTrainer.log)
    assert 'mode = "train" if self.model.training else "eval"' in text
    assert "sum(valid) / len(valid) if valid else None" in text and "logs.update(metrics)" in text, (
        "StepLog hands over one value for each key, and the run log puts its nan in the place of None"
    )


def test_the_default_bar_or_printer_is_added_last():
    assert "self.add_callback(PrinterCallback if self.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)" in source(
        Trainer.__init__
    )


def test_only_the_loss_asks_for_the_entropy():
    assert "compute_entropy=True" in source(GRPOTrainer._compute_loss), "StepStatistics takes what the loss computed"
    assert "compute_entropy=True" not in source(GRPOTrainer._generate_and_score_completions)


def test_the_loss_reads_the_advantages_after_it_has_scored():
    text = source(GRPOTrainer._compute_loss)
    assert text.index("self._get_per_token_logps_and_entropies(") < text.index('inputs["advantages"]'), (
        "token_control_scope='micro_batch' puts the advantages by token there between the two"
    )
    assert text.count('inputs["advantages"]') == 1


def test_the_loss_takes_advantages_and_normalises_by_the_longest_completion():
    text = source(GRPOTrainer._compute_loss)
    assert "(per_token_loss.size(0) * self.max_completion_length)" in text, "group_max rescales by this normaliser"
    assert "if advantages.dim() == 1:" in text, "advantages of shape (B, T) are to pass"


def test_rewards_reach_the_batch_gathered_and_in_rank_order():
    text = source(GRPOTrainer._generate_and_score_completions)
    assert "self.accelerator.process_index * len(prompts)" in text, "prompt_index and rewards count rows this way"
    assert "rewards_per_func = gather(rewards_per_func)" in source(GRPOTrainer._calculate_rewards)
    assert 'self._logs["prompt"].extend(gather_object(prompts))' in text, "the probe leaves these prompts out"


def test_generate_returns_the_completion_ids_second():
    assert "return prompt_ids, completion_ids, tool_mask" in source(GRPOTrainer._generate)
    assert '["completions/clipped_ratio"].append' in source(GRPOTrainer._generate), "stop_at_answer corrects it"


def test_generation_gets_no_tokenizer_so_stop_strings_are_bound():
    text = source(GRPOTrainer._generate_single_turn)
    assert "unwrapped_model.generate(" in text and "tokenizer=" not in text.split("unwrapped_model.generate(")[1][:200]


def test_sync_gradients_is_set_before_the_micro_batch():
    text = source(Trainer._run_epoch)
    assert text.index("_set_sync_gradients(do_sync_step)") < text.index("self.training_step(model"), (
        "the last micro-batch of a step is known by accelerator.sync_gradients during the loss"
    )
    assert text.index("on_step_end(") < text.index("self._maybe_log_save_evaluate("), "metrics of a step reach its log"


def test_the_hook_for_checkpointed_embeddings_has_its_name():
    assert f"def {scores.INPUT_GRAD_HOOK}(" in inspect.getsource(PreTrainedModel), "scores takes this hook out"


def test_a_generation_can_be_made_in_rounds():
    text = source(GRPOTrainer._generate_and_score_completions)
    assert "num_items_in_batch = self.accelerator.gather(loss_mask.sum()).sum()" in text, "a filled batch counts anew"
    assert 'self._metrics[mode]["reward"].append(' in text, "PromptSelectingTrainer keeps the first round's values"
    assert '["num_tokens"] = [self.state.num_input_tokens_seen]' in source(GRPOTrainer._generate)
    assert '"prompt": deque(maxlen=args.generation_batch_size)' in source(GRPOTrainer.__init__), (
        "a round's rows are last"
    )
    assert "self._generate_and_score_completions(generation_batch)" in source(GRPOTrainer._prepare_inputs)


def test_what_draws_episodes_is_kept_where_an_evaluation_and_a_named_failure_look_for_it():
    text = source(GRPOTrainer.__init__)
    assert "self._standalone_tools = tools" in text
    assert "self.environment_factories = {None: environment_factory}" in text, "one that is for every row"
    assert "self._environment_pool[name] = [instance]" in text
    assert "self.eos_token_ids = eos_token_ids" in text
    text = source(GRPOTrainer._generate_and_score_completions)
    assert "environment.reset(**reset_kwargs)" in text and "self._generate(prompts)" in text
    assert "self._calculate_rewards(" in text, "after the episode, while the environments still know it"
    assert "reward_func(\n" in source(GRPOTrainer._calculate_rewards), "which are taken from self.reward_funcs"
    assert "unwrapped_model.generate(" in source(GRPOTrainer._generate_single_turn)
    assert "generation_config=self.generation_config" in source(GRPOTrainer._generate_single_turn)
