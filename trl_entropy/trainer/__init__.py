"""`DrGRPOTrainer`: overrides of TRL's trainer that call `super()`, and what checkpoints save of its state."""
