"""`trl-entropy check-model`: it is right about families of transformers, and sees what is wrong."""

from pathlib import Path

import pytest
import torch
from family_table import FAMILIES, family_row
from torch import nn

from trl_entropy import check_model, doctor
from trl_entropy.estimators.rows.row_gradients import WrittenOut
from trl_entropy.gradients import layer_rules
from trl_entropy.models.tiny import adapted, family_config, tiny_config, tiny_model
from trl_entropy.preflight.conformance import Setup, conformance

TABLE = Path(__file__).parents[2] / "docs" / "families.md"


def tiny(family, tuning="full", **more):
    torch.manual_seed(0)
    return adapted(tiny_model(tiny_config(family_config(family)), **more), tuning)


@pytest.mark.parametrize(
    ("family", "tuning", "setup"),
    [
        ("qwen3", "full", Setup()),
        pytest.param("gemma3_text", "lora", Setup(True, "eager", torch.bfloat16), marks=pytest.mark.slow),
        pytest.param("gpt2", "full", Setup(True), marks=pytest.mark.slow),
        ("gpt_oss", "full", Setup(attention="eager")),
        ("mixtral", "lora", Setup()),
        pytest.param("qwen3", "ia3", Setup(dtype=torch.bfloat16), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_number_is_right(family, tuning, setup):
    model = tiny(family, tuning, attn_implementation=setup.attention, dtype=setup.dtype)
    outcomes = conformance(model, setup)
    assert len(outcomes) == 5 and {outcome.state for outcome in outcomes} == {"ok"}, [*map(str, outcomes)]


def test_what_a_probe_refuses_is_refused_with_its_reason():
    outcomes = {outcome.check: outcome for outcome in conformance(tiny("qwen3", "dora"), Setup())}
    refused = outcomes.pop("forward and reverse mode")
    assert refused.state == "refused" and "use_dora=True" in refused.reason
    assert {outcome.state for outcome in outcomes.values()} == {"ok"}


def test_a_wrong_rule_is_refused_at_start_or_called_wrong(monkeypatch):
    """A rule that leaves a factor out: no larger module mends it, since the wrong one is a rule for the class."""
    rules = layer_rules._RULES["torch.nn.modules.linear.Linear"]

    def wrong(module: nn.Module, inputs, grads):
        return WrittenOut(2 * layer_rules.linear_weight(module, inputs, grads).whole)

    monkeypatch.setitem(rules, "weight", wrong)
    monkeypatch.setattr("trl_entropy.gradients.row_proof.make_unit", lambda model, layer: False)
    outcomes = {outcome.check: outcome for outcome in conformance(tiny("llama"), Setup())}
    for check in ("rows and a pass for each", "attribution and the whole", "sum of rows, in training"):
        assert outcomes[check].state == "refused" and "cannot be told apart" in outcomes[check].reason
    assert outcomes["scores and plain forward"].state == "ok"


def test_the_command_prints_a_table_and_its_status_says_whether_all_is_right(capsys):
    with pytest.raises(SystemExit) as ended:
        check_model.main(["llama", "--tiny", "--peft", "rslora"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and printed.count(" ok ") == 5 and "llama, rslora, float32, sdpa" in printed
    with pytest.raises(SystemExit, match="Error: no-such-family cannot be built"):
        check_model.main(["no-such-family", "--tiny"])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_families_is_what_is_found(family):
    row = family_row(family)
    assert "wrong" not in row and row in TABLE.read_text(encoding="utf-8").splitlines()


def test_doctor_says_before_any_weights_are_there_what_probes_will_refuse(tmp_path):
    """BioGPT counts positions by the columns of the batch; a mixture has a loss that balances its experts."""
    settings = "--use_cpu True --bf16 False --num_prompts_per_step 4 --num_generations 4 --fisher_num_sequences 16"
    probes = "--entropy_probe True --fisher_probe True --router_aux_loss_coef 0.1"
    found = {}
    for family in ("biogpt", "mixtral"):
        tiny_config(family_config(family)).save_pretrained(tmp_path / family)
        where = ["--model_name_or_path", str(tmp_path / family), "--output_dir", str(tmp_path / "run")]
        parsed = doctor._options().parse_known_args([*where, *settings.split(), *probes.split()])
        found[family] = [str(one) for one in doctor.diagnose(*parsed)[1] if one.is_problem]
    assert any("entropy_probe scores each row" in text and "BioGptForCausalLM" in text for text in found["biogpt"])
    assert any("fisher_probe needs a loss" in text and "router_aux_loss_coef=0" in text for text in found["mixtral"])
    assert not any("own gradient" in text for text in found["mixtral"])
