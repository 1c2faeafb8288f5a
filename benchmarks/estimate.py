"""An estimate of what a mask update costs on chips that were not at hand.

    python -m benchmarks.estimate --out DIR    # from DIR/scale.json

Not a measurement. From the compiled programs of `benchmarks.scale` come the bytes and
the number of collectives of a pass, and the most passes; from data sheets the speeds;
the latency of a collective is assumed. On Explicit mesh axes, where neither bytes nor
number depend on the number of devices. Seconds of an update on each chip:

    weights / chips x bytes a weight / memory bandwidth
    + passes x (collectives a pass x latency + 2 x bytes a pass / link bandwidth)
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import commands, scale, timing

# Read or written for each weight: in a pass its code; in a stage what the code is made
# of (parameter, gradient, momentum, activity), and the code; at the end of a phase the
# code and activity. A selection among float32 scores has four stages.
BYTES_A_PASS = 1
BYTES_A_PHASE = 4 * (3 * 4 + 1 + 1) + 3
CHIPS = (4, 64, 1024)
INTERVALS = (100, 1000)
# Assumed: of starting a collective in a loop, and of every link on its way.
START_SECONDS = 10e-6
LINK_SECONDS = 1e-6
# Links there and back along each side of a torus of so many chips, 2x2, 4x4x4, 8x8x16.
LINKS = {4: 4, 64: 12, 1024: 32}


class Chip(NamedTuple):
    """Published speeds of a chip, in bytes a second.

    Attributes:
      memory: bandwidth of its memory.
      link: to other chips, out of one, all links together.
      largest: most chips with such links.
    """

    memory: float
    link: float
    largest: int


# v5e, v5p: Google Cloud's documentation, "TPU v5e" and "TPU v5p" (half of the
# bidirectional bandwidth). H100 SXM: from memory of NVIDIA's data sheet (half of
# NVLink's bidirectional 900 GB/s); beyond a node of 8 the network decides.
PUBLISHED = {
    "TPU v5e": Chip(819e9, 200e9, 256),
    "TPU v5p": Chip(2765e9, 600e9, 6144),
    "H100 SXM": Chip(3350e9, 450e9, 8),
}


def update_seconds(case: dict[str, Any], chip: Chip, chips: int) -> float:
    """Seconds of a mask update on each of `chips`, for a case of `benchmarks.scale`."""
    phases, passes = scale.PHASES[case["method"]], case["passes"]
    per_weight = BYTES_A_PASS * passes + BYTES_A_PHASE * phases
    memory = case["masked_weights"] / chips * per_weight / chip.memory
    latency = START_SECONDS + LINKS[chips] * LINK_SECONDS
    collectives = sum(case["collectives"].values())
    sent = 2 * case["bytes_per_pass"] / chip.link
    return memory + passes * (collectives * latency + sent)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table of estimates."""
    parser = commands.parser(__doc__)
    options = parser.parse_args(arguments)
    if options.quick:
        return  # There is nothing to check.
    if options.out is None:
        parser.error("--out must be the folder with scale.json")
    cases = [
        case
        for case in json.loads((options.out / "scale.json").read_text())["cases"]
        if case["axes"] == "explicit" and "error" not in case
    ]
    most = max(case["devices"] for case in cases)
    header = ["tree", "method", "chip", "chips", "update ms"]
    header += [f"a step, every {n}, ms" for n in INTERVALS]
    rows = [
        [
            case["tree"],
            case["method"],
            name,
            str(chips),
            f"{1e3 * (seconds := update_seconds(case, chip, chips)):.2f}",
            *(f"{1e3 * seconds / n:.4f}" for n in INTERVALS),
        ]
        for case in cases
        if case["devices"] == most
        for name, chip in PUBLISHED.items()
        for chips in CHIPS
        if chips <= chip.largest
    ]
    commands.publish(options, "estimate", timing.table(header, rows), {}, {})


if __name__ == "__main__":
    main()
