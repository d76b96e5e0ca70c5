"""Cohorts: patients, their modalities, outcome and splits. Entry point: `load_cohort`."""
