"""
Published claims, each put to the test: `trl-entropy experiment claims --runs FOLDER`.

A claim is a file of this folder: where it stands, what it says, what would refute it, chosen before the measurement,
and the measurement. `families.py` has the training runs that the claims read, `command.py` the command.
"""

from trl_entropy.experiments.claims.command import main

__all__ = ["main"]
