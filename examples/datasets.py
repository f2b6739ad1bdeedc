"""Data sets for the examples, and their division among clients.

What lives here: two image data sets in LeNet's format (float32[n, 1, 32, 32], mean about 0, deviation about
1), the uneven division that federated learning is about, and the part of one client (``ShardOptions`` ->
``Shard``).

Rules kept: everything is a function of its arguments, so all clients that agree on ``data``, ``shards``,
``alpha`` and ``seed`` hold disjoint parts of one data set without a word between them; nothing is downloaded.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import ConfigError

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

NAMES = ("digits", "fashion-mnist")
SIDE = 32  # pixels; LeNet-5's input, so that its last feature map is 5x5
CLASSES = 10
DIGITS_TEST_SAMPLES = 360  # of 1,797: one in five
SMALLEST_SHARD = 40  # samples; fewer make a client's local steps mostly noise
EVALUATION_SHARE = 1 / 8  # of a shard, kept back for Trainer.evaluate
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it

_TEST_SPLIT_SEED = 1998  # any constant: every client and server must mean the same test set
_WHITE = {"digits": 16, "fashion-mnist": 255}
# Mean and deviation of the training pixels, stretched or padded to 32x32, as shares of white.
_PIXEL_STATISTICS = {"digits": (0.305, 0.324), "fashion-mnist": (0.219, 0.332)}


@dataclass(frozen=True)
class Dataset:
    """A data set as the models take it.

    Attributes:
        train_images: float32[n, 1, 32, 32], mean about 0, deviation about 1.
        train_labels: int64[n], 0..9.
        test_images: float32[m, 1, 32, 32]; no client trains on them.
        test_labels: int64[m], 0..9.
    """

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


@dataclass(frozen=True)
class Shard:
    """The part of one client, taken from the training samples of a data set.

    Attributes:
        train_images: float32[n, 1, 32, 32].
        train_labels: int64[n], 0..9.
        evaluation_images: float32[m, 1, 32, 32], about one sample in eight.
        evaluation_labels: int64[m], 0..9.
    """

    train_images: Images
    train_labels: Labels
    evaluation_images: Images
    evaluation_labels: Labels


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """Which part of which data set a client holds. All clients of one training agree on all but ``shard``.

    Attributes:
        shard: number of this part, 0..shards-1.
        shards: number of parts, >= 1.
        data: "digits" or "fashion-mnist".
        seed: >= 0; decides the division and the order of training.
        alpha: concentration of the Dirichlet distribution, > 0; small = every client has its own few classes,
            large (100) = all clients alike.
        central: samples that a worker holds (``load_central``) and no client, >= 0.
        labelled: samples of its part that a client has labels for and so can use, >= 1; 0 = all.
    """

    shard: int
    shards: int
    data: str
    seed: int
    alpha: float
    central: int = 0
    labelled: int = 0

    @classmethod
    def parse(
        cls,
        *,
        shard: int | str,
        shards: int | str,
        data: str,
        seed: int | str,
        alpha: float | str,
        central: int | str = 0,
        labelled: int | str = 0,
    ) -> ShardOptions:
        """Read options given as on a command line.

        Raises:
            ConfigError: a value is no number or out of range; the text names option, value and range.
        """
        count = _whole_number("shards", shards, least=1)
        if data not in NAMES:
            raise ConfigError(f"data={data!r} is not a known data set", hint=f"one of: {', '.join(NAMES)}")
        return cls(
            shard=_whole_number("shard", shard, least=0, most=count - 1),
            shards=count,
            data=data,
            seed=_whole_number("seed", seed, least=0),
            alpha=_positive_number("alpha", alpha),
            central=_whole_number("central", central, least=0),
            labelled=_whole_number("labelled", labelled, least=0),
        )


def _whole_number(name: str, value: int | str, *, least: int, most: int | None = None) -> int:
    allowed = f">= {least}" if most is None else f"{least}..{most}"
    try:
        number = int(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} is not a whole number", hint=f"allowed: {allowed}") from None
    if number < least or (most is not None and number > most):
        raise ConfigError(f"{name}={number} is out of range", hint=f"allowed: {allowed}")
    return number


def _positive_number(name: str, value: float | str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r} is not a number", hint="allowed: > 0, for example 0.5") from None
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"{name}={number} is out of range", hint="allowed: > 0, for example 0.5")
    return number


def load(name: str, folder: Path = FASHION_MNIST_FOLDER) -> Dataset:
    """Load a whole data set.

    Args:
        name: "digits" (scikit-learn's 8x8 digits: 1,437 + 360 samples) or "fashion-mnist" (60,000 + 10,000
            samples, 287 MB).
        folder: where the four idx.gz files of Fashion-MNIST lie.

    Raises:
        ConfigError: unknown name, or the package that holds the data is missing.
    """
    raw = _read(name, folder)
    return Dataset(
        train_images=_model_input(name, raw.train_pixels),
        train_labels=raw.train_labels,
        test_images=_model_input(name, raw.test_pixels),
        test_labels=raw.test_labels,
    )


def load_shard(options: ShardOptions, folder: Path = FASHION_MNIST_FOLDER) -> Shard:
    """Load one client's part; only that part is ever turned into floats.

    Args:
        options: which part.
        folder: as for ``load``.

    Raises:
        ConfigError: as for ``load``, or there are too many shards for the data set.
    """
    raw = _read(options.data, folder)
    own = divide(raw.train_labels, options)[options.shard]
    return _shard(options.data, raw, own, (options.seed, options.shard))


def load_central(options: ShardOptions, folder: Path = FASHION_MNIST_FOLDER) -> Shard:
    """Load the ``options.central`` samples that no client holds; ``options.shard`` does not matter.

    Args:
        options: of the clients.
        folder: as for ``load``.

    Raises:
        ConfigError: as for ``load``, or the data set has fewer samples.
    """
    raw = _read(options.data, folder)
    _, own = _set_aside(raw.train_labels, options)
    return _shard(options.data, raw, own, (options.seed, options.shards))


def divide(labels: Labels, options: ShardOptions) -> list[npt.NDArray[np.int64]]:
    """Divide the samples of a data set among the clients that the options describe.

    Args:
        labels: int64[n], the class of each sample.
        options: ``options.shard`` does not matter.

    Returns:
        One ascending int64 index array per client; no index is in two of them, nor among the central samples.

    Raises:
        ConfigError: there are too many clients, or too many central samples, for the data set.
    """
    rest, _ = _set_aside(labels, options)
    parts = dirichlet_shards(labels[rest], options.shards, options.alpha, options.seed)
    own = [rest[part] for part in parts]
    if not options.labelled:
        return own
    random = np.random.default_rng((options.seed, options.shards))
    return [np.sort(random.permutation(part)[: options.labelled]) for part in own]


def _set_aside(labels: Labels, options: ShardOptions) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the indices of the clients' samples and of the central ones, all classes among these."""
    if options.central > len(labels):
        raise ConfigError(
            f"central={options.central} is too many for {len(labels)} samples", hint=f"at most {len(labels)}"
        )
    return stratified_split(labels, options.central, options.seed)


