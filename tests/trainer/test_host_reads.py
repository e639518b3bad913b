"""How often a probed step makes the host wait for the device: a stated number, whatever the number of parameters."""

from collections import Counter
from functools import partial

import pytest
from host_reads import HostReads
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from trl_entropy import Probe

# An adapter, whose groups' gradients come from hooks on training's backward pass; and a trained head.
SETTINGS = {
    "adapter": {
        "peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "entropy_probe": True,
        "entropy_probe_num_completions": 16,
        "entropy_attribution": "sequence",
        "noise_scale_probe": True,
        "noise_scale_within_prompt": True,
        "fisher_probe": True,
        "fisher_num_sequences": 16,
        "optimizer_state_probe": True,
        "effective_sample_size_probe": True,
    },
    "head": {
        "entropy_probe": True,
        "entropy_probe_completions": "rollouts",
        "noise_scale_probe": True,
        "entropy_control": "hold",
        "entropy_control_target": 2.0,
        "entropy_control_num_completions": 4,
    },
}
# Reads of a step by probe, at most: what was counted on 2026-12-01 and a tenth. Most are numbers for the log; about
# half are of tensors that lie on the CPU wherever training computes.
STATED = {
    "adapter": {"hooks": 32, "entropy": 195, "noise_scale": 112, "fisher": 100, "optimizer_state": 25,
                "effective_sample_size": 4},
    "head": {"hooks": 20, "entropy_control": 39, "entropy": 101, "noise_scale": 110},
}  # fmt: skip
PER_MICRO_BATCH = 12  # of the hooks: which rows its sequences are


class Steps(TrainerCallback):
    """What was counted when each step began."""

    def __init__(self, counted: HostReads) -> None:
        self.counted, self.begun = counted, []

    def on_step_begin(self, *args, **kwargs):
        self.begun.append((self.counted.reads.copy(), self.counted.moves.copy()))


def say_whose(probe: Probe, counted: HostReads) -> None:
    """Has the probe's events tell `counted` whose reads it counts."""

    def sent(original, *args, **kwargs):
        before, counted.probe = counted.probe, probe.name
        try:
            return original(*args, **kwargs)
        finally:
            counted.probe = before

    for event in (name for name in dir(Probe) if name.startswith("on_")):
        if getattr(type(probe), event) is not getattr(Probe, event):
            setattr(probe, event, partial(sent, getattr(probe, event)))


@pytest.fixture
def of_one_step(make_trainer, tokenizer, monkeypatch):
    """of_one_step(num_layers, num_micro_batches, **settings): reads and moves of the second step."""

    def count(num_layers: int, num_micro_batches: int, **settings) -> tuple[Counter, Counter]:
        config = Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=num_layers,
            num_attention_heads=1, num_key_value_heads=1, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        with monkeypatch.context() as patches:
            counted = HostReads(patches)
            steps = Steps(counted)
            trainer = make_trainer(
                model=Qwen2ForCausalLM(config), callbacks=[steps], max_steps=3, max_completion_length=4,
                per_device_train_batch_size=16 // num_micro_batches, gradient_accumulation_steps=num_micro_batches,
                **settings,
            )  # fmt: skip
            for probe in (one for one in trainer.callback_handler.callbacks if isinstance(one, Probe)):
                say_whose(probe, counted)
            with counted:
                trainer.train()
        (reads, moves), (reads_after, moves_after) = steps.begun[1:]
        return reads_after - reads, moves_after - moves

    return count


@pytest.mark.parametrize("trained", ["adapter", pytest.param("head", marks=pytest.mark.slow)])
def test_a_stated_number_whatever_the_number_of_parameters(of_one_step, trained):
    reads, moves = of_one_step(1, 1, **SETTINGS[trained])
    assert reads.keys() - {"trainer"} == STATED[trained].keys()
    assert {probe: reads[probe] for probe in STATED[trained] if reads[probe] > STATED[trained][probe]} == {}
    # Three layers, and four micro-batches of the same completions
    more, more_moves = of_one_step(3, 4, **SETTINGS[trained])
    assert more.pop("hooks") <= reads.pop("hooks") + 3 * PER_MICRO_BATCH
    del reads["trainer"], more["trainer"]
    assert more == reads
    for folder in ("estimators", "gradients"):
        assert more_moves[folder] <= moves[folder] + 3 * PER_MICRO_BATCH
