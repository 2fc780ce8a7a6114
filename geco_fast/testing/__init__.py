"""What tests and benchmarks share: one table of cases per operator, and the accuracy rule."""
