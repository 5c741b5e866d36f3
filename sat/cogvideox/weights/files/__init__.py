"""From a path to names, shapes and bytes: every container of weights, read as data. No torch, nothing of models."""
