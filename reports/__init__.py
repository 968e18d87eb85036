"""The page and the figures that show what a run has learnt."""

from reports.page import Options, write_report

__all__ = ["Options", "write_report"]
