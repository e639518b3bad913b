"""Shares from a run's files are those that training logged; tokens stand in their sentences; nothing is lost."""

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from trl_entropy.analysis.attribution import (
    BY,
    attribution_table,
    categories,
    most_moving_tokens,
    ranked_prompts,
    shares,
)
from trl_entropy.analysis.run import load_run
from trl_entropy.runs.metrics import OUTCOMES_BY_PROBABILITY


@pytest.fixture(scope="module")
def tokens(real_run):
    return attribution_table(load_run(real_run))


def test_every_token_is_there_once(real_run, tokens):
    for step in (1, 2, 3):
        file, rollouts = (
            load_file(real_run / "probes" / probe / f"step_{step:06d}.safetensors")
            for probe in ("attribution", "rollouts")
        )
        mine, mask = tokens[tokens["step"] == step], file["completion_mask"].astype(bool)
        assert len(mine) == mask.sum()
        assert mine["attribution"].sum() == pytest.approx(file["attribution"].sum())
        assert np.array_equal(mine["advantage"].to_numpy(), file["raw_advantages"][mine["row"]])
        assert np.array_equal(mine["length"].to_numpy(), mask.sum(1)[mine["row"]])
        assert np.allclose(np.log(mine["probability"]), file["logps"][mask], atol=1e-6)
        assert np.array_equal(mine["reward"].to_numpy(), rollouts["rewards"][mine["row"]])
    logged = load_run(real_run).steps["entropy/delta_gradient"]
    assert tokens.groupby("step")["attribution"].sum().to_numpy() == pytest.approx(logged.to_numpy())


def test_shares_are_those_that_training_logged(real_run, tokens):
    """The record of the probe: torch, online, over ranks; here: pandas, afterwards, from files."""
    last = load_run(real_run).steps.iloc[-1]
    table = shares(tokens, categories(tokens, "outcome_probability"))
    assert table.index.tolist() == list(OUTCOMES_BY_PROBABILITY)
    for name, row in table.iterrows():
        keys = {"share": f"share_{name}", "token_share": f"token_share_{name}"}
        keys |= {end: f"share_{name}_{end}" for end in ("low", "high")}
        for column, key in keys.items():
            assert row[column] == pytest.approx(last[f"entropy/{key}"], rel=1e-3), key
    attributed = tokens[tokens["advantage"] != 0]
    assert table["change"].sum() == pytest.approx(attributed["attribution"].sum() / 3)


def test_interval_is_the_estimators_where_the_share_is_known():
    """Planted share 0.4: the interval of `CategoryRecord` on the same sums, digit by digit."""
    import torch

    from trl_entropy.estimators.attribution.shares import CategoryRecord

    generator, record, rows = np.random.default_rng(0), CategoryRecord.empty(["a", "b"]), []
    for step in range(5):
        sums = generator.normal([0.4, 0.6], 0.3, (30, 2))
        record = record.update(torch.tensor(sums), torch.tensor([30, 30]))
        rows += [
            {"step": step, "prompt_index": prompt, "attribution": sums[prompt, i], "kind": kind}
            for prompt in range(30) for i, kind in enumerate("ab")
        ]  # fmt: skip
    table = pd.DataFrame(rows)
    row = shares(table, table["kind"].astype("category")).loc["a"]
    assert row["share"] == pytest.approx(record.share("a").value) == pytest.approx(0.4, abs=0.1)
    assert (row["low"], row["high"]) == pytest.approx(record.share_interval("a"), rel=1e-4)
    assert row["change"] == pytest.approx(record.change("a").value) and row["token_share"] == 0.5
    table["attribution"] -= table["attribution"].mean()  # no change as a whole: no share is refuted
    assert shares(table, table["kind"].astype("category")).loc["a", ["low", "high"]].tolist() == [-np.inf, np.inf]


@pytest.mark.parametrize("by", [name for name in BY if not name.startswith("outcome")])
def test_bins_hold_every_token(tokens, by):
    category = categories(tokens, by)
    assert category.notna().all()
    table = shares(tokens, category)
    assert table["share"].sum() == pytest.approx(1) and table["token_share"].sum() == pytest.approx(1)
    lowest = tokens.groupby(category, observed=True)[by].min()
    assert lowest.is_monotonic_increasing


def test_a_category_of_ones_own(tokens):
    rare_and_wrong = (tokens["advantage"] < 0) & (tokens["probability"] < 0.1)
    given = tokens["advantage"] != 0
    mine = shares(tokens[given], rare_and_wrong[given])
    table = shares(tokens, categories(tokens, "outcome_probability"))
    assert mine.loc[True, "share"] == pytest.approx(table.loc["incorrect_rare", "share"])


def test_most_moving_tokens_stand_in_their_sentences(tokens):
    table = most_moving_tokens(tokens, num=5, context=2)
    assert table["attribution"].abs().tolist() == sorted(tokens["attribution"].abs(), reverse=True)[:5]
    for row in table.to_dict("records"):
        words = tokens[(tokens["step"] == row["step"]) & (tokens["row"] == row["row"])]["token"].tolist()
        place = row["position"]
        expected = (
            "".join(words[max(0, place - 2) : place]) + f"[{words[place]}]" + "".join(words[place + 1 : place + 3])
        )
        assert row["text"].removeprefix("… ").removesuffix(" …") == expected
        assert row["text"].startswith("… ") == (place > 2)


def test_prompts_are_ranked_and_readable(real_run, tokens):
    run = load_run(real_run)
    table = ranked_prompts(run, tokens, num=100)
    assert len(table) == 12 and table["attribution"].abs().is_monotonic_decreasing
    assert table["attribution"].sum() == pytest.approx(tokens["attribution"].sum())
    step_2 = run.completions[run.completions["step"] == 2]["prompt"].map(lambda text: text.strip())
    assert set(table[table["step"] == 2]["prompt"].str.strip()) == set(step_2)


def test_what_the_table_has_not_is_refused(tokens):
    with pytest.raises(ValueError, match="use one of"):
        categories(tokens, "surprise")
    by_sequence = tokens.groupby(["step", "row", "prompt_index"], as_index=False)[["attribution", "advantage"]].sum()
    with pytest.raises(ValueError, match="'outcome'"):
        categories(by_sequence, "entropy")
    assert categories(by_sequence, "outcome").notna().any()


def test_a_run_without_attribution_has_an_empty_table(tmp_path):
    assert attribution_table(load_run(tmp_path)).empty
