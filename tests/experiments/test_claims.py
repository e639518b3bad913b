"""Every claim's measurement on planted runs in which the claim is right, and in which it is wrong."""

import itertools
import json
import math

import numpy as np
import pytest
from planted_runs import drawn, right_answers, write_metrics, write_step

from trl_entropy.analysis.run import load_run
from trl_entropy.config.command_line import parse
from trl_entropy.config.shipped import config_path
from trl_entropy.estimators.statistics.estimate import Estimate
from trl_entropy.experiments import claims
from trl_entropy.experiments.claims import command, families
from trl_entropy.experiments.claims.claim import Claim, Expected, correlation, of_each_run, over_runs
from trl_entropy.experiments.claims.listed import CLAIMS
from trl_entropy.experiments.claims.variance_proxy import proxy

STEPS, TOKENS = 12, 8
SEEDS = (0, 1, 2)


def noise_of_prompts(path, generator, right):
    share = (0.2 if right else 0.8) + 0.02 * generator.standard_normal()
    write_metrics(path, [{"noise_scale/between_prompt_share": share}] * 3)


def variance_proxy(path, generator, right):
    steps_with_files(path, generator)
    run = load_run(path)
    traces = [proxy(run, step)["proxy"] * (1 if right else -1) for step in range(1, STEPS + 1)]
    spread = float(np.std(traces))
    write_metrics(path, [{"noise_scale/grad_variance_trace": one + 0.1 * spread * generator.standard_normal()}
                         for one in traces])  # fmt: skip


def high_entropy(path, generator, right):
    def attribution(scores, rewards, advantages):
        rank = scores["entropy_before"].ravel().argsort().argsort().reshape(scores["entropy_before"].shape)
        top = rank >= 0.8 * rank.size
        return np.where(top if right else ~top, -1.0, -0.05)

    steps_with_files(path, generator, attribution=attribution)


def negative_and_late(path, generator, right):
    def attribution(scores, rewards, advantages):
        chosen = (advantages < 0)[:, None] & (np.arange(TOKENS) >= TOKENS / 2)
        other = (advantages > 0)[:, None] & (np.arange(TOKENS) < TOKENS / 2)
        return np.where(chosen if right else other, -1.0, -0.05)

    steps_with_files(path, generator, attribution=attribution)


def lowering(path, generator, right):
    """Completions of one token, each with the advantage at which its own change has the sign."""

    def advantages_of(scores):
        s = np.exp(scores["logps_before"]) * (scores["logps_before"] + scores["entropy_before"])
        return np.sign(s - scores["mean_discriminator_before"])[:, 0] * (1 if right else -1)

    def attribution(scores, rewards, advantages):
        return np.where(np.arange(len(advantages))[:, None] % 4 == 0, 1.0, -1.0) * (1 if right else -1)

    steps_with_files(path, generator, tokens=1, advantages_of=advantages_of, attribution=attribution)


def discriminator(path, generator, right):
    changes = []

    def attribution(scores, rewards, advantages):
        s = np.exp(scores["logps_before"]) * (scores["logps_before"] + scores["entropy_before"])
        changes.append(float((-advantages[:, None] * (s - scores["mean_discriminator_before"])).mean()))

    steps_with_files(path, generator, attribution=attribution, steps=30)
    sign = 1 if right else -1
    write_metrics(path, [{"entropy/delta_measured": sign * one, "entropy/delta_measured_stderr": 1e-9}
                         for one in changes])  # fmt: skip


def steer(path, generator, right):
    def change(scores, rewards, advantages):
        p = np.exp(scores["logps_before"])
        predicted = -advantages[:, None] * (1 - p) * p * (scores["logps_before"] + scores["entropy_before"])
        noise = predicted.std() * math.sqrt(1 / 0.4**2 - 1) * generator.standard_normal(predicted.shape)
        scores["entropy_after"] = scores["entropy_before"] + predicted + (noise if right else 0)

    steps_with_files(path, generator, attribution=change, steps=30, tokens=20)


