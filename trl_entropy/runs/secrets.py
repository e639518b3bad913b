"""Tokens, keys and passwords are masked in what is written, found by the name of their field and by their form."""

from __future__ import annotations

import re
from collections.abc import Mapping

MASK = "<secret>"

# Whole words of a field's name; `eos_token` and `max_tokens` are none, so a token needs a word that says whose it is.
_NAME = re.compile(
    r"(?:^|[_.-])(?:(?:hub|hf|auth|access|api|bearer|refresh|session|secret|private|bot|git(?:hub|lab)?|wandb)[_-]?token"
    r"|(?:api|access|secret|private|account|license|auth|encryption|wandb|comet|openai|anthropic)[_-]?key(?:[_-]?id)?"
    r"|secrets?|passw(?:or)?d|passphrase|credentials?|authorization|cookie)$|^token$",
    re.IGNORECASE,
)
# Forms that issuers give their tokens, so that they can be found; a password or key in a URL; `Bearer ...`.
_FORM = re.compile(
    r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\b(?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}|\bglpat-[\w-]{16,}"  # GitHub, GitLab
    r"|\bsk-[A-Za-z0-9_-]{16,}|\bwandb_v\d_\w{16,}|\bxox[abprs]-[A-Za-z0-9-]{10,}"  # OpenAI and alike, W&B, Slack
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bya29\.[\w.-]{16,}"  # AWS, Google
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"  # a JSON web token
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)|(?<=://)[^/\s:@]{16,}(?=@)"
    r"|(?<=[?&](?:sig|key)=)[^&\s]+|(?<=[?&]token=)[^&\s]+|(?<=[?&]password=)[^&\s]+|(?<=[?&]api_key=)[^&\s]+"
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}"
)
_ASSIGNED = re.compile(r"^(-{0,2})([\w.-]+)([=:])(.+)$", re.DOTALL)


def is_secret_name(name: str) -> bool:
    """Whether a field, option or environment variable of this name holds a secret: `hub_token`, `WANDB_API_KEY`."""
    return _NAME.search(name.lstrip("-")) is not None


def masked_text(text: str) -> str:
    """`text` with the tokens, keys and passwords in it masked that can be told by their form."""
    return _FORM.sub(MASK, text)


def masked(value: object) -> object:
    """A tree of mappings and sequences with all secrets masked, by name and by form; tuples become lists."""
    if isinstance(value, str):
        return masked_text(value)
    if isinstance(value, Mapping):
        return masked_items(value)
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    return value


def masked_items(values: Mapping[str, object]) -> dict[str, object]:
    """The entries of a mapping, masked as by [`masked`]."""
    return {key: MASK if item and is_secret_name(str(key)) else masked(item) for key, item in values.items()}


def masked_command(arguments: list[str]) -> list[str]:
    """A command line with all secrets masked: `--hub_token X`, `--hub_token=X`, `KEY=X`, and by form."""
    result: list[str] = []
    for place, argument in enumerate(arguments):
        before = arguments[place - 1] if place else ""
        assigned = _ASSIGNED.match(argument)
        if before.startswith("-") and "=" not in before and is_secret_name(before) and not argument.startswith("--"):
            result.append(MASK)
        elif assigned and is_secret_name(assigned[2]):
            result.append("".join(assigned.groups()[:3]) + MASK)
        else:
            result.append(masked_text(argument))
    return result
