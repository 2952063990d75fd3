"""Judging a model: its answers to questions, and how well it predicts papers that it was not trained on."""
