"""Data sets: shapes and scales, the test split, the division among clients, and what a wrong option says."""

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fedcore.errors import ConfigError
from fedexamples import datasets
from fedexamples.datasets import Dataset, ShardOptions, dirichlet_shards, load, load_shard, stratified_split


@pytest.fixture(scope="module")
def digits() -> Dataset:
    pytest.importorskip("sklearn")
    return load("digits")


@pytest.fixture
def fashion_folder(tmp_path: Path) -> Path:
    """Sixty training and twenty test images of 28x28 in the four files of Fashion-MNIST."""
    for prefix, samples in (("train", 60), ("t10k", 20)):
        pixels = np.random.default_rng(samples).integers(0, 256, (samples, 28, 28), dtype=np.uint8)
        labels = np.arange(samples, dtype=np.uint8) % 10
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def write_idx(path: Path, values: npt.NDArray[np.uint8]) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def test_digits_come_as_the_model_takes_them(digits: Dataset) -> None:
    assert digits.train_images.shape == (1437, 1, 32, 32)
    assert digits.test_images.shape == (360, 1, 32, 32)
    assert digits.train_images.dtype == digits.test_images.dtype == np.float32
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int64
    assert abs(digits.train_images.mean()) < 0.01
    assert abs(digits.train_images.std() - 1) < 0.01
    black, white = (0 - 0.305) / 0.324, (1 - 0.305) / 0.324
    assert digits.train_images.min() == pytest.approx(black)
    assert digits.train_images.max() == pytest.approx(white)


def test_the_digits_test_set_holds_every_class_alike_and_never_changes(digits: Dataset) -> None:
    counts = np.bincount(digits.test_labels, minlength=10)
    assert counts.min() >= 35
    assert counts.max() <= 37
    assert np.array_equal(digits.test_images, load("digits").test_images)


def test_the_file_read_is_what_scikit_learn_itself_reads() -> None:
    original = pytest.importorskip("sklearn.datasets").load_digits()
    assert np.array_equal(datasets._digits_table(), np.column_stack((original.data, original.target)))


def test_a_file_that_scikit_learn_moved_is_found(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Elsewhere:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: Elsewhere)
    assert np.array_equal(load("digits").train_images, digits.train_images)


def test_digits_without_scikit_learn_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        load("digits")


def test_stretching_keeps_the_middle_a_flat_image_flat_and_a_ramp_straight() -> None:
    stretch = datasets._bilinear(8, 32)
    assert np.allclose(stretch.sum(axis=1), 1)
    assert np.allclose(stretch, stretch[::-1, ::-1])
    steps = np.diff(stretch @ np.arange(8, dtype=np.float32))
    assert np.allclose(steps[2:-2], 0.25)


def test_fashion_mnist_is_padded_with_black(fashion_folder: Path) -> None:
    loaded = load("fashion-mnist", fashion_folder)
    assert loaded.train_images.shape == (60, 1, 32, 32)
    assert loaded.test_images.shape == (20, 1, 32, 32)
    assert loaded.train_images.dtype == np.float32
    assert loaded.test_labels.dtype == np.int64
    assert loaded.test_labels.tolist() == [*range(10)] * 2
    black = loaded.train_images.min()
    assert np.all(loaded.train_images[:, :, :2] == black)
    assert np.all(loaded.train_images[:, :, :, -2:] == black)
    pixels = np.random.default_rng(60).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    restored = (loaded.train_images[:, 0, 2:-2, 2:-2] * 0.332 + 0.219) * 255
    assert np.allclose(restored, pixels, atol=0.01)


def test_missing_fashion_mnist_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist"):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"not gzip",
        gzip.compress(b""),
        gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 1, 28, 28)),
        gzip.compress(b"\0\0\x0d\x03" + struct.pack(">3I", 1, 1, 4) + b"abcd"),
        gzip.compress(b"a good start")[:-9],
    ],
    ids=["not gzip", "empty", "no pixels", "floats", "cut off"],
)
def test_a_broken_file_is_named(fashion_folder: Path, content: bytes) -> None:
    (fashion_folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte\.gz"):
        load("fashion-mnist", fashion_folder)


def test_unknown_data_set_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="digits, fashion-mnist"):
        load("mnist")


