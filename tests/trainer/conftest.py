"""A tiny random policy, a tiny dataset, and trainers on both."""

from pathlib import Path

import pytest
from datasets import Dataset

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.models.embedded import build_model, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory, tokenizer) -> str:
    """A random policy on disk, so that TRL can load its reference from the same place."""
    path = tmp_path_factory.mktemp("random_policy")
    build_model(tokenizer, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def problems() -> Dataset:
    names = ("Ann", "Ben", "Cem", "Dia", "Eva", "Fay", "Gus", "Hal")
    return Dataset.from_dict({"prompt": [f"{name} has {i} apples." for i, name in enumerate(names)]})


def odd_token_reward(completion_ids, **kwargs) -> list[float]:
    """Share of odd token ids: deterministic, and different within nearly every group."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def make_trainer(model_path, problems, tokenizer, tmp_path):
    """Builds a trainer: 4 completions a prompt, 12 tokens at most, 16 completions a micro-batch."""

    def make(trainer_class=DrGRPOTrainer, config_class=DrGRPOConfig, callbacks=None, dataset=problems, **settings):
        trainer_settings = {
            k: settings.pop(k)
            for k in (
                "model",
                "peft_config",
                "reward_funcs",
                "eval_dataset",
                "rollout_func",
                "metric_funcs",
                "optimizers",
            )
            if k in settings
        }
        defaults = {
            "output_dir": str(tmp_path / f"run-{len(list(Path(tmp_path).iterdir()))}"),
            "num_generations": 4,
            "per_device_train_batch_size": 16,
            "max_completion_length": 12,
            "learning_rate": 1e-3,
            "max_steps": 2,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return trainer_class(
            model=trainer_settings.pop("model", model_path),
            reward_funcs=trainer_settings.pop("reward_funcs", odd_token_reward),
            args=config_class(**(defaults | settings)),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            **trainer_settings,
        )

    return make
