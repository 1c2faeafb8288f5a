"""ImageNet as a stream, whose batches follow from seed and step, and training on it."""

import dataclasses
import functools
import gc
import io
import itertools
import math
import multiprocessing
import pathlib
from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest
import scipy.stats
import tensorflow_datasets as tfds

from experiments import data
from experiments.config.run import CheckpointConfig, DataConfig
from experiments.data import imagenet
from experiments.training import loop
from tests.helpers import runs

TRAIN, TEST = 23, 10


def encode(image: np.ndarray, kind: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def picture(seed: int) -> np.ndarray:
    """An image of a size and a colour of its own."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(60, 400, 2)
    ramp = np.linspace(0, 120, width)[None, :, None]
    return (np.ones((height, 1, 1)) * ramp + rng.uniform(0, 130, 3)).astype(np.uint8)


_Catalogue: Any = tfds.builder_cls("imagenet2012")


class SmallImagenet(_Catalogue, skip_registration=True):
    """The catalogue's features; the label of an image is its number."""

    name = "imagenet2012"
    pkg_dir_path = _Catalogue.pkg_dir_path
    splits = (("train", TRAIN), ("validation", TEST))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, n) for split, n in self.splits}

    def _generate_examples(self, split, n):
        for number in range(n):
            image = encode(picture(number + (0 if split == "train" else 1000)))
            name = f"{split}{number}"
            yield name, {"image": image, "label": number, "file_name": name}


def open_written(folder: pathlib.Path, builder: Any = SmallImagenet) -> data.Stream:
    builder(data_dir=folder).download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    stream = data.load("imagenet2012", folder)
    assert isinstance(stream, data.Stream)
    return stream


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> data.Stream:
    return open_written(tmp_path_factory.mktemp("imagenet"))


def take(batches: Any, n: int) -> list[data.Split]:
    return list(itertools.islice(batches, n))


def join(parts: list[list[data.Split]]) -> list[data.Split]:
    """Global batches from those of the processes."""
    return [
        data.Split(*map(np.concatenate, zip(*step, strict=True)))
        for step in zip(*parts, strict=True)
    ]


def test_every_pass_holds_every_image_once_in_an_order_of_its_own(stream):
    assert (stream.train_size, stream.test_size) == (TRAIN, TEST)
    assert stream.classes == 1000
    assert stream.image_shape == (224, 224, 3)
    assert len(stream.mean) == len(stream.std) == 3
    orders = set()
    for seed in (0, 1):
        batches = take(stream.train_batches(seed=seed, start=0, batch_size=6), 12)
        assert batches[0].inputs.shape == (6, 224, 224, 3)
        assert (batches[0].inputs.dtype, batches[0].labels.dtype) == (
            np.uint8,
            np.int32,
        )
        labels = np.concatenate([batch.labels for batch in batches])
        # Batches run on from one pass into the next.
        for start in (0, TRAIN, 2 * TRAIN):
            one = labels[start : start + TRAIN]
            assert sorted(one) == list(range(TRAIN))
            orders.add(tuple(one))
    assert len(orders) == 6


def test_batches_depend_on_seed_and_step_alone(stream):
    def batches(start: int = 0, **kwargs: Any) -> list[data.Split]:
        actual = stream.train_batches(seed=7, start=start, batch_size=4, **kwargs)
        return take(actual, 8 - start)

    whole = batches()
    assert runs.same(batches(), whole)
    for start in (1, 5, 7):
        assert runs.same(batches(start), whole[start:])
    for n in (2, 4):
        parts = [batches(3, process=process, processes=n) for process in range(n)]
        assert all(len(batch.labels) == 4 // n for batch in parts[0])
        assert runs.same(join(parts), whole[3:])
    # An image comes again in the next pass, with another crop.
    assert not runs.same(whole[:2], whole[6:])
    assert runs.same(batches(3, workers=1), whole[3:])
    tests = functools.partial(stream.test_batches, batch_size=4)
    assert runs.same(list(tests(workers=2)), list(tests()))
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("batch_size", "processes"), [(4, 2), (5, 1), (16, 4)])
def test_every_test_image_comes_exactly_once(stream, batch_size, processes):
    tests = functools.partial(
        stream.test_batches, batch_size=batch_size, processes=processes
    )
    parts = [list(tests(process=process)) for process in range(processes)]
    steps = math.ceil(TEST / batch_size)
    assert [len(part) for part in parts] == [steps] * processes
    images = np.concatenate([batch.inputs for batch in join(parts)])
    labels = np.concatenate([batch.labels for batch in join(parts)])
    assert len(labels) == steps * batch_size
    assert sorted(labels[labels >= 0]) == list(range(TEST))
    assert np.all(labels[TEST:] == -1)
    assert not images[labels < 0].any()
    for image, label in zip(images, labels, strict=True):
        if label >= 0:
            expected = imagenet.test_image(encode(picture(1000 + label)))
            assert np.array_equal(image, expected)


