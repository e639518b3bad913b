"""Seconds of a planned run from its work: the reference's ratio, the parts by hand, and what is not known."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest

from trl_entropy import doctor
from trl_entropy.preflight import Plan, cost_report
from trl_entropy.preflight.cost import PRECISIONS, cost
from trl_entropy.preflight.hardware import GIB, NETWORK, RATES, SHARE_OF_PEAK, Hardware, named_hardware
from trl_entropy.preflight.work import Work

REPOSITORY = Path(__file__).parents[2]
H100 = RATES["H100", 80]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The adapter that configs/sft-qwen2.5-1.5b-gsm8k.yaml makes, without the run that makes it.
REFERENCE = ["--model_name_or_path", "Qwen/Qwen2.5-1.5B", "--use_peft", "true", "--lora_r", "64",
             "--lora_target_modules", *TARGETS]  # fmt: skip
BODY, HEAD, ADAPTER = 1_310_195_712, 1536 * 151936, 73_859_072


def plan_of(*arguments: str) -> Plan:
    """The plan that the doctor would report on."""
    plans: list[Plan] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(REPOSITORY)
        patched.setattr(doctor, "full_report", lambda plan: plans.append(plan) or [])
        patched.setattr(doctor, "size_lines", lambda plan: [])
        patched.setattr(doctor, "findings", lambda plan: [])
        options, settings = doctor._options().parse_known_args([*arguments, "--output_dir", "/nowhere/run"])
        _, found = doctor.diagnose(options, settings)
    assert plans, found
    return plans[0]


def run_of(config: str, *hardware: str) -> Plan:
    """The plan of a config with the reference's model."""
    settings = ["--config", f"configs/{config}.yaml", "--accelerate_config", "launch/zero2.yaml", *REFERENCE]
    return plan_of(*settings, *(hardware or ["--hardware", "2xH100-80GB"]))


@pytest.fixture(scope="module")
def reference() -> Plan:
    return run_of("qwen2.5-1.5b-gsm8k")


def changed(plan: Plan, **settings: object) -> Plan:
    """The plan with other settings, which are not checked."""
    args = copy.copy(plan.args)
    for name, value in settings.items():
        setattr(args, name, value)
    return replace(plan, args=args)


def seconds_of(plan: Plan, precision: str = "float32") -> dict[str, float]:
    found = cost(plan, precision)
    return {item.name: item.work.seconds(H100) for item in [*found.phases, *found.probes]}


@pytest.mark.parametrize("config", ["", "-vllm", "-vllm-server"])
def test_all_probes_of_the_shipped_reference_cost_at_most_15_percent(config):
    plan = run_of(f"qwen2.5-1.5b-gsm8k{config}")
    for precision in PRECISIONS:
        found = cost(plan, precision)
        assert [item.name for item in found.probes] == [
            "entropy_probe", "kl_every", "optimizer_state_probe", "effective_sample_size_probe",
        ]  # fmt: skip
        assert 1.01 < cost_report.ratio(found, H100) <= cost_report.ASKED_RATIO


def test_the_products_of_the_reference_are_those_of_a_hand_calculation(reference):
    found = cost(reference, "float32")
    (loss,) = (item.work for item in found.phases if item.name == "loss and backward")
    # A process has 1024 rows of 400 tokens; layers: forward, again for checkpointing, gradients of inputs; the adapter
    # also has gradients of its weights; the head: forward, again, gradient of its input, on 200 tokens.
    attention = 28 * 12 * 128 * 400**2 * (4 + 4 + 8)
    layers = 2 * 400 * (3 * BODY + 4 * ADAPTER) + 2 * 200 * 3 * HEAD
    assert loss.flops == {"bfloat16": pytest.approx(1024 * (layers + attention), rel=1e-6)}
    (entropy,) = (item.work for item in found.probes if item.name == "entropy_probe")
    # 128 rows a process: two first derivatives, with two products for what is frozen and three for the adapter and
    # attention, and every tenth time one scoring; and two in bf16.
    once = 2 * 400 * (BODY + ADAPTER) + 2 * 200 * HEAD + 28 * 12 * 128 * 4 * 400**2
    first = 2 * (2 * 400 * BODY + 2 * 200 * HEAD) + 3 * (2 * 400 * ADAPTER + 28 * 12 * 128 * 4 * 400**2)
    assert entropy.flops["float32"] == pytest.approx(128 * (2 * first + once / 10), rel=1e-6)
    assert entropy.flops["bfloat16"] == pytest.approx(128 * 2 * once, rel=1e-6)


