"""What can be trained: models by name, adapters, the embedded model and its warm start, fine-tuning."""
