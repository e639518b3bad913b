"""The run-time type check of the tests: beartype, less what transformers' own parser gets wrong."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do where a float is annotated, as in PEP 484


def checked(function: Callable) -> Callable:
    """`function` with its annotations checked, but for DrGRPOConfig's inherited fields: HfArgumentParser passes None
    where transformers' annotation has no None."""
    return function if function.__qualname__.startswith("DrGRPOConfig.__init__") else _CHECK(function)
