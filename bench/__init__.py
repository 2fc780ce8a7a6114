"""Benchmarks from the tests' table of cases; installed as `geco_fast.bench`."""
