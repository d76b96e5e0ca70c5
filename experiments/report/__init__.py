"""The report of finished runs: one page with the figures, pictures and patients of a cohort."""
