"""vLLM as what draws the completions of an evaluation; they are scored by the model itself all the same."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from trl_entropy.evaluation.plan import Settings
from trl_entropy.tasks.r1_template import ANSWER_CLOSE

# Half for vLLM's weights and cache, half for the model that scores.
_GPU_MEMORY_UTILIZATION = 0.5


class VllmEngine:
    """
    Draws completions of all prompts at once.

    Args:
        model: the policy; an adapter must be merged. It is written to a temporary folder for vLLM to load.
        tokenizer: goes there too.
        settings: how to draw.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
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
            )

    def draw(self, prompt_ids: list[list[int]], greedy: bool, ends: set[int]) -> list[list[int]]:
        """
        Token ids of one completion of each prompt, the token or tag that ended it included.

        Each prompt has a seed of its own, so what is drawn for it does not depend on the others of its batch.
        """
        parameters = [self._sampling_params(greedy, ends, place) for place in range(len(prompt_ids))]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        outputs = self._llm.generate(prompts, sampling_params=parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _sampling_params(self, greedy: bool, ends: set[int], place: int) -> Any:
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
