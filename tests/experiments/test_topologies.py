"""Dry runs for TPUs and GPUs: what the compiler says of the whole training step."""

import re

import pytest

from experiments import train

OPTIONS = (
    *("--model", "lenet-300-100", "--method", "rigl", "--sparsity", "0.9"),
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
    assert rows["masks"].split("MiB")[1].strip() == f"{2 * 266_200 / 4 / 2**20:.2f}"
    dense, sparse = (float(x) for x in re.findall(r"[\d.]+", rows["parameters"]))
    assert dense == sparse == pytest.approx(4 * 266_610 / 4 / 2**20, abs=0.02)
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


@pytest.mark.slow  # The weekly run has the extra gpu-compiler.
def test_a_training_step_compiled_for_gpus(tmp_path, capsys):
    command = [*OPTIONS, "--out", str(tmp_path / "plan.png")]
    command += ["--parallel", "pmap", "--dry-run", "--topology", "h100:2"]
    assert train.main(command) == 0
    text = capsys.readouterr().out.rpartition("Compiled for ")[2]
    assert text.startswith("h100:2: 2 devices, pmap, replicated, batches of 128.")
    rows = dict(re.findall(r"^(\S.*?)  +(\S.*)$", text, flags=re.MULTILINE))
    assert rows["masks"].split("MiB")[1].strip() == f"{2 * 266_200 / 2**20:.2f}"
    assert rows["fits into 80 GiB"].split() == ["yes", "yes"]
    # Each device has all masks: only gradients are sent, in updates too.
    assert rows["sent in every step"].count("all-reduce") == 2
    assert rows["sent in a mask update"].split() == ["nothing", "nothing"]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "KIND:SHAPE with KIND one of v4, "),
        ("v5e", "KIND:SHAPE with KIND one of v4, "),
        ("v5e:3x5", "v5e:3x5 is not known to the compiler"),
        ("h100:2x2", "the number of GPUs, such as h100:8, got h100:2x2"),
    ],
)
def test_topologies_that_do_not_fit(topology, message, tmp_path, capfd):
    out = ("--out", str(tmp_path / "plan.png"))
    command = [*OPTIONS, *out, "--dry-run", "--topology", topology]
    capfd.readouterr()
    assert train.main(command) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("topology", "extra"), [("v5e:2x2", "tpu"), ("h100:2", "gpu-compiler")]
)
def test_a_missing_compiler_is_named(topology, extra, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train.main([*OPTIONS, "--dry-run", "--topology", topology]) == 2
    assert f"pip install '.[{extra}]'" in capsys.readouterr().err


def test_a_topology_without_a_dry_run_is_an_error(capsys):
    assert train.main([*OPTIONS, "--topology", "v5e:2x2"]) == 2
    assert "give --dry-run too" in capsys.readouterr().err
