"""The settings of a run: fields, checks before anything is loaded, and the command line that fills them."""
