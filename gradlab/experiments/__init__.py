"""Data and experiments on it, behind the ``gradlab`` command; needs the extra ``[experiments]``."""

from gradlab.experiments import command as command
from gradlab.experiments import data as data
from gradlab.experiments import files as files
from gradlab.experiments import recipes as recipes

__all__ = ["command", "data", "files", "recipes"]
