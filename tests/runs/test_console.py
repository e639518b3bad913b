"""What is printed cannot steer a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer import grpo_trainer

from trl_entropy.runs.console import describe_evaluation, plain_text, printing_plain_text


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07shown", "shown"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("a\x08\x08b\rc", "abc"),
        ("bell\x07 nul\x00 \x9b31m", "bell nul 31m"),
        ("\u202eevil\u202c", "evil"),
        ("tab\tand\nline stay", "tab\tand\nline stay"),
    ],
)
def test_control_sequences_are_stripped(text, plain):
    assert plain_text(text) == plain


@given(st.text())
def test_nothing_unprintable_is_left(text):
    left = plain_text(text)
    assert not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 for c in left)
    left.encode("utf-8")


def test_samples_printed_by_trl_are_cleaned(monkeypatch):
    printed = []
    monkeypatch.setattr(grpo_trainer, "print_prompt_completions_sample", lambda *a, **k: printed.append(a))
    with printing_plain_text():
        grpo_trainer.print_prompt_completions_sample(
            ["\x1b[2Jp"], [[{"role": "assistant", "content": "\x1b[2Jc"}]], {"r": [1.0]}, [0.0], 3
        )
    assert printed == [(["p"], [[{"role": "assistant", "content": "c"}]], {"r": [1.0]}, [0.0], 3)]


def test_an_evaluation_without_a_number_is_described_too():
    assert describe_evaluation({"reward": None, "entropy": 0.5}) == "reward nan, entropy 0.500 nats/token"
    assert describe_evaluation({"reward": 0.25}) == "reward 0.250, entropy nan nats/token"