def _shard(data: str, raw: _Raw, own: npt.NDArray[np.int64], seed: tuple[int, ...]) -> Shard:
    labels = raw.train_labels[own]
    train, held_out = stratified_split(labels, round(len(own) * EVALUATION_SHARE), seed)
    return Shard(
        train_images=_model_input(data, raw.train_pixels[own[train]]),
        train_labels=labels[train],
        evaluation_images=_model_input(data, raw.train_pixels[own[held_out]]),
        evaluation_labels=labels[held_out],
    )


def dirichlet_shards(
    labels: Labels, shards: int, alpha: float, seed: int, smallest: int = SMALLEST_SHARD
) -> list[npt.NDArray[np.int64]]:
    """Divide samples unevenly: each class is spread over the shards in proportions of its own.

    Where chance leaves a shard below ``smallest``, the largest shards hand over random samples.

    Args:
        labels: int64[n], the class of each sample.
        shards: number of parts, >= 1.
        alpha: concentration of the Dirichlet distribution of the proportions, > 0.
        seed: >= 0; same arguments, same division.
        smallest: samples that every shard has at least.

    Returns:
        One ascending int64 index array per shard; together they hold every index exactly once.

    Raises:
        ConfigError: there are fewer than ``shards * smallest`` samples.

    Source:
        Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification, 2019 (there proportions are drawn per client, here per class, so that each sample is
        used exactly once).
    """
    if len(labels) < shards * smallest:
        most = len(labels) // smallest
        raise ConfigError(f"shards={shards} is too many for {len(labels)} samples", hint=f"at most {most}")
    random = np.random.default_rng(seed)
    owner = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        proportions = random.dirichlet(np.full(shards, alpha))
        cuts = np.rint(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for shard, part in enumerate(np.split(members, cuts)):
            owner[part] = shard
    sizes = np.bincount(owner, minlength=shards)
    while sizes.min() < smallest:
        poorest, richest = sizes.argmin(), sizes.argmax()
        count = min(smallest - sizes[poorest], sizes[richest] - smallest)
        owner[random.choice(np.flatnonzero(owner == richest), count, replace=False)] = poorest
        sizes = np.bincount(owner, minlength=shards)
    return [np.flatnonzero(owner == shard) for shard in range(shards)]


def stratified_split(
    labels: Labels, held_out: int, seed: int | tuple[int, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hold out samples so that every class gives its share, to within one sample.

    The samples are shuffled, sorted by class and picked at even distances.

    Args:
        labels: int64[n], the class of each sample.
        held_out: how many to hold out, 0..n.
        seed: same arguments, same split.

    Returns:
        Ascending int64 indices of the kept and of the held-out samples.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    picked = np.zeros(len(labels), dtype=bool)
    picked[by_class[(2 * np.arange(held_out) + 1) * len(labels) // (2 * max(held_out, 1))]] = True
    return np.flatnonzero(~picked), np.flatnonzero(picked)


@dataclass(frozen=True)
class _Raw:
    """A data set as its source stores it: uint8[n, side, side] pixels and int64[n] labels."""

    train_pixels: Pixels
    train_labels: Labels
    test_pixels: Pixels
    test_labels: Labels


def _read(name: str, folder: Path) -> _Raw:
    if name == "digits":
        return _read_digits()
    if name == "fashion-mnist":
        return _read_fashion_mnist(folder)
    raise ConfigError(f"{name!r} is not a known data set", hint=f"one of: {', '.join(NAMES)}")


def _read_digits() -> _Raw:
    table = _digits_table()  # [sample, 64 pixels of 0..16, then the digit]
    pixels, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    train, test = stratified_split(labels, DIGITS_TEST_SAMPLES, _TEST_SPLIT_SEED)
    return _Raw(pixels[train], labels[train], pixels[test], labels[test])


def _digits_table() -> Pixels:
    """Return uint8[1797, 65] from scikit-learn's own file.

    Importing scikit-learn for it would cost every client a second and 80 MB.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ConfigError("data=digits needs scikit-learn", hint="pip install 'fedcore[demo]'")
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if path.exists():
        return np.loadtxt(path, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits  # the file has moved: only scikit-learn knows where

    digits = load_digits()
    return np.column_stack((digits.data, digits.target)).astype(np.uint8)


def _read_fashion_mnist(folder: Path) -> _Raw:
    return _Raw(
        _read_idx(folder / "train-images-idx3-ubyte.gz", dimensions=3),
        _read_idx(folder / "train-labels-idx1-ubyte.gz", dimensions=1).astype(np.int64),
        _read_idx(folder / "t10k-images-idx3-ubyte.gz", dimensions=3),
        _read_idx(folder / "t10k-labels-idx1-ubyte.gz", dimensions=1).astype(np.int64),
    )


def _read_idx(path: Path, dimensions: int) -> Pixels:
    """Read a gzipped idx file: 0, 0, type (8: uint8), dimensions, big-endian uint32 sizes, bytes."""
    remedy = "apt-get install --reinstall dataset-fashion-mnist"
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing", hint="apt-get install dataset-fashion-mnist") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint=remedy) from error
    sizes = np.frombuffer(content[4 : 4 + 4 * dimensions], dtype=">u4")
    body = content[4 + 4 * dimensions :]
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(body) != math.prod(sizes.tolist()):
        raise ConfigError(f"{path} is not an idx file of {dimensions} dimensions", hint=remedy)
    return np.frombuffer(body, dtype=np.uint8).reshape(sizes)


def _model_input(name: str, pixels: Pixels) -> Images:
    """Bring uint8[n, side, side] to float32[n, 1, 32, 32], standardised."""
    mean, deviation = _PIXEL_STATISTICS[name]
    images: npt.NDArray[Any] = pixels.astype(np.float32)
    images /= _WHITE[name]
    if name == "digits":
        stretch = _bilinear(images.shape[-1], SIDE)
        images = stretch @ images @ stretch.T
    else:
        margin = (SIDE - images.shape[-1]) // 2
        images = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    images -= mean
    images /= deviation
    return images[:, np.newaxis]


def _bilinear(old: int, new: int) -> Images:
    """Return the float32[new, old] matrix that stretches a line of pixels, its ends repeated."""
    position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(position[:, np.newaxis] - np.arange(old))).astype(np.float32)
