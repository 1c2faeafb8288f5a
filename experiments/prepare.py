"""Prepare a data set or a pretrained model: `python -m experiments.prepare NAME`."""

import pathlib
import sys
import time

import tyro

from experiments.data import preparation
from experiments.language import preparation as language


def prepare(
    name: tyro.conf.Positional[str],
    data_dir: str | None = None,
    manual_dir: pathlib.Path | None = None,
) -> None:
    """Downloads a data set or a model if necessary and prepares it. Once is enough.

    Args:
      name: digits, fashion_mnist, fashion_mnist_photos, mnist, cifar10, cifar100,
        tiny_imagenet, tiny_shakespeare, python_docs or imagenet2012; or smollm2, a
        pretrained language model.
      data_dir: Folder of prepared data sets; by default the folder in TFDS_DATA_DIR,
        otherwise ~/tensorflow_datasets.
      manual_dir: Folder of files downloaded by hand; by default downloads/manual in
        the data folder.
    """
    start = time.monotonic()
    folder, is_new = (
        language.prepare(data_dir, manual_dir)
        if name == language.NAME
        else preparation.prepare(name, data_dir, manual_dir)
    )
    seconds = time.monotonic() - start
    result = f"prepared in {seconds:.0f} s" if is_new else "was prepared already"
    print(f"{name} is in {folder}: {result}")


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 2 after an error."""
    try:
        tyro.cli(prepare, args=args)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
