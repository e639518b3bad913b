"""A random policy of the embedded architecture, and settings that draw little from it."""

import pytest
from small_evaluation import CONFIG

from trl_entropy.evaluation.plan import PROFILES, settings_of
from trl_entropy.models.embedded import build_model, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def policy(tokenizer):
    return build_model(tokenizer, seed=0).eval()


@pytest.fixture
def settings():
    return settings_of(CONFIG, PROFILES["quick"], num_samples=4)
