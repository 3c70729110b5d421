"""Top layer: hyperparameter search over the training stages."""
