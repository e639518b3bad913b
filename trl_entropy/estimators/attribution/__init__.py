"""Which part of a step, which completion and which token changed the entropy."""
