"""Data in: cohorts. Imports neither torch nor the models."""

from .cohorts import Cohort, breast_cancer

__all__ = ["Cohort", "breast_cancer"]
