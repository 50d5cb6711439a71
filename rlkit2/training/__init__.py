"""Trainer, run folders, checkpoints, recipes and loggers."""

from rlkit2.fields import describe_fields as describe_fields
from rlkit2.training.options import DataOptions as DataOptions
from rlkit2.training.options import OnlineOptions as OnlineOptions
from rlkit2.training.options import TrainingOptions as TrainingOptions
from rlkit2.training.recipe import Recipe as Recipe
from rlkit2.training.recipe import find_recipe as find_recipe
from rlkit2.training.recipe import load_recipe as load_recipe
from rlkit2.training.run import Run as Run
from rlkit2.training.trainer import Trainer as Trainer
