"""Configurations of runs, methods, recipes, studies and sweeps."""
