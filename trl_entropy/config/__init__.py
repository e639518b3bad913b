"""The settings of a run: fields, checks before anything is loaded, what a resumed run must share, command lines."""
