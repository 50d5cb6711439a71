"""Tables, plots and reports."""

from rlkit2.reporting.comparison import Comparison, Group, Row, compare, group_runs
from rlkit2.reporting.figures import learning_curves, metric_curves
from rlkit2.reporting.report import write_report

__all__ = ["Comparison", "Group", "Row", "compare", "group_runs", "learning_curves", "metric_curves", "write_report"]
