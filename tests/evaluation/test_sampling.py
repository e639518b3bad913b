"""What is drawn in a padded batch is what each prompt alone would give; scores cover the completion and no more."""

from dataclasses import replace

import pytest
import torch
from small_evaluation import PROMPTS, rows_with

from trl_entropy.evaluation import sampling
from trl_entropy.evaluation.sampling import Sampler, first_end, load_policy


def rows_of(sampler, prompts=PROMPTS, greedy=False):
    return dict(sampler.draw(rows_with(prompts), greedy))


def scores_alone(policy, tokenizer, prompt, completion_ids, temperature):
    """Entropies and log-probabilities of one completion from one forward pass without any padding."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    logits = policy(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    log_probs = (logits / temperature).log_softmax(-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    return entropies, log_probs[range(len(completion_ids)), completion_ids]


def test_scores_of_a_padded_batch_are_those_of_each_prompt_alone(policy, tokenizer, settings):
    rows = rows_of(Sampler(policy, tokenizer, settings, batch_size=8))
    assert len(rows) == len(PROMPTS) and len({len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}) > 2
    for place, row in rows.items():
        entropies, logps = scores_alone(policy, tokenizer, PROMPTS[place], row["completion_ids"], 0.7)
        assert len(row["entropies"]) == len(row["logps"]) == row["length"] == len(row["completion_ids"])
        assert torch.allclose(torch.tensor(row["entropies"]), entropies, atol=1e-5)
        assert torch.allclose(torch.tensor(row["logps"]), logps, atol=1e-5)


def test_greedy_completions_of_a_padded_batch_are_those_of_each_prompt_alone(policy, tokenizer, settings):
    together = rows_of(Sampler(policy, tokenizer, settings, batch_size=8), greedy=True)
    for place, prompt in enumerate(PROMPTS):
        (alone,) = rows_of(Sampler(policy, tokenizer, settings, batch_size=8), [prompt], greedy=True).values()
        assert alone["completion_ids"] == together[place]["completion_ids"]


def test_samples_follow_the_policy(policy, tokenizer, settings):
    one_token = replace(settings, max_completion_length=1)
    rows = rows_of(Sampler(policy, tokenizer, one_token, batch_size=512), [PROMPTS[0]] * 2048)
    drawn = torch.tensor([row["completion_ids"][0] for row in rows.values()])
    entropies = torch.tensor([row["entropies"][0] for row in rows.values()])
    surprisal = -torch.tensor([row["logps"][0] for row in rows.values()])
    assert len(drawn) == 2048 and float(entropies.std()) < 1e-5
    error = float(surprisal.std()) / 2048**0.5
    assert abs(float(surprisal.mean()) - float(entropies[0])) < 4 * error  # the sampled form has the same mean


def test_the_same_seed_draws_the_same(policy, tokenizer, settings):
    first, again = (rows_of(Sampler(policy, tokenizer, settings, batch_size=2)) for _ in range(2))
    assert [row["completion_ids"] for row in first.values()] == [row["completion_ids"] for row in again.values()]


def test_the_models_own_generation_settings_do_not_narrow_the_sampler(policy, tokenizer, settings):
    policy.generation_config.top_k = 1
    rows = rows_of(Sampler(policy, tokenizer, settings, batch_size=8), [PROMPTS[0]] * 8)
    assert len({tuple(row["completion_ids"]) for row in rows.values()}) > 1


@pytest.mark.parametrize("ids, expected", [
    ([5, 1, 7, 1], ([5, 1], True)),
    ([1], ([1], True)),
    ([5, 6], ([5, 6], False)),
    ([5, 2, 0, 0], ([5, 2], True)),
])  # fmt: skip
def test_a_completion_ends_at_its_first_end_token(ids, expected):
    assert first_end(ids, {1, 2}) == expected


def test_nothing_after_the_end_counts_and_clipped_ones_are_marked(policy, tokenizer, settings):
    with torch.no_grad():
        policy.lm_head.weight[tokenizer.eos_token_id] *= 4  # an end token now and then
    rows = rows_of(Sampler(policy, tokenizer, settings, batch_size=64), PROMPTS * 32).values()
    ended = [row for row in rows if not row["clipped"]]
    assert 0 < len(ended) < len(rows)
    for row in ended:
        assert row["completion_ids"].index(tokenizer.eos_token_id) == row["length"] - 1
    assert all(tokenizer.eos_token_id not in row["completion_ids"] for row in rows if row["clipped"])


def test_stop_at_answer_ends_there(policy, tokenizer, settings):
    sampler = Sampler(policy, tokenizer, replace(settings, stop_at_answer=True), batch_size=4)
    ids = tokenizer("so <answer>7</answer> and more")["input_ids"]
    cut, clipped = sampler._cut(ids)
    assert tokenizer.decode(cut).endswith("</answer>") and not clipped
    assert sampler._cut(tokenizer("so on")["input_ids"])[1]
    assert len(rows_of(sampler)) == len(PROMPTS)


def test_the_batch_is_halved_on_out_of_memory_and_stays_so(policy, tokenizer, settings, monkeypatch):
    sizes, draw = [], Sampler._draw_batch

    def small(self, prompt_ids, greedy, start):
        sizes.append(len(prompt_ids))
        if len(prompt_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return draw(self, prompt_ids, greedy, start)

    monkeypatch.setattr(sampling.Sampler, "_draw_batch", small)
    sampler = Sampler(policy, tokenizer, settings, batch_size=8)
    rows = rows_of(sampler, PROMPTS * 2)
    assert len(rows) == 8 and sampler.batch_size == 2
    assert sizes == [8, 4, 2, 2, 2, 2]


def test_the_head_of_a_loaded_policy_gets_its_input_in_one_piece(policy, tokenizer, settings, tmp_path):
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_policy(str(tmp_path), settings, "cpu")
    ids, inputs = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(0)), []
    loaded.get_output_embeddings().register_forward_hook(lambda head, given, logits: inputs.append(given[0]))
    logits = loaded(ids, logits_to_keep=2).logits
    torch.testing.assert_close(logits, policy(ids, logits_to_keep=2).logits)
    assert inputs[0].shape[1] == 2 and inputs[0].is_contiguous()


@pytest.fixture
def asked(monkeypatch, policy, tokenizer):
    """What `from_pretrained` of model and tokenizer are asked for: (which, name, arguments)."""
    import transformers

    calls = []

    def answering(which, loaded):
        return lambda name, **how: calls.append((which, name, how)) or loaded

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", answering("model", policy))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", answering("tokenizer", tokenizer))
    return calls


def which_model(how):
    return {name: value for name, value in how.items() if name in ("revision", "subfolder", "trust_remote_code")}


def test_the_start_policy_is_of_the_runs_revision(asked, settings):
    its_own = {"revision": "v2", "subfolder": "a", "trust_remote_code": True}
    load_policy("some/model", replace(settings, model=its_own, dtype="bfloat16"), "cpu")
    assert [(which, name, which_model(how)) for which, name, how in asked] == [
        ("tokenizer", "some/model", its_own), ("model", "some/model", its_own),
    ]  # fmt: skip
    assert asked[1][2]["dtype"] == torch.bfloat16


def test_so_is_the_base_of_an_adapter_but_a_checkpoint_has_no_revision(asked, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda policy, name: policy)
    its_own = {"revision": "v2", "subfolder": "a", "trust_remote_code": True}
    settings = replace(settings, model=its_own)
    code = {"trust_remote_code": True}
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    load_policy(str(folder), settings, "cpu")
    assert [which_model(how) for _, _, how in asked] == [code, code]
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    load_policy(str(folder), settings, "cpu")
    assert [(name, which_model(how)) for _, name, how in asked[2:]] == [(str(folder), code), ("some/model", its_own)]