def baselines(path, generator, right):
    """Each completion, reinforced, lowers the entropy; or raises it."""

    def attribution(scores, rewards, advantages):
        of_one = (-1.0 if right else 1.0) * (1 + 0.2 * generator.random(scores["logps_before"].shape))
        return advantages[:, None] * of_one

    steps_with_files(path, generator, attribution=attribution)


def information(path, generator, right):
    halved = {"first": 5 + int(generator.integers(3)), "second": 20}
    falls = dict(zip(("mutual_information/lower", "entropy/policy"),
                     halved.values() if right else reversed(halved.values()), strict=True))  # fmt: skip
    write_metrics(path, [{key: 1.0 if step < at else 0.4 for key, at in falls.items()} | {"reward": 0.1 * step}
                         for step in range(30)])  # fmt: skip


def end_points(path, generator, right):
    kind = path.name.split("-")[0]
    less = {"plain": 0.0, "bonus": -0.1 if right else 0.1, "covariance": 0.0 if right else -0.1}[kind]
    rows = [{"reward": 0.8 + less + 0.002 * generator.standard_normal(), "entropy/policy": 0.2}] * 20
    write_metrics(path, rows)


def law(path, generator, right):
    slow, rows = path.name.startswith("slow"), []
    for step, entropy in enumerate(np.linspace(0.5, 0.1, 40), start=1):
        mean = 1.5 - 0.8 * math.exp(entropy) + (0.1 if slow and not right else 0)
        groups = mean + 0.02 * generator.standard_normal(4)
        rows.append({"entropy/policy": entropy, "reward": float(groups.mean())})
        write_step(path, step, np.repeat(groups, 4), np.zeros(16))
    write_metrics(path, rows)


def phases(path, generator, right):
    for step, place in enumerate(np.linspace(0, 1, STEPS), start=1):
        late = place**4 if right else 0.5 - place**2 / 4
        cosines = np.full((16, 16), 0.05 + 0.5 * late) + 0.01 * generator.standard_normal((16, 16))
        np.fill_diagonal(cosines, 1)
        spread = 0.5 * (1 - place if right else place)
        rewards = 0.5 + spread * np.tile([-1, 1, -1, 1], 4) * (1 + 0.05 * generator.random())
        write_step(path, step, rewards, np.zeros(16), kernel=cosines)
    write_metrics(path, [{"reward": 0.5}] * STEPS)


def steps_with_files(path, generator, attribution=None, tokens=TOKENS, advantages_of=None, steps=STEPS):
    """A run whose steps have the scores of their tokens and what `attribution` makes of these."""
    for step in range(1, steps + 1):
        scores, (rewards, advantages) = drawn(generator, tokens), right_answers(generator)
        if advantages_of is not None:
            advantages = advantages_of(scores)
        parts = None if attribution is None else attribution(scores, rewards, advantages)
        write_step(path, step, rewards, advantages, scores, parts)
    write_metrics(path, [{"reward": 0.5}] * steps)


PLANTED = {
    "within_prompt_noise": noise_of_prompts, "variance_proxy": variance_proxy, "high_entropy_tokens": high_entropy,
    "negative_samples": negative_and_late, "lowering_outweighs": lowering, "discriminator_sign": discriminator,
    "token_correlation": steer, "two_sided_bounds": baselines, "information_first": information,
    "bonus_bias": end_points, "reward_law": law, "three_phases": phases,
}  # fmt: skip


def planted(folder, claim, right):
    """The runs that a claim reads, by family."""
    runs = {}
    for family, seed in itertools.product(claim.families, SEEDS):
        path = folder / f"{family}-seed{seed}"
        path.mkdir(parents=True)
        PLANTED[claim.name](path, np.random.default_rng([seed, len(family)]), right)
        runs.setdefault(family, []).append(load_run(path))
    return runs


