"""What `generate` makes of settings that are None, and which of its settings change what is drawn."""

import inspect
import re

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from trl_entropy.config.sampling import NEUTRAL, merged, narrowing
from trl_entropy.models.embedded import build_model, build_tokenizer


def merged_by_transformers(own: dict, **settings):
    """What `generate` reads where TRL hands it these settings, and the processors of logits that it makes of that."""
    model = build_model(build_tokenizer())
    model.generation_config = GenerationConfig(**own)
    given = {"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0, "eos_token_id": 1}
    config, _ = model._prepare_generation_config(GenerationConfig(**(given | settings), disable_compile=True))
    model._prepare_special_tokens(config)
    return config, model._get_logits_processor(config, input_ids_seq_length=3, model_kwargs={})


# A value of each setting with which tokens are no longer drawn as the policy has it.
CHANGING = {
    "top_k": 5, "top_p": 0.9, "min_p": 0.9, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1,
    "repetition_penalty": 1.1, "no_repeat_ngram_size": 2, "sequence_bias": [[[3], 1.0]], "bad_words_ids": [[3]],
    "min_length": 5, "min_new_tokens": 5, "forced_bos_token_id": 3, "forced_eos_token_id": 3,
    "exponential_decay_length_penalty": (3, 1.1), "suppress_tokens": [3], "begin_suppress_tokens": [3],
    "guidance_scale": 2.0, "watermarking_config": {"bias": 2.0}, "num_beams": 2, "token_healing": True,
}  # fmt: skip
NO_PROCESSOR = {"num_beams", "token_healing"}  # other ways to generate


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_setting_of_the_models_own_changes_what_is_drawn(name):
    """Unless TRL hands over another; and none of the neutral values does."""
    value = CHANGING[name]
    set_by_trl = name in ("top_k", "top_p", "repetition_penalty")
    own, given = ({}, {name: value}) if set_by_trl else ({name: value}, {})
    config, processors = merged_by_transformers(own, **given)
    assert narrowing(config.to_dict()).keys() == {name} and bool(processors) == (name not in NO_PROCESSOR)
    for neutral in NEUTRAL[name]:
        config, processors = merged_by_transformers({name: neutral}, **{name: neutral})
        harmless = name == "min_p"  # a processor that leaves out what is below 0
        assert not narrowing(config.to_dict()) and bool(processors) == harmless


def test_every_setting_that_a_processor_is_made_of_is_known():
    source = inspect.getsource(GenerationMixin._get_logits_processor)
    read = set(re.findall(r"generation_config\.([a-z]\w*)", source))
    of_encoders = {"encoder_repetition_penalty", "encoder_no_repeat_ngram_size"}
    neither = {"temperature", "do_sample", "use_cache", "max_length", "remove_invalid_values", "renormalize_logits"}
    neither |= {"num_return_sequences"}  # transformers 5.24: how many, not which
    assert read - of_encoders - neither <= set(NEUTRAL)


def test_top_k_none_is_50():
    config, _ = merged_by_transformers({}, top_k=None)
    assert config.top_k == 50 == merged({}, {"top_k": None})["top_k"]


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 1e-10, 1e-6), (torch.bfloat16, 1e-5, 1e-2)])
def test_merging_an_adapter_and_taking_it_out_again_rounds_the_frozen_weights(dtype, least, most):
    """TRL does so before each draw by vLLM: such a LoRA run is resumed to this rounding, and not bit for bit."""
    from peft import LoraConfig, get_peft_model
    from trl.generation import vllm_generation

    source = inspect.getsource(vllm_generation)
    assert source.index("model.merge_adapter()") < source.index("model.unmerge_adapter()")
    base = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).to(dtype)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"]), autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    frozen = layer.base_layer.weight
    before = frozen.clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert least < ((frozen - before).float().norm() / before.float().norm()).item() < most
