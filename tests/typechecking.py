"""The run-time type check of the tests: beartype, less what transformers' own parser gets wrong."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do where a float is annotated, as in PEP 484


def checked(function: Callable) -> Callable:
    """`function` with its annotations checked, but for the fields that our arguments inherit: HfArgumentParser passes
    None where transformers' annotation has no None."""
    inherits = function.__qualname__.startswith(("DrGRPOConfig.__init__", "SFTConfig.__init__"))
    return function if inherits else _CHECK(function)
