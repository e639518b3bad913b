"""Docstrings name things as [`Probe`] or [`Run.steps`]; the site shows them as code. An extension of griffe."""

import re

import griffe

_REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")


class PlainReferences(griffe.Extension):
    """Takes the brackets off such names before a docstring is rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = _REFERENCE.sub(r"`\1`", obj.docstring.value)
