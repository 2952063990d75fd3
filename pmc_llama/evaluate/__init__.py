"""Judging a model: how well it predicts papers that it was not trained on."""
