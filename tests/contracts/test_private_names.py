"""Upstream's private names that this package reads, sets or overrides: a failure says what has another name now."""

import inspect

import pytest
import torch
from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.utils import RepeatSampler

LOGGED = ["ignore_keys_for_eval", "start_time", "learning_rate"]  # of a step
OPTIONAL = ["num_generations", "has_tool_images"]  # of a single turn


def source(function) -> str:
    return inspect.getsource(inspect.unwrap(function))


def parameters(function) -> list[str]:
    return list(inspect.signature(inspect.unwrap(function)).parameters)


# Attributes that training_state.py saves and restores, or that the trainer reads; where upstream sets each.
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("_tr_loss", Trainer._run_epoch),
        ("_globalstep_last_logged", Trainer._maybe_log_save_evaluate),
        ("_buffered_inputs", GRPOTrainer._prepare_inputs),
        ("_step", GRPOTrainer._prepare_inputs),
        ("_metrics", GRPOTrainer.log),
        ("_logs", GRPOTrainer.log),
        ("_buffered_inputs", RLOOTrainer._prepare_inputs),
        ("_step", RLOOTrainer._prepare_inputs),
        ("_metrics", RLOOTrainer.log),
        ("_logs", RLOOTrainer.log),
    ],
)
def test_an_attribute_is_where_it_was(name, function):
    assert f"self.{name}" in source(function)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (GRPOTrainer._tokenize_prompts, ["self", "prompts"]),
        (GRPOTrainer._generate_single_turn, ["self", "prompt_ids", "images", "multimodal_fields", *OPTIONAL]),
        (GRPOTrainer._generate, ["self", "prompts"]),
        (GRPOTrainer._calculate_rewards, ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        (GRPOTrainer._compute_loss, ["self", "model", "inputs"]),
        (RLOOTrainer._tokenize_prompts, ["self", "prompts"]),
        (RLOOTrainer._generate_single_turn, ["self", "prompt_ids", "images", "multimodal_fields"]),
        (RLOOTrainer._generate, ["self", "prompts"]),
        (RLOOTrainer._calculate_rewards, ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        (RLOOTrainer._compute_loss, ["self", "model", "inputs"]),
        (Trainer._save_checkpoint, ["self", "model", "trial"]),
        (Trainer._maybe_log_save_evaluate, ["self", "tr_loss", "grad_norm", "model", "trial", "epoch", *LOGGED]),
        (Trainer._load_from_checkpoint, ["self", "resume_from_checkpoint", "model"]),
        (Trainer._load_optimizer_and_scheduler, ["self", "checkpoint"]),
    ],
)
def test_an_overridden_function_takes_what_it_took(function, expected):
    assert parameters(function) == expected


def test_what_private_functions_return():
    assert "return prompt_ids, images, multimodal_fields" in source(GRPOTrainer._tokenize_prompts)
    assert "return completion_ids, logprobs" in source(GRPOTrainer._generate_single_turn)


def test_the_sampler_draws_one_permutation_an_epoch():
    """`_init_training_state` draws them anew on resume, one for each epoch that was begun."""
    assert source(RepeatSampler.__iter__).count("torch.randperm(") == 1
    sampler = RepeatSampler(list(range(6)), mini_repeat_count=1, batch_size=2, repeat_count=1, shuffle=True, seed=3)
    first, second = list(sampler), list(sampler)
    generator = torch.Generator().manual_seed(3)
    assert first == torch.randperm(6, generator=generator).tolist()
    assert second == torch.randperm(6, generator=generator).tolist()


def test_the_batch_has_the_reference_s_scores_under_this_name():
    assert 'output["ref_per_token_logps"] = ref_per_token_logps' in source(GRPOTrainer._generate_and_score_completions)
    assert 'inputs["ref_per_token_logps"]' in source(GRPOTrainer._compute_loss)


def test_tensorboard_writes_through_this_class_to_this_folder():
    callback = TensorBoardCallback()
    assert inspect.isclass(callback._SummaryWriter) and callback.tb_writer is None and callback.logging_dir is None
    assert "purge_step" in parameters(callback._SummaryWriter.__init__)


def test_old_checkpoints_are_deleted_by_a_function_of_its_own():
    from transformers.trainer_utils import rotate_checkpoints

    assert parameters(rotate_checkpoints)[:4] == [
        *("output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime")
    ]


def test_the_arguments_are_pickled_whole():
    assert "torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))" in source(Trainer._save)


def test_rloo_differs_from_grpo_where_trainer_bases_says_so():
    assert "return completion_ids\n" in source(RLOOTrainer._generate_single_turn)
    assert "return prompt_ids, completion_ids, completions" in source(RLOOTrainer._generate)
    scored = source(RLOOTrainer._generate_and_score_completions)
    first = scored.index("self._get_per_token_logps_and_entropies(")
    assert "old_per_token_logps, _, _ = " in scored[first - 60 : first], "the first pass is of the policy that drew"
    assert '"old_logps": old_logps' in scored and '"old_per_token_logps"' not in scored
    assert "shuffle_sequence_dict(generation_batch)" in source(RLOOTrainer._prepare_inputs)
