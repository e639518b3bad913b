"""What each token of a turn is part of: prose, a call of a tool, or the arguments of a call. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PROSE, CALL, ARGUMENTS = range(3)
# Where a tokenizer does not say how its model writes calls: as Qwen, Hermes and many others do.
_USUAL = {"open": "<tool_call>", "close_pattern": r"</tool_call>", "content": "json"}
_JSON_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*(?P<value>.*?)\s*\}?\s*\Z', re.DOTALL)


def calls_of(tokenizer: Any) -> Mapping[str, Any]:
    """How a model writes calls: the field `tool_calls` of its tokenizer's `response_template`, or the usual one."""
    template = getattr(tokenizer, "response_template", None) or {}
    return template.get("fields", {}).get("tool_calls", _USUAL)


def kinds_of_tokens(texts: Sequence[str], calls: Mapping[str, Any]) -> list[int]:
    """
    `PROSE`, `CALL` or `ARGUMENTS` for each token of one turn: where its first character stands.

    Args:
        texts: the text of each token.
        calls: from [`calls_of`]. A call that is never closed is one up to the end of the turn.
    """
    text, starts = "".join(texts), [0, *itertools.accumulate(map(len, texts))]
    kinds = [PROSE] * (len(text) + 1)
    for begin, end, arguments in _calls_in(text, calls):
        kinds[begin:end] = [CALL] * (end - begin)
        for low, high in arguments:
            kinds[low:high] = [ARGUMENTS] * (high - low)
    return [kinds[start] for start in starts[: len(texts)]]


def _calls_in(text: str, calls: Mapping[str, Any]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Beginning and end of each call, and those of its arguments."""
    opening = re.compile(calls.get("open_pattern") or re.escape(calls["open"]))
    closing = re.compile(calls.get("close_pattern") or re.escape(calls.get("close", "\\Z")))
    at = 0
    while (opened := opening.search(text, at)) is not None:
        closed = closing.search(text, opened.end())
        inner_end = closed.start() if closed else len(text)
        end = inner_end + len(closed.group().rstrip()) if closed else len(text)
        yield opened.start(), end, list(_arguments_in(text, opened.end(), inner_end, calls))
        at = max(end, opened.start() + 1)


def _arguments_in(text: str, begin: int, end: int, calls: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    inner = text[begin:end]
    pattern = (calls.get("content_args") or {}).get("tag_pattern")
    if pattern is not None:
        found = re.finditer(pattern, inner, re.DOTALL)
        yield from ((begin + one.start("value"), begin + one.end("value")) for one in found)
    elif named := _JSON_ARGUMENTS.search(inner):
        yield begin + named.start("value"), begin + named.end("value")
    elif "open_pattern" in calls:  # it holds the name, so that the content is the arguments
        yield begin, end
