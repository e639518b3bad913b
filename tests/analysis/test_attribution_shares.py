"""Shares from a run's files are those that training logged; tokens stand in their sentences; nothing is lost."""

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from trl_entropy.analysis.attribution import (
    BY,
    SHARE_MARGIN,
    attributed_steps,
    attribution_table,
    categories,
    most_moving_tokens,
    outcome_text,
    prices,
    ranked_prompts,
    shares,
)
from trl_entropy.analysis.run import load_run
from trl_entropy.runs.change_metrics import OUTCOMES_BY_PROBABILITY


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


def test_parts_are_those_that_training_logged(real_run, tokens):
    """The record of the probe: torch, online, over ranks; here: pandas, afterwards, from files."""
    last = load_run(real_run).steps.iloc[-1]
    table = shares(tokens, categories(tokens, "outcome_probability"))
    assert table.index.tolist() == list(OUTCOMES_BY_PROBABILITY)
    for name, row in table.iterrows():
        keys = {"change": f"mean_delta_{name}", "token_share": f"token_share_{name}"}
        keys |= {f"change_{end}": f"mean_delta_{name}_{end}" for end in ("low", "high")}
        for column, key in keys.items():
            assert row[column] == pytest.approx(last[f"entropy/{key}"], rel=1e-3, abs=1e-9), key
    attributed = tokens[tokens["advantage"] != 0]
    assert table["change"].sum() == pytest.approx(attributed["attribution"].sum() / 3)
    assert table["change"].sum() == pytest.approx(last["entropy/mean_delta_all"], rel=1e-3)
    half_width = last["entropy/mean_delta_all_high"] - last["entropy/mean_delta_all"]
    assert table["share"].notna().all() == (abs(last["entropy/mean_delta_all"]) > SHARE_MARGIN * half_width)


@pytest.mark.parametrize("spread_of_a_step", [0.3, 3.0])
def test_interval_is_the_estimators_where_the_share_is_known(spread_of_a_step):
    """Planted share 0.4: the intervals of `CategoryRecord` on the same sums, also where one step varies the most."""
    import torch

    from trl_entropy.estimators.attribution.shares import CategoryRecord

    generator, record, rows = np.random.default_rng(0), CategoryRecord.empty(["a", "b"]), []
    for step in range(5):
        sums = generator.normal([0.4, 0.6], 0.3 if step else spread_of_a_step, (30, 2))
        record = record.update(torch.tensor(sums), torch.tensor([30, 30]))
        rows += [
            {"step": step, "prompt_index": prompt, "attribution": sums[prompt, i], "kind": kind}
            for prompt in range(30) for i, kind in enumerate("ab")
        ]  # fmt: skip
    table = pd.DataFrame(rows)
    row = shares(table, table["kind"].astype("category")).loc["a"]
    assert row["share"] == pytest.approx(record.share("a").value) == pytest.approx(0.4, abs=0.2)
    assert (row["low"], row["high"]) == pytest.approx(record.share_interval("a"), rel=1e-8)
    assert (row["change_low"], row["change_high"]) == pytest.approx(record.change("a").interval(), rel=1e-8)
    assert row["change"] == pytest.approx(record.change("a").value) and row["token_share"] == 0.5


