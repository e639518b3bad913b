"""A model from a GGUF file can be saved and trained; what cannot be unpacked is refused before anything is loaded."""

import pytest
import torch
from transformers import AutoModelForCausalLM
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


@pytest.mark.parametrize("content", [b"GGUF\x03\x00\x00\x00", b"", b"no model"])
def test_a_file_that_is_cut_is_named_in_one_line(tmp_path, content):
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=f"^Error: {file} cannot be converted") as end:
        main([str(file), str(tmp_path / "new")])
    assert "\n" not in str(end.value) and not (tmp_path / "new").exists()


def test_without_the_package_gguf(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs the package gguf: pip install"):
        main([str(tmp_path / "model.gguf"), str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
