"""Draws episodes of an agent as training does: by TRL's trainer, with the run's tools and environments."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl import GRPOConfig

from trl_entropy.evaluation.kept import KeptBatches
from trl_entropy.evaluation.plan import Settings
from trl_entropy.evaluation.sampling import Asked, Sampler
from trl_entropy.rollouts.drawing import own_randomness
from trl_entropy.rollouts.generation import answer_end, last_turn, turn_ended_at
from trl_entropy.rollouts.user_functions import UserFunctionsTrainer
from trl_entropy.runs.strict_json import Row
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.completion_functions import CompletionFunction
from trl_entropy.tasks.r1_template import ANSWER_CLOSE
from trl_entropy.tasks.registry import task_of
from trl_entropy.tasks.rewards import completion_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAID = "said"  # a row's text of the policy's own, without what tools wrote


class EpisodeSampler(Sampler):
    """
    As [`Sampler`], of whole episodes: the policy calls, a tool or an environment answers, the policy goes on.

    Of a row `completion` and `prompt` are texts of all that was said and asked; `completion_ids`, `logps`, `entropies`
    and `length` are of the policy's own tokens alone; `said` is their text. A row also has the value of each of the
    functions, by its name: environments have forgotten the episode when the next one begins.

    Args:
        functions: reward and metric functions, none of them a model.
        problems: rows of the dataset; the trainer looks at the first one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        batch_size: int,
        kept: KeptBatches | None,
        functions: Sequence[CompletionFunction],
        problems: Sequence[Row],
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="trl-entropy-")  # transformers makes the folder that it gets
        args = GRPOConfig(
            output_dir=self._folder.name,
            use_cpu=model.device.type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            beta=0.0,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=settings.max_completion_length,
            max_tool_calling_iterations=settings.max_tool_calling_iterations,
            chat_template_kwargs=settings.chat_template_kwargs,
        )
        task = TaskArguments(**settings.task)
        episodes = task_of(task).episodes(task)
        self._trainer = _Drawing(
            model=model,
            reward_funcs=_nothing,
            args=args,
            train_dataset=Dataset.from_list([dict(problems[0])]),
            processing_class=tokenizer,
            tools=episodes.tools or None,
            environment_factory=episodes.environment_factory,
        )
        self._trainer.take(functions, settings.stop_at_answer)
        model.eval()
        super().__init__(model, tokenizer, settings, batch_size, None, kept)
        self._ends = set(self._trainer.eos_token_ids)

    def _drawn(self, asked: Sequence[Asked], greedy: bool, start: int) -> list[Row]:
        trainer = self._trainer
        trainer.generation_config = self._generation_config(greedy)
        trainer.generation_kwargs = {} if greedy else dict(self.settings.sampling)
        with own_randomness((self.settings.seed, int(greedy), start), self.model.device), torch.no_grad():
            trainer._generate_and_score_completions([dict(one.problem) for one in asked])
        prompt_ids, completion_ids, own, episodes, *_, shown = trainer.generated
        if any(shown):
            raise ValueError("a tool answered with images, which an evaluation of episodes does not score")
        own = own or [[1] * len(ids) for ids in completion_ids]
        ended = [(ids, not self._has_ended(ids, mask)) for ids, mask in zip(completion_ids, own, strict=True)]
        rows = self._scored(prompt_ids, ended, own)
        for place, row in enumerate(rows):
            row["prompt"] = self.tokenizer.decode(prompt_ids[place])
            row[SAID] = completion_text(episodes[place])
            row |= {name: values[place] for name, values in trainer.values.items()}
        return rows

    def _has_ended(self, ids: list[int], own: list[int]) -> bool:
        """Whether the episode ended by itself, as training counts it."""
        if ids and ids[-1] in self._ends:
            return True
        return (
            self.settings.stop_at_answer and answer_end(self.tokenizer, last_turn(ids, own), ANSWER_CLOSE) is not None
        )


def _nothing(completions: list[Any], **kwargs: Any) -> list[float]:
    """TRL's trainer wants a reward function; [`_Drawing`] calls the run's own."""
    return [0.0] * len(completions)


class _Drawing(UserFunctionsTrainer):
    """
    TRL's trainer, which draws one completion of each prompt and never trains. Written against trl 1.16.

    Attributes:
        generated: what `_generate` returned last.
        values: of each function on the completions that were drawn last.
    """

    generated: tuple[Any, ...]
    values: dict[str, list[float]]

    def take(self, functions: Sequence[CompletionFunction], stop_at_answer: bool) -> None:
        """The functions to call, and whether a turn ends at the closing answer tag."""
        self._functions, self._stop_at_answer = functions, stop_at_answer
        self.num_generations = self.num_generations_eval = 1

    def _generate(self, prompts: list) -> Any:
        self.generated = super()._generate(prompts)
        return self.generated

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        draw = functools.partial(super()._generate_single_turn, *args, **kwargs)
        return turn_ended_at(self, ANSWER_CLOSE, draw) if self._stop_at_answer else draw()

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        rows = [{**row, "prompt": prompt} for row, prompt in zip(inputs, prompts, strict=True)]
        more = {"trainer_state": self.state, "environments": self.environments}
        self.values = {one.short: one(rows, completions, completion_ids_list, **more) for one in self._functions}
        return torch.zeros(len(prompts), len(self.reward_funcs), device=self.accelerator.device)
