"""A run directory as pandas tables and matplotlib figures. Imports no torch."""
