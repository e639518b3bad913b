"""The random policy that the tests over ranks train, on disk."""

import pytest

from trl_entropy.models.embedded import build_model, build_tokenizer


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=3).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
