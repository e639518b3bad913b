"""The step of AdamW from gradient and moments, in its parts, and summaries of the moments."""
