"""Every figure that the docs state, measured again: `python -m benchmarks`."""
