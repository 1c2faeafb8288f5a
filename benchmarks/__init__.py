"""Speed and memory of granet_jax, side by side with the alternatives in one run."""
