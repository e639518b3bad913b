"""A model from a GGUF file can be saved and trained; what cannot be unpacked is refused before anything is loaded."""

import random

import numpy as np
import pytest
import torch
from fuzz.mutations import mutated_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from trl_entropy.convert_gguf import main, without_quantization
from trl_entropy.models.embedded import build_model, build_tokenizer


def test_what_was_read_from_gguf_can_be_saved_and_is_the_same(tmp_path):
    read = build_model(build_tokenizer(), seed=0).eval()
    read.config.quantization_config = GgufConfig(gguf_file="model.gguf")  # as transformers leaves it
    read.generation_config.max_length = 77
    plain = without_quantization(read)
    plain.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(saved.config, "quantization_config") and saved.generation_config.max_length == 77
    ids = torch.arange(5, 25)[None]
    assert torch.equal(read(ids).logits, saved(ids).logits)
    saved(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in saved.parameters())


def test_refusals(tmp_path):
    file = tmp_path / "model.gguf"
    with pytest.raises(SystemExit, match="there is no file"):
        main([str(file), str(tmp_path / "new")])
    file.touch()
    with pytest.raises(SystemExit, match="exists already; remove it or name another folder"):
        main([str(file), str(tmp_path)])


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    """A file of the format with two settings and one tensor."""
    gguf = pytest.importorskip("gguf", reason="transformers reads GGUF with the package gguf")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_name("a model")
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path.read_bytes()


def refused(tmp_path, content):
    file, folder = tmp_path / "model.gguf", tmp_path / "new"
    file.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        main([str(file), str(folder)])
    line = str(end.value)
    assert line.startswith(f"Error: {file} cannot be converted to {folder}: ") and "\n" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("content", [b"GGUF\x03\x00\x00\x00", b"", b"no model"])
def test_what_is_no_file_of_the_format_is_named_in_one_line(tmp_path, content):
    pytest.importorskip("gguf", reason="transformers reads GGUF with the package gguf")
    refused(tmp_path, content)


def test_a_file_that_is_cut_or_damaged_is_named_in_one_line(tmp_path, whole_file):
    rng = random.Random(0)
    for _ in range(8):
        refused(tmp_path, mutated_bytes(whole_file, rng))


def test_nothing_is_left_of_a_conversion_that_failed_at_its_end(tmp_path, monkeypatch):
    """A folder that is left would be trained on by the next run."""
    pytest.importorskip("gguf", reason="transformers reads GGUF with the package gguf")
    (tmp_path / "model.gguf").touch()
    tokenizer = build_tokenizer()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: build_model(tokenizer, seed=0))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name="", **_: other if name else tokenizer)
    other = build_tokenizer()
    other.add_tokens(["apple"])
    monkeypatch.setattr("trl_entropy.convert_gguf._TEXTS", ["an apple"])
    with pytest.raises(SystemExit, match="differently once it is saved"):
        main([str(tmp_path / "model.gguf"), str(tmp_path / "new")])
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_without_the_package_gguf(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs the package gguf: pip install"):
        main([str(tmp_path / "model.gguf"), str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
