"""The model card of a checkpoint: which paper the method is from, and which model it started from."""

from __future__ import annotations

import textwrap
from pathlib import Path

from trl_entropy.runs.secrets import masked_text

PAPER = {
    "title": "Understanding R1-Zero-Like Training: A Critical Perspective",
    "id": "2503.20783",
    "citation": textwrap.dedent("""\
        @article{liu2025understanding,
            title        = {{Understanding R1-Zero-Like Training: A Critical Perspective}},
            author       = {Zichen Liu and Changyu Chen and Wenjun Li and Penghui Qi and Tianyu Pang and Chao Du and Wee Sun Lee and Min Lin},
            year         = 2025,
            eprint       = {arXiv:2503.20783},
        }"""),  # noqa: E501
}
_NO_BASE_MODEL, _NO_MODEL = "[None](https://huggingface.co/None)", 'model="None"'


def correct(card: Path, model_name_or_path: str | None) -> None:
    """
    Where TRL's card has None for a model that is not on the hub, say its folder; mask secrets in what it took over.

    Args:
        card: the file that TRL wrote.
        model_name_or_path: of the model as it was loaded.
    """
    name = f"the local model `{Path(model_name_or_path).name}`" if model_name_or_path else "a model built in code"
    text = card.read_text(encoding="utf-8").replace(_NO_BASE_MODEL, name)
    card.write_text(masked_text(text.replace(_NO_MODEL, f'model="{card.parent.name}"')), encoding="utf-8")
