"""vLLM as the generator of an evaluation's completions; the model itself scores them."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trl_entropy.evaluation.plan import Settings
from trl_entropy.tasks.r1_template import ANSWER_CLOSE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from vllm import SamplingParams

# Half of the memory is for vLLM's weights and cache, half for the model that scores.
_GPU_MEMORY_UTILIZATION = 0.5
# On a CPU vLLM would take that share of the machine's memory for its cache, and refuse to start where less is free.
_CACHE_ON_A_CPU = 2 * 2**30


class VllmEngine:
    """
    Draws completions of many prompts at once.

    Args:
        model: the policy, with its adapter merged. It is saved to a temporary folder, from which vLLM loads it.
        tokenizer: is saved there too.
        settings: how to sample.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        from vllm import LLM

        self._settings = settings
        with tempfile.TemporaryDirectory(prefix="trl-entropy-vllm-") as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            self._llm = LLM(
                model=str(Path(folder)),
                dtype=settings.dtype,
                seed=settings.seed,
                gpu_memory_utilization=_GPU_MEMORY_UTILIZATION,
                **({"kv_cache_memory_bytes": _CACHE_ON_A_CPU} if model.device.type == "cpu" else {}),
            )

    def draw(self, prompt_ids: dict[int, list[int]], greedy: bool, ends: set[int]) -> dict[int, list[int]]:
        """
        The token ids of one completion of each prompt by place, with the token or tag that ended it.

        Each place has a seed of its own, so that its completion does not depend on the other prompts of the batch.

        Args:
            prompt_ids: token ids of the prompt by place, its index among all prompts.
        """
        parameters = [self._sampling_params(greedy, ends, place) for place in prompt_ids]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids.values()]
        outputs = self._llm.generate(prompts, sampling_params=parameters, use_tqdm=False)
        drawn = [list(output.outputs[0].token_ids) for output in outputs]
        return dict(zip(prompt_ids, drawn, strict=True))

    def _sampling_params(self, greedy: bool, ends: set[int], place: int) -> SamplingParams:
        from vllm import SamplingParams

        how = {"temperature": 0.0} if greedy else {**self._settings.sampling}
        if how.get("min_p") is None:
            how.pop("min_p", None)
        if self._settings.stop_at_answer:
            how |= {"stop": [ANSWER_CLOSE], "include_stop_str_in_output": True}
        return SamplingParams(
            n=1,
            max_tokens=self._settings.max_completion_length,
            stop_token_ids=sorted(ends),
            seed=_seed(self._settings.seed, greedy, place),
            **how,
        )


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
