r"""Size of the file of sparse parameters, beside the entropy of their masks.

    python -m benchmarks.file_size          # 25.5 M parameters, about a minute
    python -m benchmarks.file_size --quick  # small tree: checks only

The tree is ResNet-50's, with weights as at initialisation and the masks of their
largest magnitudes, across layers. "bit mask" is the file with masks at one bit a weight
instead (computed), "bound" the least for masks of these densities, values included
(`export.mask_entropy`). Every file is loaded again, and equal to the bit.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import granet_jax
from benchmarks import commands, resnet50, timing
from granet_jax import export, mask_sources

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
MEGABYTE = 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes and reads a file for every sparsity."""
    options = commands.parser(__doc__).parse_args(arguments)
    shapes = resnet50.small_shapes() if options.quick else resnet50.shapes()
    dense = resnet50.draw(shapes, seed=0)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in SPARSITIES:
            results.append(measured(dense, sparsity, Path(folder) / "parameters"))
            print(f"{sparsity:.0%}: comes back to the bit", flush=True)
    if options.quick:
        return
    rows = [
        [
            f"{r['sparsity']:.0%}",
            *(f"{r[k] / MEGABYTE:.2f}" for k in ("file", "bit_mask", "bound")),
            *(f"{8 * r[k] / r['weights']:.4f}" for k in ("masks", "entropy")),
            *(f"{r[k]:.1f}" for k in ("save_seconds", "load_seconds")),
        ]
        for r in results
    ]
    header = ["sparsity", "file / MB", "bit mask / MB", "bound / MB"]
    header += ["mask bits a weight", "entropy", "save s", "load s"]
    dense_size = 4 * resnet50.size(shapes) / MEGABYTE
    commands.publish(
        options,
        "file_size",
        f"Dense: {dense_size:.1f} MB.\n\n{timing.table(header, rows)}",
        {"results": results},
        {},
    )


def measured(dense: resnet50.Shapes, sparsity: float, path: Path) -> dict[str, float]:
    """Bytes of the file and its parts, and seconds."""
    masks = mask_sources.magnitude(dense, sparsity, scope="global")
    params, masks = jax.device_get((granet_jax.apply_masks(dense, masks), masks))
    start = time.perf_counter()
    export.save(path, params, masks)
    saved = time.perf_counter()
    loaded, loaded_masks = export.load(path)
    seconds = (saved - start, time.perf_counter() - saved)
    for given, found in ((params, loaded), (masks, loaded_masks)):
        assert jax.tree.structure(given) == jax.tree.structure(found)
        for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(found), strict=True):
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
        # Names, shapes and JSON counted with the masks.
        "masks": size - values,
        "entropy": entropy,
        "save_seconds": seconds[0],
        "load_seconds": seconds[1],
    }


if __name__ == "__main__":
    main()