def test_the_centre_of_a_test_image_is_cut_out():
    # The shorter side has 256 pixels already: no pixel changes.
    rng = np.random.default_rng(0)
    for height, width, top, left in ((256, 300, 16, 38), (411, 256, 93, 16)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        actual = imagenet.test_image(encode(image, "png"))
        assert np.array_equal(actual, image[top : top + 224, left : left + 224])
    # Else it is resized: of a ramp over 512 columns, each is worth half of one.
    ramp = np.broadcast_to(np.arange(512) / 2, (600, 512))
    image = np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8)
    actual = imagenet.test_image(encode(image, "png"))
    assert actual.shape == (224, 224, 3)
    assert np.abs(actual - (16.0 + np.arange(224)[None, :, None])).max() <= 1


def test_random_crops_have_the_areas_and_ratios_they_should():
    side, n = 100_000, 6000
    rng = np.random.default_rng(0)
    boxes = np.array([imagenet.random_crop(rng, side, side) for _ in range(n)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert boxes.min() >= 0
    assert boxes.max() <= side
    area, ratio = width * height / side**2, np.log(width / height)
    assert area.min() > 0.0799
    # Crops of more than 3/4 of a square do not fit in every shape; all others do.
    fits = area < 0.75
    for sample, low, high in (
        (area[fits], 0.08, 0.75),
        (ratio[fits], math.log(3 / 4), math.log(4 / 3)),
        (left[fits] / (side - width[fits]), 0, 1),
        (top[fits] / (side - height[fits]), 0, 1),
    ):
        uniform = scipy.stats.uniform(low, high - low)
        assert scipy.stats.kstest(sample, uniform.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(area[fits], ratio[fits])[0, 1]) < 0.05
    # Two thirds of the rest of the areas, less what does not fit.
    assert 0.05 < 1 - fits.mean() < 0.25 / 0.92
    # Where no crop fits, the centre is taken.
    for width, height, box in (
        (10_000, 12, (4992, 0, 5008, 12)),
        (9, 10_000, (0, 4994, 9, 5006)),
    ):
        assert imagenet.random_crop(np.random.default_rng(0), width, height) == box


def test_crops_are_resized_and_half_of_them_are_mirrored():
    ramp = np.broadcast_to(np.linspace(0, 255, 320), (240, 320))
    image = encode(np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8), "png")
    n, mirrors = 300, 0
    for seed in range(n):
        actual = imagenet.train_image(image, np.random.default_rng(seed))
        assert actual.shape == (224, 224, 3)
        line = actual[112, :, 0].astype(int)
        box = imagenet.random_crop(np.random.default_rng(seed), 320, 240)
        ends = [box[0] * 255 / 319, (box[2] - 1) * 255 / 319]
        falls = line[0] > line[-1]
        mirrors += falls
        # The crop that the generator draws first, from edge to edge.
        assert np.abs(line[[-1, 0] if falls else [0, -1]] - ends).max() <= 2
    assert abs(mirrors - n / 2) < 4 * math.sqrt(n / 4)


def test_bad_arguments_and_damaged_data_are_named(stream, tmp_path):
    for changes, message in (
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"processes": 3}, "multiple of the number of processes, 3, got 4"),
        ({"process": 2, "processes": 2}, "process must lie in 0 to 1, got 2"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.train_batches(**({"seed": 0, "start": 0, "batch_size": 4} | changes))

    class OneSplit(SmallImagenet, skip_registration=True):
        name = "imagenet2012"
        splits = (("train", 3),)

    with pytest.raises(OSError, match="there is no split 'validation'"):
        open_written(tmp_path / "one", OneSplit)

    class NoImages(SmallImagenet, skip_registration=True):
        name = "imagenet2012"

        def _generate_examples(self, split, n):
            for key, example in super()._generate_examples(split, n):
                yield key, example | {"image": b"no image"}

    broken = open_written(tmp_path / "two", NoImages)
    with pytest.raises(OSError, match=r"imagenet2012/5\.1\.0 cannot be read"):
        take(broken.train_batches(seed=0, start=0, batch_size=2), 1)


CLASSES, TRAINED, TESTED = 4, 37, 21
CONFIG = dataclasses.replace(
    runs.CONFIG,
    method="static",
    steps=12,
    eval_every=6,
    data=DataConfig(dataset="imagenet2012", batch_size=8),
    checkpoint=CheckpointConfig(every=4, keep=10),
)


class Source(list[dict[str, Any]]):
    """A data source in memory."""

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[i] for i in indices]


