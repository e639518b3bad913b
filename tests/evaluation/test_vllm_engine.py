"""vLLM's part with a stand-in: what it is told to load and to draw, and that the model scores what it drew."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_evaluation import PROMPTS, rows_with
from transformers import AutoModelForCausalLM

from trl_entropy import evaluate
from trl_entropy.evaluation import sampling
from trl_entropy.evaluation.kept import KeptBatches
from trl_entropy.evaluation.plan import VLLM
from trl_entropy.evaluation.sampling import Sampler, load_policy
from trl_entropy.evaluation.vllm_engine import VllmEngine


class StandIn(ModuleType):
    """The part of vLLM that is called: greedy completions of the folder's own weights, prompt by prompt."""

    class SamplingParams(SimpleNamespace):
        pass

    class LLM:
        made = ()

        def __init__(self, model, **how):
            assert (Path(model) / "tokenizer.json").exists()
            self.model, self.how, self.asked = AutoModelForCausalLM.from_pretrained(model).eval(), how, []
            StandIn.LLM.made += (self,)

        def generate(self, prompts, sampling_params, use_tqdm):
            self.asked += sampling_params
            return [self._one(p["prompt_token_ids"], how) for p, how in zip(prompts, sampling_params, strict=True)]

        def _one(self, ids, how):
            drawn = list(ids)
            while len(drawn) < len(ids) + how.max_tokens and drawn[-1] not in how.stop_token_ids:
                drawn.append(int(self.model(torch.tensor([drawn])).logits[0, -1].argmax()))
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(drawn[len(ids) :]))])


@pytest.fixture
def vllm(monkeypatch):
    stand_in = StandIn("vllm")
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(StandIn.LLM, "made", ())
    return stand_in


def test_what_it_draws_is_scored_by_the_model(vllm, policy, tokenizer, settings):
    settings = replace(settings, sampler=VLLM)
    engine = VllmEngine(policy, tokenizer, settings)
    rows = dict(Sampler(policy, tokenizer, settings, 3, engine).draw(rows_with(PROMPTS), greedy=True))
    own = dict(Sampler(policy, tokenizer, settings, 3).draw(rows_with(PROMPTS), greedy=True))
    assert sorted(rows) == [0, 1, 2, 3]
    for place, row in rows.items():  # greedy, so both draw the same
        assert row["completion_ids"] == own[place]["completion_ids"]
        assert row["logps"] == own[place]["logps"] and row["entropies"] == own[place]["entropies"]
    (llm,) = vllm.LLM.made
    assert llm.how["dtype"] == "float32" and llm.how["gpu_memory_utilization"] < 1
    assert llm.how["kv_cache_memory_bytes"] < 2**32, "on a CPU not half of the machine"
    assert [asked.temperature for asked in llm.asked] == [0.0] * 4


def test_it_samples_as_the_run_did_each_prompt_with_its_seed(vllm, policy, tokenizer, settings):
    settings = replace(settings, sampler=VLLM, stop_at_answer=True)
    engine = VllmEngine(policy, tokenizer, settings)
    list(Sampler(policy, tokenizer, settings, 4, engine).draw(rows_with([PROMPTS[0]] * 4), greedy=False))
    (llm,) = vllm.LLM.made
    asked = llm.asked[0]
    assert (asked.temperature, asked.top_k, asked.top_p, asked.repetition_penalty) == (0.7, 0, 1.0, 1.0)
    assert asked.max_tokens == 12 and asked.stop_token_ids == [tokenizer.eos_token_id] and not hasattr(asked, "min_p")
    assert asked.stop == ["</answer>"] and asked.include_stop_str_in_output
    assert len({how.seed for how in llm.asked}) == 4


def test_what_was_drawn_before_it_was_cut_off_is_not_drawn_again(
    vllm, policy, tokenizer, settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(sampling, "_DRAWN_AHEAD", 4)
    settings = replace(settings, sampler=VLLM)
    key = {"settings": 1}

    def rows(kept, take=None):
        engine = VllmEngine(policy, tokenizer, settings)
        drawn = Sampler(policy, tokenizer, settings, 2, engine, kept).draw(rows_with(PROMPTS * 2), greedy=True)
        return list(itertools.islice(drawn, take)), len(engine._llm.asked)

    whole, asked = rows(None)
    assert asked == 8
    _, asked = rows(KeptBatches(tmp_path / "step_000001", key), 5)  # and the sixth is kept
    assert asked == 8
    rest, asked = rows(KeptBatches(tmp_path / "step_000001", key))
    assert rest == whole and asked == 2


def test_an_adapter_is_merged_before_vllm_loads_it(vllm, policy, tokenizer, settings, tmp_path):
    policy.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.base_model.name_or_path = str(tmp_path / "base")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    settings = replace(settings, sampler=VLLM)
    loaded, its_tokenizer = load_policy(str(tmp_path / "adapter"), settings, "cpu")
    engine = VllmEngine(loaded, its_tokenizer, settings)
    ids = torch.arange(5, 25)[None]
    assert torch.allclose(adapted(ids).logits, engine._llm.model(ids).logits, atol=1e-4)


@pytest.mark.parametrize("device, installed, gpu, expected", [
    ("auto", True, True, "vllm"), ("auto", True, False, "transformers"), ("auto", False, True, "transformers"),
    ("cpu", True, True, "transformers"),
])  # fmt: skip
def test_which_sampler_auto_is(monkeypatch, device, installed, gpu, expected):
    monkeypatch.setattr(evaluate, "_is_installed", lambda package: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert evaluate.sampler_for("auto", device) == expected
    assert evaluate.sampler_for("auto", device, ["transformers", "vllm"]) == "transformers"
    assert evaluate.sampler_for("auto", device, ["vllm"]) == expected
    assert evaluate.sampler_for("transformers", device) == "transformers"


def test_vllm_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_is_installed", lambda package: False)
    with pytest.raises(SystemExit):
        evaluate.parse(["--run", "x", "--sampler", "vllm"])
    assert "not installed: pip install 'trl_entropy[vllm]'" in capsys.readouterr().err
