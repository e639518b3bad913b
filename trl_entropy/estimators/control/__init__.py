"""What changes a step on purpose: the correction of its entropy change, tokens that are left out, their price."""
