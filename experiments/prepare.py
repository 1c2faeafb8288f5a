"""Makes a data set ready for training: `python -m experiments.prepare NAME`."""

import pathlib
import sys
import time

import tyro

from experiments.data import preparation


def prepare(
    name: tyro.conf.Positional[str],
    data_dir: pathlib.Path | None = None,
    manual_dir: pathlib.Path | None = None,
) -> None:
    """Downloads a data set where it has to, and prepares it; once is enough.

    Args:
      name: digits, fashion_mnist, mnist, cifar10, cifar100, tiny_imagenet,
        tiny_shakespeare, python_docs or imagenet2012.
      data_dir: where prepared data sets are; by default the folder in TFDS_DATA_DIR,
        else ~/tensorflow_datasets.
      manual_dir: where files downloaded by hand are; by default downloads/manual in
        the former.
    """
    start = time.monotonic()
    folder, had_to = preparation.prepare(name, data_dir, manual_dir)
    seconds = time.monotonic() - start
    done = f"prepared in {seconds:.0f} s" if had_to else "was prepared already"
    print(f"{name} is in {folder}: {done}")


def main(args: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after an error."""
    try:
        tyro.cli(prepare, args=args)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
