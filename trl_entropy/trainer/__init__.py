"""`DrGRPOTrainer`: overrides of TRL's trainer that call `super()`, and the owners of its training state."""
