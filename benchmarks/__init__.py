"""Speed and memory of granet_jax, measured next to the alternatives in one run."""
