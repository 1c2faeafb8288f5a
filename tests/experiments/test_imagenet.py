"""Training on a stream: batches made on the host, as for ImageNet.

The images are smaller than ImageNet's, so that the network is: 16 x 16.
"""

import dataclasses
import io
from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest

from experiments.config.run import CheckpointConfig, Config, DataConfig, MaskConfig
from experiments.data import Stream, imagenet
from experiments.training import loop
from tests.helpers import runs

TRAIN, TEST, CLASSES = 37, 21, 4
CONFIG = Config(
    method="granet",
    model="lenet-300-100",
    steps=12,
    seeds=1,
    eval_every=6,
    progress=False,
    masks=MaskConfig(interval=2),
    data=DataConfig(dataset="imagenet2012", batch_size=8),
    checkpoint=CheckpointConfig(every=4, keep=10),
)


def encoded(number: int) -> dict[str, Any]:
    """An image whose colour tells its label, with noise on it."""
    rng = np.random.default_rng(number)
    label = number % CLASSES
    pixels = rng.integers(0, 60, (20, 24, 3)) + 50 * label
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
    return {"image": file.getvalue(), "label": label}


class Source(list[dict[str, Any]]):
    """What is read of a data source."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[i] for i in indices]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "IMAGE_SIZE", 16)
    monkeypatch.setattr(imagenet, "RESIZED", 18)


def make(devices: int = 1, **changes: Any) -> loop.TrainSetup:
    dataset = Stream(
        name="imagenet2012",
        classes=CLASSES,
        mean=imagenet.IMAGENET_MEAN,
        std=imagenet.IMAGENET_STD,
        image_shape=(16, 16, 3),
        train_size=TRAIN,
        test_size=TEST,
        train_source=Source(encoded(i) for i in range(TRAIN)),
        test_source=Source(encoded(1000 + i) for i in range(TEST)),
    )
    config = dataclasses.replace(CONFIG, **changes)
    return loop.create(config, dataset, jax.devices()[:devices])


def stop_at(wanted: int) -> Any:
    return lambda step: 15 if step == wanted else None


def test_a_stream_trains_resumes_and_counts_every_test_image(tmp_path):
    maker = make()
    records, state = loop.fit(maker, [3], tmp_path / "whole")
    assert [r.step for r in records[0]] == [0, 6, 12]
    assert state.order == ()
    for record in records[0]:
        assert record.test_accuracy == record.test_correct / TEST
    assert records[0][-1].test_correct > TEST / CLASSES + 3

    for at in (4, 7):
        with pytest.raises(loop.StoppedError):
            loop.fit(maker, [3], tmp_path / "parts", stopped=stop_at(at))
    _, resumed = loop.fit(maker, [3], tmp_path / "parts")
    assert runs.same(resumed, state)
    assert runs.lines(tmp_path / "parts") == runs.lines(tmp_path / "whole")


def test_evaluation_is_that_of_the_images_one_by_one():
    maker = make()
    state = maker.compiled_step.create([0])
    correct = 0
    for i in range(TEST):
        example = maker.dataset.test_source[i]
        with PIL.Image.open(io.BytesIO(example["image"])) as image:
            # The shorter side of 20 becomes 18, the longer of 24 becomes 21.
            image = image.resize((21, 18), PIL.Image.Resampling.BILINEAR)
            x = np.asarray(image.crop((2, 1, 18, 17)), np.float64) / 255
        x = ((x - imagenet.IMAGENET_MEAN) / imagenet.IMAGENET_STD).reshape(-1)
        for name in ("hidden_0", "hidden_1", "output"):
            layer = jax.tree.map(np.asarray, state.params[name])
            x = x @ layer["kernel"] + layer["bias"]
            x = np.maximum(x, 0) if name != "output" else x
        correct += int(x.argmax()) == example["label"]
    (record,) = loop._evaluate(maker, state, 0, loop.Losses(1), 0.0)
    assert record.test_correct == correct


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_several_devices_share_every_batch(parallel):
    losses, records = {}, {}
    for devices in (1, 4):
        maker = make(devices, parallel=parallel)
        state = maker.compiled_step.create([0])
        (records[devices],) = loop._evaluate(maker, state, 0, loop.Losses(1), 0.0)
        batches = loop.train_batches(maker, 0, 0)
        losses[devices] = []
        for _ in range(3):
            state, loss = maker.compiled_step.steps(state, next(batches), 1)
            losses[devices].append(float(jax.block_until_ready(loss)[0, 0]))
    assert records[4].test_correct == records[1].test_correct
    np.testing.assert_allclose(records[4].test_loss, records[1].test_loss, rtol=1e-5)
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-4)


def test_a_scan_needs_its_data_on_the_device():
    with pytest.raises(ValueError, match="scan_block must be 1 for imagenet2012"):
        make(scan_block=4)
