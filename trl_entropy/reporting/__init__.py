"""The page of a run: sections, tables, figures and warnings from what the run directory holds. Imports no torch."""
