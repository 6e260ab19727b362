"""The quality of SAEs from our trainer beside those from SAELens' own; `python -m benchmarks.quality`."""
