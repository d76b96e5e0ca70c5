"""Cohorts: patients, their modalities, outcome and splits. `load_cohort` is the way in."""
