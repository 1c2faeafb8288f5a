"""Training runs with granet_jax; start at `python -m experiments.train --help`."""