def test_seconds_are_work_over_rates():
    work = Work({"float32": 67e12, "bfloat16": 989.5e12}, memory=3350e9, link=450e9, network=NETWORK)
    assert work.seconds(H100, share=1) == pytest.approx(5)
    assert (work + 2 * work).seconds(H100) == pytest.approx(15 / SHARE_OF_PEAK)


def test_tf32_makes_the_derivatives_cheaper_and_scores_the_values_beside_them(reference):
    plan = reference
    exact, rounded = (cost(plan, precision).probes[0].work for precision in ("float32", "tf32"))
    assert set(rounded.flops) == {"float32", "tf32", "bfloat16"}
    assert rounded.flops["tf32"] + rounded.flops["float32"] > exact.flops["float32"]
    assert rounded.seconds(H100) < 0.9 * exact.seconds(H100)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"noise_scale_probe": True}, "noise_scale_probe"),
        ({"noise_scale_probe": True, "noise_scale_from": "micro_batches"}, "noise_scale_probe"),
        ({"fisher_probe": True}, "fisher_probe"),
        ({"entropy_attribution": "token"}, "entropy_attribution: token"),
        ({"entropy_attribution": "sequence"}, "entropy_attribution: sequence"),
        ({"entropy_control": "report"}, "entropy_control: report"),
        ({"entropy_control": "hold", "entropy_control_completions": "rollouts"}, "entropy_control: hold"),
        ({"token_control": "clip_cov"}, "token_control: clip_cov"),
        ({"token_control": "exchange", "token_control_floor": 1.0}, "token_control: exchange"),
    ],
    ids=str,
)
def test_every_probe_and_control_has_a_row(reference, settings, name):
    without, found = seconds_of(reference), seconds_of(changed(reference, **settings))
    assert {**found, name: None} == {**without, name: None} and found[name] > 0


def test_what_adds_passes_adds_seconds(reference):
    plain = seconds_of(reference)["entropy_probe"]
    for more in (
        {"entropy_second_order": True},
        {"entropy_placebo": True},
        {"entropy_probe_num_completions": 512},
        {"entropy_probe_completions": "rollouts"},
    ):
        assert seconds_of(changed(reference, **more))["entropy_probe"] > 1.3 * plain, more
    assert seconds_of(changed(reference, entropy_probe_completions="held_out"))["entropy_probe"] > 1.01 * plain
    assert seconds_of(changed(reference, entropy_prediction="linear"))["entropy_probe"] < 0.8 * plain
    assert seconds_of(changed(reference, beta=0.1, kl_every=0))["scoring by TRL"] > 1
    again = seconds_of(changed(reference, gradient_checkpointing=False))["loss and backward"]
    assert again < 0.8 * seconds_of(reference)["loss and backward"]


def test_machines_share_the_rows_and_send_over_the_network():
    one = run_of("qwen2.5-1.5b-gsm8k", "--hardware", "8xH100-80GB", "--num_processes", "8")
    four = run_of("qwen2.5-1.5b-gsm8k", "--hardware", "8xH100-80GB", "--machines", "4")
    assert (four.world_size, four.launch.num_local_processes, four.launch.num_machines) == (32, 8, 4)
    assert seconds_of(four)["loss and backward"] == pytest.approx(seconds_of(one)["loss and backward"] / 4, rel=0.01)
    single, several = (cost(plan, "float32").phases[-1].work for plan in (one, four))
    assert single.network == 0
    # 4 micro-batches of gradients, and the parameters: 3/4 of each leaves its machine, 7/8 its GPU
    assert several.network == pytest.approx(5 * 2 * ADAPTER * 3 / 4) and several.link == pytest.approx(
        5 * 2 * ADAPTER * 7 / 8
    )


