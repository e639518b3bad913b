"""Models to train: by name or folder, with adapters, the embedded model and its warm start; supervised fine-tuning."""
