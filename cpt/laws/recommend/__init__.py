"""From fitted laws to the share of domain data: pure functions on losses that can be asked anywhere."""
