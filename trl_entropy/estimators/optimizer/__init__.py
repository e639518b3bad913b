"""The step of AdamW from its ingredients, and summaries of its moments."""
