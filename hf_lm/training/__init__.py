"""Training: the trainer, optimizers and checkpoints, and the recipe keys of all tasks."""
