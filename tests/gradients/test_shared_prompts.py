"""Prompts that several completions share are read once: the scores and derivatives are those of rows by themselves."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trl_entropy.gradients import shared_prompts
from trl_entropy.gradients.scores import score
from trl_entropy.gradients.shared_prompts import SharedPrompts
from trl_entropy.rollouts.completions import Completions

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def model_of(kind):
    torch.manual_seed(0)
    if kind == "sliding":  # a window shorter than a prompt
        sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, **sliding)).eval()
    if kind == "learned positions":
        return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2)).eval()
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}} if kind == "dynamic" else {}
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, **rope)).eval()


def completions_of(num_prompts=3, group=4):
    """Prompts of 3 to 8 tokens; completions of 1 to 6, of which an environment wrote one."""
    torch.manual_seed(1)
    size = num_prompts * group
    prompts = torch.randint(1, 31, (num_prompts, 8)).repeat_interleave(group, 0)
    starts = torch.randint(0, 6, (num_prompts,)).repeat_interleave(group)
    mask = (torch.arange(6) < torch.randint(1, 7, (size, 1))).long()
    by_policy = mask.clone()
    by_policy[0, 0] = 0
    seen = (torch.arange(8) >= starts[:, None]).long()
    ids = torch.cat([prompts * seen, torch.randint(1, 31, (size, 6)) * mask], 1)
    groups = torch.arange(num_prompts).repeat_interleave(group)[torch.randperm(size)]
    order = groups.argsort(stable=True).argsort()  # rows of a group need not follow one another
    given = {"input_ids": ids, "attention_mask": torch.cat([seen, mask], 1), "completion_mask": mask}
    rows = {name: value[order] for name, value in given.items()}
    return Completions(**rows, prompt_index=groups, loss_mask=by_policy[order])


def scores_of(model, completions, order, batch_size=12):
    torch.manual_seed(2)
    direction = {name: torch.randn_like(param) for name, param in model.named_parameters()}
    found = score(model, completions, 0.9, batch_size, direction=direction, order=order)
    return torch.stack([*found.entropy, *found.logps])


@pytest.mark.parametrize(("kind", "order"), [("plain", 0), ("plain", 2), ("sliding", 1)])
def test_scores_and_derivatives_are_those_of_rows_by_themselves(kind, order):
    model, completions = model_of(kind), completions_of()
    assert SharedPrompts.of(model, completions) is not None
    alone = scores_of(model, completions, order, batch_size=1)
    torch.testing.assert_close(scores_of(model, completions, order), alone, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_read_once():
    model, completions, read = model_of("plain"), completions_of(), []
    scores_of(model, completions, 0)  # tries it
    hook = model.register_forward_pre_hook(
        lambda _, args, keywords: read.append(keywords["input_ids"].shape), with_kwargs=True
    )
    scores_of(model, completions, 0)
    hook.remove()
    assert [tuple(shape) for shape in read] == [(3, 8), (12, 6)]


def other_prompts(completions):
    """A group whose rows an environment gave different prompts."""
    completions.input_ids[0, 7] += 1
    return completions


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("plain", other_prompts),
        ("plain", lambda completions: completions.rows(completions.prompt_index.argsort()[::4])),
        ("learned positions", lambda completions: completions),
        ("dynamic", lambda completions: completions),
    ],
    ids=["other prompts in a group", "one completion a prompt", "learned positions", "rope by length"],
)
def test_where_it_would_be_wrong_or_gain_nothing_rows_are_read_whole(kind, change):
    assert SharedPrompts.of(model_of(kind), change(completions_of())) is None


def test_a_model_that_does_not_go_on_is_found_out_once(monkeypatch, caplog):
    """One that forgets its prompt, and one that keeps no keys and values; and where logits are many, none is tried."""
    model, tried = model_of("plain"), []
    right = SharedPrompts.logits

    def forgetting(self, call):
        tried.append(len(self.completions))
        return right(
            self, lambda keywords: call(keywords | {"attention_mask": torch.ones_like(keywords["attention_mask"])})
        )

    monkeypatch.setattr(SharedPrompts, "logits", forgetting)
    with caplog.at_level("INFO"):
        assert SharedPrompts.of(model, completions_of()) is None is SharedPrompts.of(model, completions_of())
    assert len(tried) == 1 and "its logits differ by" in caplog.text
    monkeypatch.setattr(SharedPrompts, "logits", lambda self, call: call({"input_ids": None}).past_key_values.no)
    other = model_of("plain")
    with caplog.at_level("INFO"):
        assert SharedPrompts.of(other, completions_of()) is None
    assert "it does not go on from a prompt" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(shared_prompts, "MAX_LOGITS", 12 * 6 * 31 - 1)
    assert SharedPrompts.of(model_of("plain"), completions_of()) is None
