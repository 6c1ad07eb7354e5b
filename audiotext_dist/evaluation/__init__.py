"""Retrieval: the metrics (pure), their computation over a set, and the report."""
