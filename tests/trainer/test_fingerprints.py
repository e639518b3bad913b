"""What tells two runs apart: equal for equal data and adapters in any process, different for every difference."""

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image

from trl_entropy.models.embedded import build_model
from trl_entropy.trainer.fingerprints import adapter_settings, data_fingerprint, model_fingerprint

ROWS = {"prompt": ["a", "b"], "answer": ["1", "2"]}


def test_gold_answers_and_order_count_and_the_object_does_not():
    same, other = Dataset.from_dict(ROWS), Dataset.from_dict(ROWS | {"answer": ["1", "3"]})
    assert data_fingerprint(Dataset.from_dict(ROWS)) == data_fingerprint(same.select([0, 1]))
    turned = same.select([1, 0])
    chat = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in "ab"], "answer": ["1", "2"]})
    assert len({data_fingerprint(dataset) for dataset in (same, other, turned, chat)}) == 4


def test_images_count_by_their_name_and_are_not_decoded(monkeypatch):
    monkeypatch.setattr("datasets.Image.decode_example", lambda *_, **__: pytest.fail("decoded"))
    images = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    pictured = [Dataset.from_dict(ROWS | {"image": images}) for _ in range(2)]
    assert data_fingerprint(pictured[0]) == data_fingerprint(pictured[1]) != data_fingerprint(Dataset.from_dict(ROWS))


def test_streamed_data_have_one_fingerprint():
    stream = Dataset.from_dict(ROWS).to_iterable_dataset()
    assert data_fingerprint(stream) == data_fingerprint(stream)


def test_adapters_differ_in_their_settings_and_not_in_their_weights(tokenizer):
    def adapted(**settings):
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM", **settings)
        return get_peft_model(build_model(tokenizer, seed=0), config)

    plain, louder = adapted(lora_alpha=8), adapted(lora_alpha=16)
    assert adapter_settings(plain) == adapter_settings(adapted(lora_alpha=8))
    differing = {name for name, value in adapter_settings(plain).items() if adapter_settings(louder)[name] != value}
    assert differing == {"adapter/lora_alpha"} and model_fingerprint(plain) == model_fingerprint(louder)
    assert adapter_settings(build_model(tokenizer, seed=0)) == {}