@pytest.mark.parametrize(
    ("name", "memory", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2 * GIB, ("H100", 80)),
        ("NVIDIA H100 PCIe", 79.2 * GIB, ("H100PCIE", 80)),
        ("NVIDIA A100-SXM4-40GB", 39.4 * GIB, ("A100", 40)),
        ("NVIDIA GeForce RTX 4090", 23.5 * GIB, ("RTX4090", 24)),
        ("Tesla T4", 14.6 * GIB, ("T4", 16)),
        ("NVIDIA H200", 139.8 * GIB, ("H200", 141)),
        ("NVIDIA T400", 4 * GIB, None),
        ("NVIDIA H100 NVL", 93 * GIB, None),
    ],
)
def test_rates_of_a_gpu_by_the_name_that_cuda_has_for_it(name, memory, key):
    assert Hardware(f"2 x {name}", 2, int(memory), True).rates is (RATES[key] if key else None)


@pytest.mark.parametrize("key", RATES, ids=str)
def test_every_gpu_of_the_table_can_be_named(key):
    assert named_hardware(f"8x{key[0]}-{key[1]}GB").rates is RATES[key]


def test_an_unknown_gpu_has_passes_and_no_seconds(reference):
    text = "\n".join(cost_report.cost_lines(replace(reference, hardware=named_hardware("2xX900-80GB"))))
    assert "seconds are not known for 2 x X900 80 GB" in text and "H100-80GB" in text
    assert "entropy_probe: about 8 forward passes" in text


def test_a_mixture_of_experts_has_no_seconds(reference):
    plan = reference
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_experts": 2}
    mixture = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    assert cost(replace(plan, shape=replace(plan.shape, module=mixture)), "float32") is None


def test_the_report_has_every_row_and_says_that_it_is_computed(reference):
    lines = cost_report.cost_lines(reference)
    text = "\n".join(lines)
    assert "not measured" in text and "assumption" in text
    total = next(line for line in lines if line.startswith("STEP WITH ALL PROBES")).split()
    parts = [float(line.split()[-3]) for line in lines if line.startswith("+ ")]
    assert float(total[-3]) == pytest.approx(1 + sum(parts), abs=0.003)
    step = next(line for line in lines if re.match("step ", line)).split()
    assert float(total[-4]) == pytest.approx(float(step[2]) * float(total[-3]), rel=0.01)


def test_other_sizes_have_a_row_with_an_adapter_and_without(reference, monkeypatch):
    monkeypatch.setattr(cost_report, "SIZES", ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"))
    plan = reference
    rows = [line.split() for line in cost_report.size_lines(plan)[1:-1]]
    assert [row[:2] for row in rows] == [
        [f"{name},", what] for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B") for what in ("LoRA", "full")
    ]
    step = seconds_of(plan)
    expected = sum(step[name] for name in ("generation", "loss and backward", "optimizer", "communication"))
    assert float(rows[2][2]) == pytest.approx(expected, rel=0.01)
    assert all(float(full[5]) > float(lora[5]) for lora, full in zip(rows[::2], rows[1::2], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "2xH100-80GB", "--machines", "0"], "--machines is 0; use 1 or more"),
        (["--machines", "2"], "give --hardware too"),
    ],
)
def test_bad_numbers_of_machines_end_in_one_line(arguments, message):
    _, found = doctor.diagnose(*doctor._options().parse_known_args(arguments))
    assert len(found) == 1 and message in found[0].text and "\n" not in found[0].text
