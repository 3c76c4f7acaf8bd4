"""What compression did to each leaf, as a table, JSON or one HTML page."""

from angeljax._report._measure import CompressionReport, LeafReport, describe, report

__all__ = ["CompressionReport", "LeafReport", "describe", "report"]
