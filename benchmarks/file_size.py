r"""Size of a file of sparse parameters, compared with the entropy of the masks.

    python -m benchmarks.file_size          # 25.5 M parameters, about a minute
    python -m benchmarks.file_size --quick  # small tree: only checks the files

The tree is ResNet-50's, with initial weights and the masks of their largest magnitudes
across layers. "bit mask" is the computed size of the same file with masks at one bit a
weight. "bound" is the least size for masks of these densities, values included
(`export.mask_entropy`). Every file is loaded again, and must be equal to the bit.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import granet_jax
from benchmarks.tools import command_line, parameter_trees, results
from granet_jax import export, mask_sources

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
MEGABYTE = 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes and reads a file for every sparsity."""
    options = command_line.parser(__doc__).parse_args(arguments)
    quick = options.quick
    shapes = parameter_trees.small_resnet() if quick else parameter_trees.resnet50()
    dense = parameter_trees.draw(shapes, seed=0)
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in SPARSITIES:
            files.append(measure(dense, sparsity, Path(folder) / "parameters"))
            print(f"{sparsity:.0%}: loaded equal to the bit", flush=True)
    if quick:
        return
    rows = [
        [
            f"{file['sparsity']:.0%}",
            *(f"{file[k] / MEGABYTE:.2f}" for k in ("file", "bit_mask", "bound")),
            *(f"{8 * file[k] / file['weights']:.4f}" for k in ("masks", "entropy")),
            *(f"{file[k]:.1f}" for k in ("save_seconds", "load_seconds")),
        ]
        for file in files
    ]
    header = ["sparsity", "file / MB", "bit mask / MB", "bound / MB"]
    header += ["mask bits a weight", "entropy", "save s", "load s"]
    dense_size = 4 * parameter_trees.size(shapes) / MEGABYTE
    results.publish(
        options,
        "file_size",
        f"Dense: {dense_size:.1f} MB.\n\n{results.table(header, rows)}",
        {"results": files},
        {},
    )


def measure(
    dense: parameter_trees.PyTree, sparsity: float, path: Path
) -> dict[str, float]:
    """Saves and loads a file; returns the bytes of its parts, and seconds."""
    masks = mask_sources.magnitude(dense, sparsity, scope="global")
    params, masks = jax.device_get((granet_jax.apply_masks(dense, masks), masks))
    start = time.perf_counter()
    export.save(path, params, masks)
    saved = time.perf_counter()
    loaded, loaded_masks = export.load(path)
    seconds = (saved - start, time.perf_counter() - saved)
    for original, copy in ((params, loaded), (masks, loaded_masks)):
        assert jax.tree.structure(original) == jax.tree.structure(copy)
        for a, b in zip(jax.tree.leaves(original), jax.tree.leaves(copy), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    report = granet_jax.sparsity(masks)
    values = 4 * report.active
    values += sum(x.nbytes for x in jax.tree.leaves(params)) - 4 * report.total
    size = path.stat().st_size
    packed = sum(x.nbytes for x in jax.tree.leaves(granet_jax.pack_masks(masks)))
    entropy = export.mask_entropy(masks) / 8
    return {
        "sparsity": sparsity,
        "weights": report.total,
        "file": size,
        "bit_mask": values + packed,
        "bound": values + entropy,
        # Names, shapes and JSON count as part of the masks.
        "masks": size - values,
        "entropy": entropy,
        "save_seconds": seconds[0],
        "load_seconds": seconds[1],
    }


if __name__ == "__main__":
    main()
