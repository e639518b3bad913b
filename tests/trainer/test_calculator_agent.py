"""The embedded agent: tools, environments and a rollout function run with the probes, and the model learns to call."""

import re

import pytest
import torch
from safetensors.torch import load_file

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.models.embedded_agent import build_agent_tokenizer
from trl_entropy.models.loading import EMBEDDED_AGENT
from trl_entropy.models.warm_start import warm_start
from trl_entropy.runs.change_metrics import KINDS
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.tasks.calculator import CalculatorEnvironment, calculate, load_calculator_problems
from trl_entropy.tasks.rewards import tag_pref

CALL = re.compile(r'<tool_call>{"name": "calculate", "arguments": {"expression": "(.*?)"}}</tool_call><\|endoftext\|>')
HELD_OUT = {
    "entropy_probe_completions": "held_out",
    "entropy_probe_num_completions": 8,
    "entropy_attribution": "token",
}


def calling(prompts, trainer):
    """A `rollout_func` with the calculator: what TRL's own loop does, by hand."""
    tokenizer = trainer.processing_class
    asked = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
    first, _ = trainer._generate_single_turn(asked, None, {}, 1)
    rollouts = {"prompt_ids": asked, "completion_ids": [], "logprobs": None, "env_mask": []}
    results = []
    for ids in first:
        called = CALL.search(tokenizer.decode(ids))
        try:
            text = f"<tool_response>{calculate(called[1])}</tool_response>\nResponse:" if called else ""
        except ValueError:
            text = "<tool_response>no sum</tool_response>\nResponse:"
        results.append(tokenizer(text)["input_ids"])
    prefixes = [prompt + ids + more for prompt, ids, more in zip(asked, first, results, strict=True)]
    second, _ = trainer._generate_single_turn(prefixes, None, {}, 1)
    for ids, written, last in zip(first, results, second, strict=True):
        last = last if written else []
        rollouts["completion_ids"].append(ids + written + last)
        rollouts["env_mask"].append([1] * len(ids) + [0] * len(written) + [1] * len(last))
    return rollouts


AGENTS = {
    "tools": ({"tools": [calculate]}, HELD_OUT),
    "environment": ({"environment_factory": CalculatorEnvironment}, {"entropy_probe_completions": "rollouts"}),
    "environments": (
        {"environment_factory": {"calculator": CalculatorEnvironment}},
        {"entropy_probe_completions": "rollouts"},
    ),
    "rollout function": ({"rollout_func": calling}, HELD_OUT),
}


@pytest.fixture(scope="module")
def agent() -> str:
    """After its warm start, built once per machine (about 30 s on an idle one) and cached."""
    return str(warm_start(name=EMBEDDED_AGENT))


def trainer_of(agent, path, agents, **settings) -> DrGRPOTrainer:
    dataset = load_calculator_problems(num_problems=256)
    if isinstance(agents.get("environment_factory"), dict):
        dataset = dataset.add_column("environment", ["calculator"] * len(dataset))
    sizes = {"num_prompts_per_step": 4, "num_generations": 4, "per_device_train_batch_size": 16}
    defaults = {
        "output_dir": str(path),
        "max_completion_length": 48,
        "max_tool_calling_iterations": 1,
        "max_steps": 2,
        "learning_rate": 3e-4,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "probe_batch_size": 16,
    }
    args = DrGRPOConfig(**(defaults | sizes | settings))
    return DrGRPOTrainer(agent, tag_pref, args, train_dataset=dataset, **agents)


