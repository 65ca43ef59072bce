"""Counts the instructions of the hot path: see `__main__`, and `scenarios` for what is counted."""

OPERATIONS = 200  # that are counted in each scenario