def test_prices_are_those_that_training_logs():
    """Planted 0.5 nats per token lost for a unit of reward by category a: the numbers of `PriceRecord`."""
    import torch

    from trl_entropy.probes.prices import PriceRecord

    generator, record, rows = np.random.default_rng(0), PriceRecord(["a", "b"]), []
    for step in range(5):
        earned = generator.normal([0.4, 0.6], 0.2, (30, 2))
        change = -0.5 * earned + generator.normal(0.0, 0.02, (30, 2))
        logged = record.add(torch.tensor(change), torch.tensor(earned), torch.tensor([30, 30]))
        rows += [
            {"step": step, "prompt_index": prompt, "attribution": change[prompt, i],
             "attribution_reward": earned[prompt, i], "kind": kind}
            for prompt in range(30) for i, kind in enumerate("ab")
        ]  # fmt: skip
    table = pd.DataFrame(rows)
    found = prices(table, table["kind"].astype("category"))
    assert list(found.index) == ["a", "b", "all"]
    for name, row in found.iterrows():
        assert row["price"] == pytest.approx(logged[f"reward/price_{name}"]) == pytest.approx(0.5, abs=0.02)
        ends = [logged[f"reward/price_{name}_{end}"] for end in ("low", "high")]
        assert (row["low"], row["high"]) == pytest.approx(ends, rel=1e-8)
        ends = [logged[f"reward/mean_delta_{name}_{end}"] for end in ("low", "high")]
        assert (row["earned_low"], row["earned_high"]) == pytest.approx(ends, rel=1e-8)
    again = PriceRecord(["a", "b"])
    again.load_state_dict(record.state_dict())
    more = [torch.ones(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64), torch.tensor([3, 3])]
    assert again.add(*more) == record.add(*more)


OF_EVERY_RUN = [name for name in BY if not name.startswith("outcome") and name not in ("turn", "kind")]


@pytest.mark.parametrize("by", OF_EVERY_RUN)
def test_bins_hold_every_token(tokens, by):
    category = categories(tokens, by)
    assert category.notna().all()
    table = shares(tokens, category)
    assert table["change"].sum() == pytest.approx(tokens["attribution"].sum() / 3)
    assert table["token_share"].sum() == pytest.approx(1)
    lowest = tokens.groupby(category, observed=True)[by].min()
    assert lowest.is_monotonic_increasing


def test_turns_and_kinds_are_those_that_occur_in_their_order(tokens):
    with pytest.raises(ValueError, match="by is 'turn': use one of"):
        categories(tokens, "turn")
    rows = pd.DataFrame({"turn": ["turn_later", "turn_1", "turn_1"], "kind": ["kind_call", "kind_prose", None]})
    assert list(categories(rows, "turn").cat.categories) == ["turn_1", "turn_later"]
    kinds = categories(rows, "kind")
    assert list(kinds.cat.categories) == ["kind_prose", "kind_call"] and kinds.isna().tolist() == [False, False, True]
    assert outcome_text("turn_later") == "later turns" and outcome_text("kind_call") == "calls of tools"


def test_a_category_of_ones_own(tokens):
    rare_and_wrong = (tokens["advantage"] < 0) & (tokens["probability"] < 0.1)
    given = tokens["advantage"] != 0
    mine = shares(tokens, rare_and_wrong.astype("category").where(given))
    table = shares(tokens, categories(tokens, "outcome_probability"))
    columns = ["change", "change_low", "change_high", "token_share"]
    assert mine.loc[True, columns].tolist() == pytest.approx(table.loc["incorrect_rare", columns].tolist())


