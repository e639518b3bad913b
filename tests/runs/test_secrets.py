"""Secrets are masked by the name of their field and by their form; nothing else is."""

import pytest

from trl_entropy.runs.secrets import MASK, is_secret_name, masked, masked_command, masked_text

# Made up, in the forms that issuers use; split, so that no scanner of repositories takes them for real ones.
BY_FORM = {
    "Hugging Face": "hf" + "_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
    "GitHub": "ghp" + "_0123456789abcdefghijABCDEFGHIJ012345",
    "GitHub, fine-grained": "github_pat" + "_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
    "GitLab": "glpat" + "-abcdefghijklmnopqrst",
    "OpenAI": "sk" + "-proj-abcdefghijklmnopqrstuvwxyz0123",
    "Anthropic": "sk" + "-ant-api03-abcdefghijklmnopqrstuvwxyz",
    "Slack": "xoxb" + "-123456789012-abcdefghijkl",
    "AWS": "AKIA" + "ABCDEFGHIJKLMNOP",
    "Google": "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "a JSON web token": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_123",
}


@pytest.mark.parametrize("issuer", BY_FORM)
def test_a_token_is_masked_wherever_it_stands(issuer):
    secret = BY_FORM[issuer]
    for text in (secret, f"export X={secret}", f"401 for url https://host/x?y={secret}", f"'{secret}'"):
        assert secret not in masked_text(text) and MASK in masked_text(text)
    assert secret not in str(masked({"a": [{"b": (secret, 1)}]}))


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("git clone https://user:pass1234@host/x.git", "pass1234"),
        ("https://abcdefghij0123456789@host/x.git", "abcdefghij0123456789"),
        ("s3://key1:secret1@bucket/x", "secret1"),
        ("https://h/x?token=abc123&y=1", "abc123"),
        ("https://h/x?y=1&sig=abc123", "abc123"),
        ("Authorization: Bearer abcdefgh123", "abcdefgh123"),
    ],
)
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