def test_every_claim_is_planted():
    assert list(PLANTED) and set(PLANTED) == set(CLAIMS)


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("name", PLANTED)
def test_a_claim_holds_where_it_is_right_and_fails_where_it_is_wrong(tmp_path, name, right):
    finding = CLAIMS[name].judge(planted(tmp_path, CLAIMS[name], right))
    deciding = {key for key, one in CLAIMS[name].expected.items() if one.decides}
    assert finding.verdict == ("holds" if right else "fails"), finding.numbers
    assert deciding <= set(finding.numbers) <= set(CLAIMS[name].expected)
    if not right:  # not by one of its numbers alone
        verdicts = {key: CLAIMS[name].expected[key].verdict(*finding.numbers[key].interval()) for key in deciding}
        assert set(verdicts.values()) <= {"fails", "holds"} and "fails" in verdicts.values()


@pytest.mark.parametrize("name", [name for name in PLANTED if "probed" in CLAIMS[name].families])
def test_runs_without_the_files_say_nothing(tmp_path, name):
    """No number may come from what is not there."""
    runs = {}
    for family, seed in itertools.product(CLAIMS[name].families, SEEDS):
        path = tmp_path / f"{family}-seed{seed}"
        write_metrics(path, [{"reward": 0.5, "entropy/policy": 0.3}] * 3)
        runs.setdefault(family, []).append(load_run(path))
    assert CLAIMS[name].judge(runs).verdict == "cannot tell here"


def test_the_verdict_is_where_the_interval_is():
    claimed = Expected("x", above=0.3, below=0.5)
    cases = {(0.31, 0.49): "holds", (0.51, 0.6): "fails", (0.1, 0.2): "fails", (0.2, 0.4): "cannot tell here",
             (0.1, 0.9): "cannot tell here", (math.nan, math.nan): "cannot tell here"}  # fmt: skip
    assert {ends: claimed.verdict(*ends) for ends in cases} == cases
    assert not Expected("beside").decides


def test_one_wrong_number_is_enough_and_all_must_be_right():
    expected = {"a": Expected("a", above=0), "b": Expected("b", above=0), "beside": Expected("c")}
    claim = Claim("x", "y", "z", "w", expected, (), lambda runs: {})
    right, wrong, unclear = (Estimate(value, 0.1, 10, 11) for value in (1.0, -1.0, 0.0))
    for found, verdict in (
        ({"a": right, "b": right, "beside": wrong}, "holds"),
        ({"a": right, "b": wrong}, "fails"),
        ({"a": unclear, "b": wrong}, "fails"),
        ({"a": right, "b": unclear}, "cannot tell here"),
        ({"a": right}, "cannot tell here"),
        ({}, "cannot tell here"),
    ):
        assert claim.judged(found).verdict == verdict


def test_intervals_are_students_over_the_runs(tmp_path):
    found = over_runs([1.0, 2.0, 6.0, math.nan])
    assert (found.value, found.dof, found.num_samples) == (3.0, 2.0, 3)
    assert found.stderr == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3))
    assert math.isnan(over_runs([]).value) and math.isnan(over_runs([1.0]).stderr)
    for number in (1, 2, 6):
        (tmp_path / str(number)).mkdir()
    runs = [load_run(tmp_path / str(number)) for number in (1, 2, 6)]
    assert of_each_run(runs, lambda run: {"x": float(run.name)})["x"] == over_runs([1.0, 2.0, 6.0])
    x, y = np.random.default_rng(0).standard_normal((2, 9)).tolist()
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3])) and math.isnan(correlation([1, 2], [1, 2]))