@pytest.mark.parametrize("shards", [1, 2, 8, 35])
@pytest.mark.parametrize("alpha", [0.001, 0.5, 1e6])
def test_shards_partition_the_samples_and_none_is_too_small(shards: int, alpha: float) -> None:
    labels = np.random.default_rng(5).integers(0, 10, 1437)
    parts = dirichlet_shards(labels, shards, alpha, seed=3)
    assert len(parts) == shards
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1437))
    assert min(map(len, parts)) >= datasets.SMALLEST_SHARD
    assert all(np.all(np.diff(part) > 0) for part in parts)


def test_small_alpha_divides_unevenly_and_large_alpha_evenly() -> None:
    labels = np.arange(1440) % 10
    uneven = [len(part) for part in dirichlet_shards(labels, 8, alpha=0.5, seed=0)]
    even = [len(part) for part in dirichlet_shards(labels, 8, alpha=1e6, seed=0)]
    assert max(uneven) > 2 * min(uneven)
    assert max(even) - min(even) <= 10
    shares = [
        np.bincount(labels[part], minlength=10).max() / len(part)
        for part in dirichlet_shards(labels, 8, 0.5, 0)
    ]
    assert np.mean(shares) > 0.2


def test_the_division_depends_on_its_arguments_only() -> None:
    labels = np.arange(1000) % 10
    first, again, other = (dirichlet_shards(labels, 4, 0.5, seed) for seed in (7, 7, 8))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_too_many_shards_say_how_many_fit() -> None:
    with pytest.raises(ConfigError, match="at most 35"):
        dirichlet_shards(np.zeros(1437, dtype=np.int64), 36, 0.5, seed=0)


@pytest.mark.parametrize("held_out", [0, 1, 360, 1000])
def test_a_stratified_split_takes_exactly_its_number_from_all_classes(held_out: int) -> None:
    labels = np.random.default_rng(1).integers(0, 10, 1000)
    kept, picked = stratified_split(labels, held_out, seed=4)
    assert len(picked) == held_out
    assert np.array_equal(np.sort(np.concatenate((kept, picked))), np.arange(1000))
    fair = np.bincount(labels, minlength=10) * held_out / 1000
    assert np.all(np.abs(np.bincount(labels[picked], minlength=10) - fair) <= 1)


def test_all_shards_together_are_the_training_set(digits: Dataset) -> None:
    parts = [load_shard(ShardOptions(shard, 8, "digits", seed=2, alpha=0.5)) for shard in range(8)]
    images = np.concatenate([np.concatenate((p.train_images, p.evaluation_images)) for p in parts])
    labels = np.concatenate([np.concatenate((p.train_labels, p.evaluation_labels)) for p in parts])
    assert np.array_equal(np.bincount(labels), np.bincount(digits.train_labels))
    assert len({image.tobytes() for image in images}) == len(
        {image.tobytes() for image in digits.train_images}
    )
    assert {image.tobytes() for image in images} == {image.tobytes() for image in digits.train_images}
    assert all(
        0.1 < len(p.evaluation_labels) / (len(p.train_labels) + len(p.evaluation_labels)) < 0.15
        for p in parts
    )


def test_options_are_read_from_strings() -> None:
    options = ShardOptions.parse(shard="3", shards="8", data="digits", seed="7", alpha="0.5")
    assert options == ShardOptions(3, 8, "digits", 7, 0.5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shard", "8", r"shard=8 is out of range \(allowed: 0..7\)"),
        ("shard", "-1", r"shard=-1 is out of range \(allowed: 0..7\)"),
        ("shard", "one", r"shard='one' is not a whole number"),
        ("shards", "0", r"shards=0 is out of range \(allowed: >= 1\)"),
        ("shards", "2.5", r"shards='2.5' is not a whole number"),
        ("seed", "-3", r"seed=-3 is out of range"),
        ("seed", "", r"seed='' is not a whole number"),
        ("data", "cifar", r"data='cifar' is not a known data set \(one of: digits, fashion-mnist\)"),
        ("alpha", "0", r"alpha=0.0 is out of range"),
        ("alpha", "nan", r"alpha=nan is out of range"),
        ("alpha", "inf", r"alpha=inf is out of range"),
        ("alpha", "half", r"alpha='half' is not a number"),
    ],
)
def test_a_wrong_option_is_named_with_its_range(name: str, value: str, message: str) -> None:
    good = {"shard": "0", "shards": "8", "data": "digits", "seed": "0", "alpha": "0.5"}
    with pytest.raises(ConfigError, match=message):
        ShardOptions.parse(**{**good, name: value})
