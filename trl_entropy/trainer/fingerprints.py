"""What tells two runs apart beside their settings: the data, the model, and the adapter that is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from datasets.features.features import require_decoding
from torch import nn

from trl_entropy.engine import parameter_shape
from trl_entropy.runs.checkpoints import fingerprint

_BATCH = 1000
# Of a `PeftConfig`: where the base model lies, and what peft itself sets.
_NOT_TRAINING = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")


def data_fingerprint(dataset: Any) -> str:
    """A hash of all columns in the order of the rows, of images the column's name only; of a stream nothing."""
    return fingerprint(_rows(dataset))


def model_fingerprint(model: nn.Module) -> str:
    """A hash of the parameters' names and shapes, and of which are trained."""
    return fingerprint(f"{name} {list(parameter_shape(p))} {p.requires_grad}" for name, p in model.named_parameters())


def adapter_settings(model: nn.Module) -> dict[str, object]:
    """The settings of the model's peft adapters that change training, as JSON has them: `adapter/lora_alpha`, ..."""
    settings: dict[str, object] = {}
    for name, config in getattr(model, "peft_config", {}).items():
        prefix = "adapter" if name == "default" else f"adapter {name}"
        for field, value in config.to_dict().items():
            if field not in _NOT_TRAINING:
                settings[f"{prefix}/{field}"] = sorted(value) if isinstance(value, set) else value
    return json.loads(json.dumps(settings, default=str))


def _rows(dataset: Any) -> Iterator[str]:
    if isinstance(dataset, Dataset):
        yield from dataset.column_names
        read = [name for name, feature in dataset.features.items() if not require_decoding(feature)]
        for batch in dataset.select_columns(read).with_format(None).iter(_BATCH):
            yield json.dumps(batch, sort_keys=True, default=lambda value: type(value).__name__)
