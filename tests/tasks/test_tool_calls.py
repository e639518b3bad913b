"""What is prose, a call, and its arguments, in the formats of calls that TRL knows."""

import pytest
from trl import chat_template_utils as trl_formats

from trl_entropy.tasks.tool_calls import ARGUMENTS, CALL, PROSE, calls_of, kinds_of_tokens

QWEN3 = trl_formats.qwen3_template["fields"]["tool_calls"]
MARKS = {"⟦": CALL, "⟪": ARGUMENTS, "⟧": PROSE}
# (name of TRL's template, text in which ⟦ begins a call, ⟪ its arguments, and ⟧ prose)
CASES = [
    ("qwen3", 'I look.⟦<tool_call>\n{"name": "f", "arguments": ⟪{"a": {"b": 1}}⟦}\n</tool_call>'),
    ("qwen3", 'a⟦<tool_call>{"name": "f", "arguments": ⟪{}⟦}</tool_call>⟧\n⟦<tool_call>{"name": "g", "arg'),
    ("qwen3", "no call at all"),
    ("qwen3", "⟦<tool_call>broken</tool_call>⟧ and on"),
    ("qwen3", "⟦<tool_call></tool_call><tool_call>"),
    ("qwen3_5", "⟦<tool_call>\n<function=f>\n<parameter=a>\n⟪3⟦\n</parameter>\n</function>\n</tool_call>⟧ yes"),
    ("llama3", 'Hm ⟦{"name": "f", "parameters": ⟪{"a": 3}⟦}<|eot_id|>'),
    ("glm4moe", "a⟦<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>⟪3⟦</arg_value>\n</tool_call>⟧b"),
    ("gptoss", '⟦to=functions.f<|channel|>commentary json<|message|>⟪{"a": 3}⟦<|call|>'),
]


def parsed(marked: str) -> tuple[str, list[int]]:
    """The text without marks, and the kind of each character."""
    text, kinds, kind = "", [], PROSE
    for character in marked:
        if character in MARKS:
            kind = MARKS[character]
        else:
            text, kinds = text + character, [*kinds, kind]
    return text, kinds


@pytest.mark.parametrize("name, marked", CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_every_character_has_its_kind(name, marked):
    text, expected = parsed(marked)
    calls = getattr(trl_formats, f"{name}_template")["fields"]["tool_calls"]
    assert kinds_of_tokens(list(text), calls) == expected, (text, expected)


def test_a_token_is_what_its_first_character_is():
    tokens = ['look <tool_call>{"name"', ': "f", "arguments": {"a', '": 1}', "}</tool_call>", "", " so"]
    assert kinds_of_tokens(tokens, QWEN3) == [PROSE, CALL, ARGUMENTS, CALL, PROSE, PROSE]


def test_without_a_template_calls_are_those_of_most_models():
    class Silent:
        response_template = None

    for tokenizer in (Silent(), object()):
        text = 'x<tool_call>{"name": "f", "arguments": {}}</tool_call>'
        assert ARGUMENTS in kinds_of_tokens(list(text), calls_of(tokenizer))
