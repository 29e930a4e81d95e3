"""What a run needs before it runs: memory of each rank by part, and time, from sizes alone."""
