"""The embedded agent: the embedded model with a chat template in which it calls tools, and how its warm start learns.

Its tokenizer is that of the embedded model and a few tokens more, so that a call is ten tokens long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trl_entropy.models.embedded import END_TOKEN, build_tokenizer
from trl_entropy.runs.strict_json import Json
from trl_entropy.tasks.calculator import CalculatorProblem, Episode, calculate

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# The agent needs no arithmetic, only to copy digits, and learns sooner.
RECIPE: Json = {"version": 1, "num_clean": 6_400, "num_flawed": 1_600, "flawed_share": 0.5}
_PROMPT_END = "\nResponse:"
_TOKENS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", '{"name": "', "calculate",
    '", "arguments": ', '{"expression": "', '"}', "}", _PROMPT_END,
)  # fmt: skip
# A turn of the assistant follows `_PROMPT_END`. What tools there are is not said: the warm start has seen them.
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{ '\\nResponse:' + (message.content or '') }}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {{ '<tool_call>{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}</tool_call>' }}
        {%- endfor -%}
        {{ '<|endoftext|>' }}
    {%- elif message.role == 'tool' -%}
        {{ '<tool_response>' + message.content + '</tool_response>' }}
    {%- else -%}
        {{ 'Question: ' + message.content }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\\nResponse:' }}{%- endif -%}
"""
_RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": _PROMPT_END,
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|endoftext\|>\s*", "content": "text"},
    },
}


def build_agent_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer with the tokens of calls, a chat template for tools, and how to read calls."""
    from transformers import AddedToken

    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in _TOKENS])
    tokenizer.chat_template, tokenizer.response_template = _CHAT_TEMPLATE, _RESPONSE_TEMPLATE
    return tokenizer


def demonstrated(tokenizer: PreTrainedTokenizerBase, episodes: list[tuple[CalculatorProblem, Episode]]) -> Dataset:
    """`input_ids` and `labels` of episodes, tokenized turn by turn as in training; -100 for all but the policy's."""
    from datasets import Dataset

    return Dataset.from_list([_tokenized(tokenizer, problem, episode) for problem, episode in episodes])


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, problem: CalculatorProblem, episode: Episode
) -> dict[str, list[int]]:
    def ids_of(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    prompt = tokenizer.apply_chat_template(problem.prompt, add_generation_prompt=True, tokenize=False)
    parts = [(ids_of(prompt), False)]
    if episode.expression is not None:
        call = f'<tool_call>{{"name": "calculate", "arguments": {{"expression": "{episode.expression}"}}}}</tool_call>'
        result = f"<tool_response>{calculate(episode.expression)}</tool_response>{_PROMPT_END}"
        parts += [(ids_of(f"{episode.first}{call}{END_TOKEN}"), True), (ids_of(result), False)]
    parts.append((ids_of(f"{episode.last}{END_TOKEN}"), True))
    return {
        "input_ids": [token for ids, _ in parts for token in ids],
        "labels": [token if own else -100 for ids, own in parts for token in ids],
    }
