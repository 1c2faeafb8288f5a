"""Short notebooks; `python -m notebooks.build` runs them and keeps their outputs."""
