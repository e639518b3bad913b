"""The run-time type check of the tests: beartype, of the folders that pyproject.toml names: those with tensors."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do where a float is annotated, as in PEP 484