def test_the_list_shows_everything_without_a_run(capsys):
    claims.main(["--list"])
    printed = capsys.readouterr().out
    for claim in CLAIMS.values():
        assert claim.statement in printed and claim.refuted_by in printed and claim.source in printed
    assert "trl-entropy train --config quickstart" in printed
    claims.main(["--list", "--claim", "reward_law"])
    assert "variance_proxy" not in capsys.readouterr().out
    claims.main(["--list", "--claim", "bonus_bias", "--steps", "20"])
    printed = capsys.readouterr().out
    assert "--max_steps 20" in printed and "--save_steps 10" in printed and "--max_steps 80" not in printed
    with pytest.raises(SystemExit):
        claims.main(["--list", "--steps", "3"])
    with pytest.raises(SystemExit, match="--runs FOLDER"):
        claims.main([])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_training_takes_every_command(name, tmp_path):
    """Settings that nothing reads, or that do not go together, are refused before anything is trained."""
    family = families.FAMILIES[name]
    commands = family.commands(10, tmp_path / "run")
    assert len(commands) == (1 if family.until is None else 2)
    for words in commands:
        _, args, _ = parse([config_path(word) if word == "quickstart" else word for word in words[1:]])
        assert args.seed == 10
    assert args.max_steps == family.num_steps


def test_the_command_judges_what_the_folder_has(tmp_path, capsys, monkeypatch):
    """Families of two seeds, of which one claim has all runs and the other has none."""
    short = {name: families.Family(name, one.purpose, one.settings, (0, 1), 3, 1.0)
             for name, one in families.FAMILIES.items()}  # fmt: skip
    monkeypatch.setattr(command, "FAMILIES", short)
    for seed in (0, 1):
        noise_of_prompts(tmp_path / f"probed-seed{seed}", np.random.default_rng(seed), right=True)
    names = ["within_prompt_noise", "bonus_bias"]
    claims.main(["--runs", str(tmp_path), "--claim", *names])
    printed = capsys.readouterr().out
    assert "| within_prompt_noise | OpenReview uK4kMpNx0W | **holds** |" in printed
    assert "**not measured**" in printed and "6 runs of these claims not trained yet, about 6 CPU minutes" in printed
    result = json.loads((tmp_path / "claims.json").read_text())
    assert list(result) == names and result["within_prompt_noise"]["numbers"]["within"]["verdict"] == "holds"
    assert result["bonus_bias"] | {"verdict": "not measured", "numbers": {}} == result["bonus_bias"]
    assert (tmp_path / "claims.png").stat().st_size > 5_000


def test_training_goes_on_with_what_is_missing_and_an_unfinished_run_is_begun_again(tmp_path, monkeypatch):
    family = families.Family("plain", "", {"entropy_coef": "0.1"}, (3,), 4, 1.0, until=2, later={"entropy_coef": "0"})
    started = []

    class Done:
        returncode = 0

    def run(words, check):
        started.append(words[3:])
        path = tmp_path / words[words.index("--output_dir") + 1]
        steps = int(words[words.index("--max_steps") + 1])
        write_metrics(path, [{"reward": 0.5}] * steps)
        return Done()

    monkeypatch.setattr(families.subprocess, "run", run)
    left = tmp_path / "plain-seed3.unfinished"
    left.mkdir()
    (left / "old").touch()
    family.train(3, tmp_path)
    assert [words[words.index("--max_steps") + 1] for words in started] == ["2", "4"]
    first, second = (dict(zip(words[1::2], words[2::2], strict=True)) for words in started)
    assert "--resume_from_checkpoint" not in first and first["--save_steps"] == "2"
    assert second | {"--resume_from_checkpoint": "latest", "--resume_allow_changes": "entropy_coef",
                     "--entropy_coef": "0", "--seed": "3"} == second  # fmt: skip
    assert family.run(3, tmp_path) is not None and not (tmp_path / "plain-seed3" / "old").exists()
    with pytest.raises(ValueError, match="exists and is not a finished run"):
        family.train(3, tmp_path)
    monkeypatch.setattr(families, "_num_steps", lambda path: 3)
    with pytest.raises(ValueError, match=r"was stopped after 3 of 4 steps"):
        families.Family("plain", "", {}, (4,), 4, 1.0).train(4, tmp_path)
    Done.returncode = 1
    with pytest.raises(ValueError, match="ended with exit code 1"):
        families.Family("plain", "", {}, (4,), 4, 1.0).train(4, tmp_path)
