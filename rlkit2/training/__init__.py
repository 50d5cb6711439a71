"""The trainer, run folders, checkpoints and loggers."""
