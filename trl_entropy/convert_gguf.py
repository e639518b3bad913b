"""
Convert a GGUF file to a folder that training can start from: `trl-entropy convert-gguf FILE FOLDER`.

transformers reads GGUF into plain weights, but still marks the model as quantized and refuses to save it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.durable import replacing
from trl_entropy.runs.file_errors import describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXTS = ("<think> 3+4=7 </think> <answer>7</answer>", "Ana has 12 eggs.\n\tHow many?  2*31-4", "é ß 漢字 \U0001f95a")


def convert_gguf(file: Path, folder: Path) -> None:
    """
    Write the model and the tokenizer of a GGUF file as `from_pretrained` takes them, in float32.

    Raises:
        ValueError: when there is no such file, the folder exists already, the package `gguf` is missing, or the saved
            tokenizer splits texts differently.
    """
    _check(file, folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    plain = without_quantization(AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(**where)
    with replacing(folder) as unfinished:
        plain.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        saved = AutoTokenizer.from_pretrained(str(unfinished))
        for text in _TEXTS:
            if saved(text)["input_ids"] != tokenizer(text)["input_ids"]:
                raise ValueError(f"the tokenizer splits {text!r} differently once it is saved, so nothing is kept")


def without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """A model with the same weights that is not marked as quantized, so that it can be saved and trained."""
    settings = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    plain = type(model)(type(model.config)(**settings))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _check(file: Path, folder: Path) -> None:
    import importlib.util

    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it or name another folder")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading GGUF needs the package gguf: pip install 'trl_entropy[gguf]' or pip install gguf")


def main(argv: list[str] | None = None) -> None:
    """Convert the file named on the command line."""
    parser = argparse.ArgumentParser(
        prog="trl-entropy convert-gguf",
        description="Convert a GGUF file to a folder that training can start from.",
    )
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="the folder to write")
    args = parser.parse_args(argv)
    quiet_libraries()
    try:
        convert_gguf(args.file, args.folder)
    except Exception as error:  # a file that is cut or damaged fails in every way
        logging.getLogger("trl_entropy").debug("%s", error, exc_info=True)
        sys.exit(f"Error: {args.file} cannot be converted to {args.folder}: {describe(error)}.")
    print(f"model and tokenizer are in {args.folder}")


if __name__ == "__main__":
    main()
