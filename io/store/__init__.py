"""The feature store: a folder with the features of a cohort's slides; see README.md."""
