"""Benchmarks: one file a row or a whole step, alternatives in the same run, results in git."""
