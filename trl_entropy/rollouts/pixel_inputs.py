"""`PixelInputs`: what a model that sees is called with beside token ids, row by row."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid

# Keys of TRL's batch that stand for images: their first axis counts images, patches, tiles or rows.
IMAGE_KEYS = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "image_position_ids",
)  # fmt: skip
# Keys that say of what kind each column's token is: as wide as the token ids.
COLUMN_KEYS = ("token_type_ids", "mm_token_type_ids")
# What TRL's batch has of images beside these.
COUNT_KEYS = ("num_images", "num_tiles")


@dataclass(frozen=True)
class PixelInputs:
    """
    The images of B rows, which may have several or none each.

    Attributes:
        rows: by row, the tensors that the model takes by keyword; concatenated along their first axis they are those
            of all rows.
    """

    rows: tuple[Mapping[str, Tensor], ...]

    @classmethod
    def of(cls, batch: Mapping[str, Any], num_rows: int) -> PixelInputs | None:
        """
        The images of TRL's batch; None if it has none.

        Written against trl 1.16, whose `split_pixel_values_by_grid` knows how many rows of each tensor an image has.

        Raises:
            ValueError: if the tensors cannot be told apart by row.
        """
        if batch.get("pixel_values") is None:
            return None
        split: dict[str, Any] = {**split_pixel_values_by_grid(dict(batch))}
        if isinstance(split.get("image_sizes"), Tensor) and "num_images" in split:
            split["image_sizes"] = list(split["image_sizes"].split(split["num_images"]))
        found = {name: split[name] for name in IMAGE_KEYS if split.get(name) is not None}
        if odd := {name: len(values) for name, values in found.items() if len(values) != num_rows}:
            raise ValueError(f"images of {num_rows} rows cannot be told apart: {odd}. Use text alone.")
        return cls(tuple({name: _of_row(values, row) for name, values in found.items()} for row in range(num_rows)))

    def chosen(self, index: Any) -> PixelInputs:
        """Those of the rows that `index` selects, in its order."""
        numbers = torch.arange(len(self.rows))[index.cpu() if isinstance(index, Tensor) else index]
        return PixelInputs(tuple(self.rows[number] for number in numbers.tolist()))

    def keywords(self) -> dict[str, Tensor]:
        """What the model takes for these rows together; nothing if none of them has an image."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        joined = {name: torch.cat([row[name] for row in self.rows if name in row]) for name in names}
        return joined if joined and joined["pixel_values"].numel() else {}

    @staticmethod
    def joined(parts: Sequence[PixelInputs | None], sizes: Sequence[int]) -> PixelInputs | None:
        """The rows of all parts, of these numbers of rows each; None if no part has images."""
        if all(part is None for part in parts):
            return None
        rows = [({},) * size if part is None else part.rows for part, size in zip(parts, sizes, strict=True)]
        return PixelInputs(tuple(itertools.chain.from_iterable(rows)))


def _of_row(values: Tensor | list[Tensor], row: int) -> Tensor:
    return values[row : row + 1] if isinstance(values, Tensor) else values[row]


def keywords_of_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What TRL's scoring takes of a batch beside token ids and masks."""
    return {name: batch[name] for name in (*IMAGE_KEYS, *COLUMN_KEYS, *COUNT_KEYS) if batch.get(name) is not None}
