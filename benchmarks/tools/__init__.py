"""Shared by the benchmarks: parameter trees, timing, command line, compiled programs."""
