"""The training run: its step, its loop, its state and its files."""
