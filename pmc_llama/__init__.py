"""Token files to a model: recipes, sample order, the trainer, its sharding backends and checkpoints."""
