"""Benchmarks: nothing is timed before it is proved right, and every time is one of a pair."""
