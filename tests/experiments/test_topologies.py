"""Dry runs for TPUs: what the compiler says of the whole training step."""

import re

import pytest

from experiments import train

OPTIONS = (
    *("--model", "lenet-5", "--method", "rigl", "--sparsity", "0.9"),
    *("--data.dataset", "fashion_mnist", "--data.batch-size", "128"),
)


def test_a_training_step_compiled_for_tpus(tmp_path, capsys, monkeypatch):
    for name in ("XLA_FLAGS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.delenv(name, raising=False)
    out = ("--out", str(tmp_path / "plan.png"), "--fsdp", "4")
    command = [*OPTIONS, *out, "--dry-run", "--topology", "v5e:2x2"]
    assert train.main(command) == 0
    text = capsys.readouterr().out.rpartition("Compiled for ")[2]
    assert text.startswith("v5e:2x2: 4 devices, jit, fsdp 4, batches of 128.")
    rows = dict(re.findall(r"^(\S.*?)  +(\S.*)$", text, flags=re.MULTILINE))
    assert rows["on each device"].split() == ["dense", "rigl"]
    # 430,500 weights with masks of one byte, and as many that entered, on four devices.
    assert rows["masks"].split("MiB")[1].strip() == f"{2 * 430_500 / 4 / 2**20:.2f}"
    dense, sparse = (float(x) for x in re.findall(r"[\d.]+", rows["parameters"]))
    assert dense == sparse == pytest.approx(4 * 431_080 / 4 / 2**20, abs=0.02)
    # All images as bytes, and their labels. A step that copied them would need more.
    held, needed = (
        [float(x) for x in re.findall(r"[\d.]+", rows[name])]
        for name in ("data", "activations, gradients")
    )
    assert held == pytest.approx([60_000 * (28 * 28 + 4) / 2**20] * 2, rel=0.02)
    assert max(needed) < 40
    assert rows["fits into 16 GiB"].split() == ["yes", "yes"]
    assert "all-reduce" in rows["sent in every step"]
    assert rows["sent in a mask update"].startswith("nothing")
    assert "a pass" in rows["sent in a mask update"]


def test_a_topology_without_a_dry_run_is_an_error(capsys):
    assert train.main([*OPTIONS, "--topology", "v5e:2x2"]) == 2
    assert "give --dry-run too" in capsys.readouterr().err
