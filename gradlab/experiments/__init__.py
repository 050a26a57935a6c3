"""Data and experiments on it, behind the ``gradlab`` command; needs the extra ``[experiments]``."""

from gradlab.experiments import command as command
from gradlab.experiments import data as data
from gradlab.experiments import figures as figures
from gradlab.experiments import files as files
from gradlab.experiments import models as models
from gradlab.experiments import recipes as recipes
from gradlab.experiments import tables as tables
from gradlab.experiments import train as train

__all__ = ["command", "data", "figures", "files", "models", "recipes", "tables", "train"]
