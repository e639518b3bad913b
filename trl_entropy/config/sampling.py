"""Which settings of generation keep tokens from being drawn with the policy's own probability."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import GenerationConfig

# Fields of transformers' `GenerationConfig` that change what is drawn, with the values with which they do not, beside
# None and nothing at all.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "top_k": (0,),
    "top_p": (1,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "sequence_bias": (),
    "bad_words_ids": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "num_beams": (1,),
    "token_healing": (False,),
}
# Arguments of `generation_kwargs` that only say where a completion ends, or that seed the draws.
_HARMLESS = {"stop", "stop_strings", "include_stop_str_in_output", "max_tokens", "seed"}


def merged(*settings: Mapping[str, object]) -> dict[str, object]:
    """What `generate` reads: of each setting the last value that is not None, or else transformers' own default."""
    found = dict[str, object](GenerationConfig._get_default_generation_params())
    for one in settings:
        found |= {name: value for name, value in one.items() if value is not None}
    return found


def narrowing(settings: Mapping[str, object]) -> dict[str, object]:
    """Those of the settings that change what is drawn, temperature aside."""
    return {name: value for name, value in settings.items() if name in NEUTRAL and _changes(name, value)}


def narrowing_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """As [`narrowing`], of `generation_kwargs`, where what is not known counts as changing what is drawn."""
    known = {*NEUTRAL, *_HARMLESS}
    return narrowing(arguments) | {name: value for name, value in arguments.items() if name not in known}


def _changes(name: str, value: object) -> bool:
    return value is not None and value not in NEUTRAL[name] and value not in ([], {}, ())