def colour_image(number: int) -> dict[str, Any]:
    """An image whose colour tells its label, with noise on it."""
    label = number % CLASSES
    noise = np.random.default_rng(number).integers(0, 60, (20, 24, 3))
    return {"image": encode((noise + 50 * label).astype(np.uint8)), "label": label}


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "IMAGE_SIZE", 16)
    monkeypatch.setattr(imagenet, "RESIZED", 18)


@functools.cache
def setup(devices: int = 1, **changes: Any) -> loop.TrainSetup:
    dataset = data.Stream(
        name="imagenet2012",
        classes=CLASSES,
        mean=imagenet.IMAGENET_MEAN,
        std=imagenet.IMAGENET_STD,
        image_shape=(16, 16, 3),
        train_size=TRAINED,
        test_size=TESTED,
        train_source=Source(colour_image(i) for i in range(TRAINED)),
        test_source=Source(colour_image(1000 + i) for i in range(TESTED)),
    )
    config = dataclasses.replace(CONFIG, **changes)
    return loop.create(config, dataset, jax.devices()[:devices])


@pytest.mark.usefixtures("_small")
def test_training_on_a_stream_resumes_and_counts_every_test_image(tmp_path):
    each = setup()
    records, state = loop.fit(each, [3], tmp_path / "whole")
    assert [r.step for r in records[0]] == [0, 6, 12]
    assert state.order == ()
    for record in records[0]:
        assert record.test_accuracy == record.test_correct / TESTED
    assert records[0][-1].test_correct > TESTED / CLASSES + 3
    for at in (4, 7):
        with pytest.raises(loop.StoppedError):
            loop.fit(each, [3], tmp_path / "parts", stopped={at: 15}.get)
    _, resumed = loop.fit(each, [3], tmp_path / "parts")
    assert runs.same(resumed, state)
    assert runs.metrics(tmp_path / "parts") == runs.metrics(tmp_path / "whole")

    # The last evaluation, image by image.
    correct = 0
    for example in each.dataset.test_source:
        with PIL.Image.open(io.BytesIO(example["image"])) as image:
            # The shorter side of 20 becomes 18, the longer of 24 becomes 21.
            image = image.resize((21, 18), PIL.Image.Resampling.BILINEAR)
            x = np.asarray(image.crop((2, 1, 18, 17)), np.float64) / 255
        x = ((x - imagenet.IMAGENET_MEAN) / imagenet.IMAGENET_STD).reshape(-1)
        x = runs.lenet(jax.device_get(state.params), x)
        correct += int(x.argmax()) == example["label"]
    assert records[0][-1].test_correct == correct


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_several_devices_share_every_batch(parallel):
    losses, scores = [], []
    for each in (setup(), setup(4, parallel=parallel)):
        state = each.compiled_step.create([0])
        scores.append(loop.evaluate(each, state, 0))
        batches = loop.train_batches(each, 0, 0)
        for _ in range(3):
            state, loss = each.compiled_step.steps(state, next(batches), 1)
            losses.append(float(jax.block_until_ready(loss)[0, 0]))
    assert scores[0][0] == scores[1][0]
    np.testing.assert_allclose(scores[1][1], scores[0][1], rtol=1e-5)
    np.testing.assert_allclose(losses[3:], losses[:3], rtol=1e-4)


def test_a_scan_needs_its_data_on_the_device():
    with pytest.raises(ValueError, match="scan_block must be 1 for imagenet2012"):
        setup(scan_block=4)
