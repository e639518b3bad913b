import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_entropy.models.embedded import END_TOKEN, PAD_TOKEN, build_model, build_tokenizer
from trl_entropy.tasks.r1_template import R1_INSTRUCTION, R1_TAGS
from trl_entropy.tasks.word_problems import LEAD_WORDS, load_demonstrations, load_word_problems

REAL = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
NFC = normalizers.NFC()  # the tokenizer's own: Python's unicodedata may know another Unicode version
TEXTS = st.lists(st.text() | st.sampled_from([*R1_TAGS, R1_INSTRUCTION, END_TOKEN, PAD_TOKEN, "e\u0301", "\r\n "]))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """Model and tokenizer in one directory, where `model_type: qwen2` decides how the tokenizer is loaded."""
    directory = tmp_path_factory.mktemp("embedded")
    tokenizer.save_pretrained(directory)
    build_model(tokenizer, seed=3).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reloaded(saved):
    return AutoTokenizer.from_pretrained(saved)


@settings(max_examples=300, deadline=None)
@given(parts=TEXTS)
def test_any_text_survives_encoding_and_reloading(tokenizer, reloaded, parts):
    text = "".join(parts)
    ids = tokenizer(text)["input_ids"]
    assert reloaded(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == reloaded.decode(ids) == NFC.normalize_str(text)


def test_gsm8k_survives_encoding_and_reloading(tokenizer, reloaded):
    if not REAL.is_file():
        pytest.skip("the GSM8K files are not beside this checkout")
    texts = [text for line in REAL.open(encoding="utf-8") for text in json.loads(line).values()]
    ids = tokenizer(texts)["input_ids"]
    assert reloaded(texts)["input_ids"] == ids
    assert tokenizer.batch_decode(ids) == list(map(NFC.normalize_str, texts))


def test_another_process_builds_the_same():
    code = "from trl_entropy.models.embedded import build_tokenizer as b; print(b().backend_tokenizer.to_str())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == build_tokenizer().backend_tokenizer.to_str()  # a used one keeps how it padded


def test_special_ids_and_padding(tokenizer, reloaded):
    for each in (tokenizer, reloaded):
        assert (each.pad_token_id, each.eos_token_id, each.padding_side) == (0, 1, "left")
        assert set(each.all_special_ids) == {0, 1}
        assert each(["1", "23"], padding=True)["input_ids"][0][0] == 0


def test_tags_are_single_tokens_that_decoding_keeps(reloaded):
    for text in (*R1_TAGS, R1_INSTRUCTION):
        ids = reloaded(text)["input_ids"]
        assert len(ids) == 1
        assert reloaded.decode(ids, skip_special_tokens=True) == text


def test_the_words_of_the_task_are_single_tokens(tokenizer):
    demonstrations = load_demonstrations(500)
    texts = [row["prompt"] + row["completion"] for row in demonstrations]
    words = {word for text in texts for word in text.split(R1_INSTRUCTION)[1].split() if word.isalpha()}
    assert set(LEAD_WORDS) < words
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in words)
    completion_ids = tokenizer(demonstrations["completion"][:])["input_ids"]
    assert max(map(len, completion_ids)) < 32, "a completion and its end token must fit into 32 tokens"


def test_model(tokenizer, saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.num_parameters() == 459_904
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.model_type == "qwen2"
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (0, 1)
    inputs = tokenizer(load_word_problems("test", 2)["prompt"][:], return_tensors="pt", padding=True)
    assert model(**inputs).logits.shape == (2, inputs["input_ids"].shape[1], 512)


def test_seed_decides_the_weights_and_the_callers_random_state_stays(tokenizer):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, again, other = (build_model(tokenizer, seed).model.embed_tokens.weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_foreign_tokenizer_is_refused(tokenizer):
    foreign = build_tokenizer()
    foreign.add_tokens([f"word{i}" for i in range(200)])
    with pytest.raises(ValueError, match="512 token embeddings"):
        build_model(foreign)
