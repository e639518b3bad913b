"""`stop_at_answer` with vLLM, where the tag is several tokens, or ends inside one."""

import pytest
import torch
from vllm_runs import NEEDS_VLLM, NO_PROBES, train

from trl_entropy.config import dr_grpo as config
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.trainer import dr_grpo
from trl_entropy.trainer.dr_grpo import DrGRPOTrainer

pytestmark = NEEDS_VLLM
TAGS = {
    "one token": ("</answer>", 1),
    "three tokens": ("</think> <answer>", 3),
    "inside a token": ("</think> <ans", 3),
}


@pytest.mark.parametrize("name", TAGS)
def test_a_completion_ends_with_the_token_that_completes_the_tag(tmp_path, monkeypatch, name):
    tag, num_tokens = TAGS[name]
    monkeypatch.setattr(config, "ANSWER_CLOSE", tag)
    monkeypatch.setattr(dr_grpo, "ANSWER_CLOSE", tag)
    turns = []
    draw = DrGRPOTrainer._generate_single_turn

    def kept(self, *args, **kwargs):
        turns.append(draw(self, *args, **kwargs))
        return turns[-1]

    monkeypatch.setattr(DrGRPOTrainer, "_generate_single_turn", kept)
    trainer = train(tmp_path / "run", stop_at_answer=True, max_steps=2, **NO_PROBES)
    tokenizer = trainer.processing_class
    assert len(tokenizer(tag[: tag.rindex("<")] + "<answer>" if "<ans" in tag else tag)["input_ids"]) == num_tokens
    ended = 0
    for completion_ids, logprobs in turns:
        assert [len(ids) for ids in completion_ids] == [len(values) for values in logprobs]
        assert all(value <= 0 for values in logprobs for value in values)
        for ids in completion_ids:
            if tag in tokenizer.decode(ids, skip_special_tokens=True):
                ended += 1
                assert tag not in tokenizer.decode(ids[:-1], skip_special_tokens=True)
    (first, second) = RunDirectory(tmp_path / "run").metrics()
    assert ended / sum(len(ids) for ids, _ in turns) == pytest.approx(
        (first["completions/answered"] + second["completions/answered"]) / 2
    )
    assert first["completions/answered"] > 0.5
    assert first["completions/clipped_ratio"] <= 1 - first["completions/answered"] + 1e-6
    # The probabilities still belong to the tokens that are left.
    assert first["sampling/sampling_logp_difference/mean"] < 0.02
    assert torch.isfinite(torch.tensor(second["loss"]))
