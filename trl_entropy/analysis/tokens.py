"""Tables of tokens: of a probe file, of those drawn where the entropy is high, of one completion. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from trl_entropy.runs.strict_json import Json

_MASKS = ("completion_mask", "loss_mask")


def own_tokens(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """
    True for the completion tokens of a probe file that the policy drew: neither padding nor, where the file has a
    `loss_mask`, a token of a tool or an environment. Shape (B, T).
    """
    return arrays.get("loss_mask", arrays["completion_mask"]).astype(bool)


def token_table(arrays: Mapping[str, np.ndarray], context: bool = False) -> pd.DataFrame:
    """
    The completion tokens of a probe file that the policy drew, a row for each; every (B, T) array becomes a column.

    Args:
        context: also the tokens of tools and environments, which a column `own` marks with False; what the policy's
            tokens alone have is nan there.
    """
    own = own_tokens(arrays)
    mask: np.ndarray = arrays["completion_mask"].astype(bool) if context else own
    rows, positions = np.nonzero(mask)
    width = mask.shape[1]
    columns = {
        "row": rows,
        "prompt_index": arrays["prompt_index"][rows],
        "position": positions,
        "token_id": arrays["input_ids"][:, -width:][mask],
    }
    if context:
        columns["own"] = own[mask]
    columns |= {
        name: np.where(own, array, np.nan)[mask] if context else array[mask]
        for name, array in arrays.items()
        if array.shape == mask.shape and name not in _MASKS
    }
    return pd.DataFrame(columns)


def turns_of(own: np.ndarray) -> np.ndarray:
    """The turn, from 0, of each of the policy's tokens in [`own_tokens`]; other entries say nothing."""
    begins = own & ~np.pad(own, ((0, 0), (1, 0)))[:, :-1]
    return begins.cumsum(axis=1) - 1


def high_entropy_tokens(
    tokens: pd.DataFrame, column: str = "entropy", quantile: float = 0.8, min_count: int = 5
) -> pd.DataFrame:
    """
    Which tokens are drawn from distributions of high entropy.

    Args:
        tokens: a row for each token: `Run.evaluation_tokens`, or `Run.tokens` with `column="entropy_before"`.
        column: the column of the entropy, in nats.
        quantile: entropies above this quantile count as high.
        min_count: tokens that were drawn less often are left out.

    Returns:
        By `token`, the largest share first: `count`; `entropy_mean` in nats; `high_fraction`, the fraction of its
        draws with high entropy; `share_of_entropy`, its part of the entropy summed over all tokens.
    """
    high = tokens[column] > tokens[column].quantile(quantile)
    groups = tokens.assign(high=high).groupby("token", sort=False)
    table = groups.agg(count=(column, "size"), entropy_mean=(column, "mean"), high_fraction=("high", "mean"))
    table["share_of_entropy"] = table["count"] * table["entropy_mean"] / tokens[column].sum()
    return table[table["count"] >= min_count].sort_values("share_of_entropy", ascending=False)


def first_completion(tokens: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first sample on the first prompt of `Run.evaluation_tokens`; none if there is none."""
    first = tokens[["step", "prompt_id"]].drop_duplicates().head(1).merge(tokens, on=["step", "prompt_id"])
    return first[first["sample"] == first["sample"].min()]


def token_dump(tokens: pd.DataFrame, columns: Sequence[str] = ("entropy", "surprisal"), width: int = 30) -> str:
    """
    One completion as text, a line for each token: position, token, numbers in nats, and a bar for the first number.

    Args:
        tokens: the rows of one completion, in order.
        columns: the numbers to print.
        width: length of the longest bar in characters.
    """
    largest = tokens[columns[0]].max() or 1.0
    heads = "  ".join(f"{column:>14}" for column in columns)
    lines = [f"{'position':>8}  {'token':<16}  {heads}"]
    for row in tokens.to_dict("records"):
        numbers = "  ".join(f"{row[column]:>14.4f}" for column in columns)
        bar = "█" * round(width * row[columns[0]] / largest)
        lines.append(f"{row['position']:>8}  {row['token']!r:<16}  {numbers}  {bar}")
    return "\n".join(lines)


def ends_of(config: Json, ids: np.ndarray, mask: np.ndarray, own: np.ndarray) -> list[str]:
    """
    How each completion ends: "masked" without a token that counts, "ended" at an end token, "truncated" at the largest
    length without one, "stopped" otherwise (at an answer, or by an environment).
    """
    eos = config.get("model_config", {}).get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [eos]
    lengths, most = mask.sum(axis=1), config.get("max_completion_length")
    last = np.where(lengths, ids[np.arange(len(ids)), np.maximum(lengths - 1, 0)], -1)
    found = np.where(np.isin(last, [token for token in eos_ids if token is not None]), "ended", "stopped")
    found = np.where((found == "stopped") & (lengths == (most or -1)), "truncated", found)
    return np.where(own.any(axis=1), found, "masked").tolist()