@pytest.mark.parametrize("name", AGENTS)
def test_every_kind_of_agent_trains_with_probes(agent, tmp_path, name):
    agents, probe = AGENTS[name]
    probes = {"entropy_probe": True, "fisher_probe": True, "fisher_num_sequences": 12, "noise_scale_probe": True}
    trainer = trainer_of(agent, tmp_path, agents, effective_sample_size_probe=True, **probes, **probe)
    trainer.train()
    rows, tokenizer = RunDirectory(tmp_path).metrics(), build_agent_tokenizer()
    assert len(rows) == 2 and all(row["entropy/turn_1"] > 0 < row["entropy/turn_2"] for row in rows)
    for of in ("rollouts", "entropy"):
        file = load_file(tmp_path / "probes" / of / "step_000001.safetensors")
        written = file["completion_mask"].bool() & ~file["loss_mask"].bool()
        ids = file["input_ids"][:, -written.shape[1] :]
        texts = [tokenizer.decode(row[mask]) for row, mask in zip(ids, written, strict=True) if mask.any()]
        assert len(texts) > len(ids) / 3, "more than a third calls"
        assert all(re.fullmatch(r"<tool_response>.*</tool_response>\nResponse:", text) for text in texts), texts
    if probe is HELD_OUT:
        assert all(row[f"entropy/{kind}"] >= 0 for row in rows for kind in KINDS)
        assert rows[0]["entropy/token_share_kind_arguments"] > 0.1


def test_a_draw_of_episodes_leaves_no_trace(agent, tmp_path):
    points = []
    for number, probe in enumerate([{}, {"entropy_probe": True} | HELD_OUT]):
        trainer = trainer_of(agent, tmp_path / str(number), {"tools": [calculate]}, **probe)
        trainer.train()
        rows = RunDirectory(tmp_path / str(number)).metrics()
        kept = ("reward", "completions/", "tools/", "num_tokens", "entropy/turn", "rewards/", "entropy/policy")
        values = [{key: value for key, value in row.items() if key.startswith(kept)} for row in rows]
        points.append((values, torch.cat([param.detach().flatten() for param in trainer.model.parameters()])))
    for without, probed in zip(points[0][0], points[1][0], strict=True):
        assert without == {key: value for key, value in probed.items() if key in without}
    assert "tools/call_frequency" in points[0][0][0]
    assert torch.equal(points[0][1], points[1][1])


def test_a_draw_with_images_of_tools_is_refused(agent, tmp_path, monkeypatch):
    """They are known only when a tool has answered."""
    trainer = trainer_of(agent, tmp_path, {"tools": [calculate]})
    answer = ([[1]], [[2]], [[1]], [], None, {}, None, [["an image"]])
    monkeypatch.setattr(trainer, "_generate", lambda prompts: answer)
    with pytest.raises(ValueError, match="a tool answered with images"):
        trainer.probe_batches.draw_completions(["1 + 1"], (0,))


def test_resuming_with_other_tools_is_refused(agent, tmp_path):
    def double(number: int) -> int:
        """
        Double a number.

        Args:
            number: Any.
        """
        return 2 * number

    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer_of(agent, tmp_path, {"tools": [calculate]}, max_steps=1, lr_scheduler_type="constant", **saving).train()
    other = trainer_of(agent, tmp_path, {"tools": [calculate, double]}, lr_scheduler_type="constant", **saving)
    with pytest.raises(ValueError, match=r"tools was \['calculate'\] and is \['calculate', 'double'\]"):
        other.train(resume_from_checkpoint="latest")
    same = trainer_of(agent, tmp_path, {"tools": [calculate]}, lr_scheduler_type="constant", **saving)
    same.train(resume_from_checkpoint="latest")
    assert [row["step"] for row in RunDirectory(tmp_path).metrics()] == [1, 2]


@pytest.mark.slow
def test_the_agent_learns_to_call(agent, tmp_path):
    sizes = {"num_prompts_per_step": 16, "num_generations": 8, "per_device_train_batch_size": 128}
    trainer_of(agent, tmp_path, {"tools": [calculate]}, max_steps=12, adam_beta2=0.99, **sizes).train()
    rows = RunDirectory(tmp_path).metrics()
    assert rows[0]["reward"] < 0.6 < 0.75 < rows[-1]["reward"]
    assert rows[0]["tools/call_frequency"] < 0.9 < 0.95 < rows[-1]["tools/call_frequency"]
    assert rows[-1]["entropy/turn_1"] < rows[0]["entropy/turn_1"]
