"""What the commands train, merge, fuse, evaluate, predict, explain and report do; see README.md."""

from .calibration_plot import write_calibration
from .evaluate import compare_runs, evaluate_run, read_metrics
from .explain import Choice, Explanation, explain_run
from .explain_files import check_folder as check_explanation_folder
from .explain_files import write_explanation
from .external import External
from .folds import split_cohort
from .join import blocks_of, cohort_of, fuse_runs, merge_runs
from .predict import predict_cohort
from .report.write_report import write_run_report
from .run_folder import Run, RunError
from .settings import Settings, Splits
from .train import train_run

__all__ = [
    "Choice",
    "Explanation",
    "External",
    "Run",
    "RunError",
    "Settings",
    "Splits",
    "blocks_of",
    "check_explanation_folder",
    "cohort_of",
    "compare_runs",
    "evaluate_run",
    "explain_run",
    "fuse_runs",
    "merge_runs",
    "predict_cohort",
    "read_metrics",
    "split_cohort",
    "train_run",
    "write_calibration",
    "write_explanation",
    "write_run_report",
]
