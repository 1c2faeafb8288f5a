"""A pretrained language model: its file, its network, its tokens, and texts for it.

`python -m experiments.prepare smollm2` downloads the model. Needs the packages of
`pip install '.[language]'`.
"""
