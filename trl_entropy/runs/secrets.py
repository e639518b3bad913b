"""Tokens, keys and passwords are masked in what is written, found by the name of their field and by their form."""

from __future__ import annotations

import re
from collections.abc import Mapping

MASK = "<secret>"

# Whole words of a field's name; `eos_token` and `max_tokens` are none, so a token needs a word that says whose it is.
_NAME = re.compile(
    r"(?:^|[_.-])(?:(?:hub|hf|auth|access|api|bearer|refresh|session|security|secret|private|bot|git(?:hub|lab)?|wandb)[_-]?token"
    r"|(?:api|access|secret|private|account|license|auth|encryption|wandb|comet|openai|anthropic)[_-]?key(?:[_-]?id)?"
    r"|secrets?|passw(?:or)?d|passphrase|credentials?|authorization|cookie)$|^token$",
    re.IGNORECASE,
)
# Forms that issuers give their tokens, so that they can be found; a password or key in a URL; `Bearer ...`.
_FORM = re.compile(
    r"(?<![A-Za-z0-9])(?:"  # they may be part of a name, as in run_hf_...
    r"(?:hf_|api_org_)[A-Za-z0-9]{16,}"  # Hugging Face
    r"|(?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    r"|sk-[A-Za-z0-9_-]{16,}|wandb_v\d_\w{16,}|xox[abprs]-[A-Za-z0-9-]{10,}"  # OpenAI and alike, W&B, Slack
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|AIza[\w-]{30,}|ya29\.[\w.-]{16,}"  # AWS, Google
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"  # a JSON web token
    r"|(?<=://)/?[^/\s:@]*:[^/\s@]+(?=@)|(?<=://)[^/\s:@]{16,}(?=@)"
    r"|(?<=[Bb]earer )[\w.~+/=-]{8,}"
)
# A name and its value: in the query of a URL, in JSON or a dict of Python, in a mapping of YAML in one line.
_QUERY = re.compile(r"(?P<before>[?&](?P<name>[\w.-]+)=)(?P<value>[^&\s'\"]+)")
_QUOTE = r"(?:\\*(?:''|['\"])|&(?:#39|#x27|#34|quot);)"  # also where a text is quoted again, in YAML, in HTML
_QUOTED = re.compile(
    rf"(?P<before>(?P<name>[\w.-]+){_QUOTE}\s*:\s*)"
    rf"(?:(?P<quote>{_QUOTE})(?P<value>(?:(?!(?P=quote))(?:\\.|.))+)(?P=quote)|(?P<bare>[^\s,}}'\"&\\]+))"
)
_FLOW = re.compile(r"(?P<before>[{,]\s*(?P<name>[\w.-]+)\s*:\s*)(?P<value>[^\s,}'\"]+)")
_OF_A_QUERY = re.compile(r"(?:^|[_-])(?:sig|key|signature)$", re.IGNORECASE)
_ASSIGNED = re.compile(r"^(-{0,2})([\w.-]+)([=:])(.+)$", re.DOTALL)


def is_secret_name(name: str) -> bool:
    """Whether a field, option or environment variable of this name holds a secret: `hub_token`, `WANDB_API_KEY`."""
    return _NAME.search(name.lstrip("-")) is not None


def masked_text(text: str) -> str:
    """`text` with the tokens, keys and passwords in it masked that can be told by their form, or by a name beside."""
    text = _QUERY.sub(lambda found: _with_masked_value(found, bool(_OF_A_QUERY.search(found["name"]))), text)
    for pairs in (_QUOTED, _FLOW):
        text = pairs.sub(_with_masked_value, text)
    return _FORM.sub(MASK, text)


def _with_masked_value(found: re.Match[str], is_secret: bool = False) -> str:
    entries = found.groupdict()
    value, quote = entries["value"] or entries["bare"], entries.get("quote") or ""
    if value in ("null", "None") or not (is_secret or is_secret_name(entries["name"])):
        return found[0]
    return f"{entries['before']}{quote}{MASK}{quote}"


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