def planted(*changes, num_steps=5, num_prompts=30, spread=0.3):
    """A table of contributions by kind "a", "b", ..., with exactly these means over the prompts of all steps."""
    sums = np.random.default_rng(0).normal(0, spread, (num_steps, num_prompts, len(changes)))
    sums += np.array(changes) - sums.mean((0, 1))
    rows = [
        {"step": step, "prompt_index": prompt, "attribution": sums[step, prompt, i], "kind": "abc"[i]}
        for step in range(num_steps) for prompt in range(num_prompts) for i in range(len(changes))
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    return table, table["kind"].astype("category")


def test_no_shares_where_parts_cancel_and_the_parts_stay():
    """A sum within twice its interval's half width: 150 prompts of spread 0.3 * sqrt(2), t = 1.976, about 0.068."""
    table = shares(*planted(0.5, -0.5))
    assert table[["share", "low", "high"]].isna().all(axis=None)
    assert table["change"].to_numpy() == pytest.approx([15, -15])
    assert np.isfinite(table[["change", "change_low", "change_high"]]).all(axis=None)
    assert table["change_high"]["a"] - table["change"]["a"] == pytest.approx(1.976 * 0.3 * 150**0.5 / 5, rel=0.15)
    for sum_of_both, has_shares in ((0.1, False), (0.17, True)):  # the limit is about 2 * 0.068
        table = shares(*planted(0.5, sum_of_both - 0.5))
        assert table["share"].notna().all() == np.isfinite(table[["low", "high"]]).all(axis=None) == has_shares


def test_a_contribution_that_is_nan_makes_its_category_nan_and_no_other():
    table, kind = planted(0.4, 0.6)
    table.loc[0, "attribution"] = np.nan
    found = shares(table, kind)["change"]
    assert np.isnan(found["a"]) and found["b"] == pytest.approx(18, abs=1)
    assert shares(table, kind)["share"].isna().all()


@pytest.mark.parametrize("values, expected", [
    (range(1017, 1025), ["1017 to 1019", "1019 to 1020", "1020 to 1022", "1022 to 1024"]),
    ([0, 0, 0], ["0"]),
    ([5.0, 5.0, 5.0, 6.0], ["5 to 5.25", "5.25 to 6"]),
    ([1e-9, 2e-9, 1e9, 2e9],
     ["1e-09 to 1.75e-09", "1.75e-09 to 5e+08", "5e+08 to 1.25e+09", "1.25e+09 to 2e+09"]),
])  # fmt: skip
def test_bins_of_any_values_have_names_of_their_own(values, expected):
    values = pd.Series(list(values), dtype=float)
    category = categories(pd.DataFrame({"length": values}), "length")
    assert list(category.cat.categories) == expected and category.notna().all()


REWARDS = [-0.5, 0.0, 0.3, 1.0, 1.7, 2.5]


def of_rewards(*rewards):
    return pd.DataFrame({
        "step": 1, "prompt_index": range(len(rewards)), "attribution": 1.0, "reward": rewards, "pass_rate": rewards,
        "advantage": [reward - 0.5 for reward in rewards], "probability": 0.05,
    })  # fmt: skip


def test_bins_of_mean_rewards_lose_no_prompt():
    category = categories(of_rewards(*REWARDS), "pass_rate")
    assert category.notna().all() and shares(of_rewards(*REWARDS), category)["change"].sum() == len(REWARDS)
    binary = categories(of_rewards(0.0, 1.0), "pass_rate")
    assert binary.tolist() == ["0 to 0.25", "0.75 to 1"]


def test_values_beyond_given_edges_have_bins_of_their_own():
    category = categories(of_rewards(*REWARDS), "pass_rate", (0.0, 0.5, 1.0))
    assert category.tolist() == ["below 0", "0 to 0.5", "0 to 0.5", "0.5 to 1", "above 1", "above 1"]


def test_only_rewards_of_0_and_1_say_which_answers_are_right():
    right_and_wrong = categories(of_rewards(0.0, 1.0), "outcome_probability")
    assert right_and_wrong.tolist() == ["incorrect_rare", "correct_rare"]
    relative = categories(of_rewards(0.231, 0.9), "outcome_probability")
    assert relative.tolist() == ["below_mean_rare", "above_mean_rare"]
    assert [outcome_text(name) for name in ("above_mean_rare", "below_mean", "correct_common", "0 to 0.25")] == [
        "above the group's mean, rare", "below the group's mean", "correct, common", "0 to 0.25"
    ]  # fmt: skip


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


def test_as_many_steps_as_can_be_read_at_once(real_run):
    run = load_run(real_run)
    counts = {step: len(attribution_table(run, [step])) for step in (1, 2, 3)}
    enough = sum(counts.values())
    assert attributed_steps(run, most_tokens=enough) == [1, 2, 3]
    assert attributed_steps(run, most_tokens=enough - 1) == [1, 3]
    assert attributed_steps(run, most_tokens=counts[1] + counts[3] - 1) == attributed_steps(run, most_tokens=1) == [3]
    assert attributed_steps(run, most=2) == [1, 3] and attributed_steps(run, most=1) == [3]


def test_no_steps_of_a_run_without_attribution(tmp_path):
    assert attributed_steps(load_run(tmp_path)) == []
