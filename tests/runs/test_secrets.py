"""Secrets are masked by the name of their field and by their form; nothing else is."""

import html
import json

import pytest
import yaml
from planted_secrets import BY_FORM, IN_TEXT

from trl_entropy.runs.secrets import MASK, is_secret_name, masked, masked_command, masked_text


@pytest.mark.parametrize("issuer", BY_FORM)
def test_a_token_is_masked_wherever_it_stands(issuer):
    secret = BY_FORM[issuer]
    for text in (secret, f"export X={secret}", f"401 for url https://host/x?y={secret}", f"'{secret}'"):
        assert secret not in masked_text(text) and MASK in masked_text(text)
    assert secret not in str(masked({"a": [{"b": (secret, 1)}]}))


@pytest.mark.parametrize("text, secret", IN_TEXT.values(), ids=IN_TEXT)
def test_a_secret_in_a_url_or_header_is_masked(text, secret):
    assert secret not in masked_text(text) and MASK in masked_text(text)
    assert masked_text(text).endswith(text.split(secret)[1])


SECRET_NAMES = [
    *(
        "hub_token",
        "HF_TOKEN",
        "HF_HUB_TOKEN",
        "token",
        "--hub_token",
        "auth_token",
        "WANDB_API_KEY",
        "OPENAI_API_KEY",
    ),
    *("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "password", "db_password", "client_secret", "GITHUB_TOKEN"),
    *("api-key", "credentials", "OPENAI_API_KEY", "SESSION_TOKEN"),
]
OTHER_NAMES = [
    *(
        "eos_token",
        "pad_token",
        "bos_token_id",
        "max_new_tokens",
        "num_tokens",
        "token_control",
        "entropy_attribution",
    ),
    *("key", "prompt_key", "tokenizer", "image_token", "keep", "num_key_value_heads", "average_tokens_across_devices"),
    *("include_num_input_tokens_seen", "num_secret_santas", "passes", "entropy_attribution"),
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_field_of_this_name_is_masked(name):
    assert is_secret_name(name)
    assert masked({name: "x1", "nested": {name: 5}}) == {name: MASK, "nested": {name: MASK}}
    assert masked({name: None}) == {name: None}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_field_of_this_name_is_left(name):
    assert masked({name: "x1"}) == {name: "x1"}


@pytest.mark.parametrize("text", [
    '{"eos_token": "<eos>", "num_tokens": 5}', "{max_tokens: 7, key: 3}", "https://h/x?max_tokens=5&page=2",
    "step 3: token: 5 of 7", '{"token": null}', "a_task-with_sketch-of-sixteen-letters", "bash_hf_home",
])  # fmt: skip
def test_a_text_without_a_secret_is_left(text):
    assert masked_text(text) == text


@pytest.mark.parametrize("again", [repr, json.dumps, html.escape, yaml.safe_dump, lambda text: json.dumps(repr(text))])
@pytest.mark.parametrize("form", ["JSON", "a dict", "YAML in one line"])
def test_a_secret_is_masked_in_a_text_that_is_quoted_again(form, again):
    text, secret = IN_TEXT[form]
    quoted = masked_text(again(f"it's {text}"))
    assert secret not in quoted and MASK in quoted and "main" in quoted


def test_a_secret_in_json_leaves_its_neighbours():
    text = """--model_init_kwargs={"token": "a\\"b, c", "revision": "main"}"""
    assert masked_text(text) == f"""--model_init_kwargs={{"token": "{MASK}", "revision": "main"}}"""


def test_a_command_line_is_masked_in_all_its_spellings():
    command = [
        "train.py",
        "--hub_token",
        "abc",
        "--hub-token=abc",
        "HF_TOKEN=abc",
        "--max_steps",
        "3",
        "--push_to_hub",
    ]
    assert masked_command(command) == [
        *("train.py", "--hub_token", MASK, f"--hub-token={MASK}", f"HF_TOKEN={MASK}", "--max_steps", "3"),
        "--push_to_hub",
    ]


def test_every_field_of_the_training_arguments_that_may_hold_a_secret_is_known():
    import dataclasses

    from trl_entropy.config.dr_grpo import DrGRPOConfig

    names = [field.name for field in dataclasses.fields(DrGRPOConfig)]
    assert [name for name in names if is_secret_name(name)] == ["hub_token"]
