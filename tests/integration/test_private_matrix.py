"""Every encrypt type with every compression, at real servers: each published model is what the rules say.

Twenty devices train in two iterations of one job, so that the second begins with a model that was published, as it came
down. A row is checked in two steps: what each device sent against its own trained weights, and each model against all
that was sent. The references are in double precision and written from the documents; they share no line with what they
check. Sums that the server cannot look into are held against the mean of the trained weights at once.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from integration.cluster import wait_until
from integration.faults import Fleet, fleet_of
from integration.masked_sums import UNIT, bound_of_exact
from integration.test_secure_aggregation import POLICY, Silent, urls_of

from fedclient import Client, CloudWorker, FitConfig, FitResult, LocalStep, Outcome, PrivacyOptions, Summary
from fedclient.protection import Protection
from fedclient.session import Session
from fedcore.config import Role, load_settings, unsupported
from fedcore.core import admission, cipher
from fedcore.errors import ConfigError
from fedcore.models.formats import write_model
from fedcore.wire import codec
from fedcore.wire.messages import (
    ClientShare,
    CompressFeatureMap,
    GetClientList,
    ReconstructSecret,
    RequestUpdateModel,
    ResponseExchangeKeys,
    ResponseGetModel,
    ResponseShareSecrets,
    ResponseUpdateModel,
    ReturnClientList,
    ReturnExchangeKeys,
    ReturnShareSecrets,
    Round,
    SendReconstructSecret,
)

Arrays = Mapping[str, np.ndarray]
DEVICES, ITERATIONS, T = 20, 2, 7
DEADLINE_S = 40.0
RATE = float(np.float32(0.4))
STEP = 0.125
EPS, DELTA, CLIP_FACTOR, FIRST_CLIP = 10.0, float(np.float32(0.01)), 1.0, 0.05
SHARE, RATIO = 0.2, 0.6
MASKS = {"share_secrets_ratio": 1.0, "cipher_time_window": 30_000, "reconstruct_secrets_threshold": T}
ENCRYPT: dict[str, dict[str, Any]] = {
    "NOT_ENCRYPT": {},
    "DP_ENCRYPT": {"dp_encrypt": {"dp_eps": EPS, "dp_delta": 0.01, "dp_norm_clip": CLIP_FACTOR}},
    "SIGNDS": {
        "signds": {"sign_k": SHARE, "sign_eps": 100.0, "sign_thr_ratio": RATIO, "sign_global_lr": STEP}
    },
    "PW_ENCRYPT": {"pw_encrypt": MASKS},
    "STABLE_PW_ENCRYPT": {"pw_encrypt": MASKS},
}
UPLOADS, DOWNLOADS = ("NO_COMPRESS", "DIFF_SPARSE_QUANT"), ("NO_COMPRESS", "QUANT")
MODES = ("FEDERATED_LEARNING", "HYBRID_TRAINING", "CLOUD_TRAINING")
_random = np.random.default_rng(5)
MODEL = {
    name: _random.normal(0, 0.3, size).astype(np.float32)
    for name, size in (("a.bias", 7), ("b.kernel", 42), ("c.scale", 23))
}
SIZE = sum(values.size for values in MODEL.values())


# ---- what a server's settings allow


@dataclass(frozen=True)
class Choice:
    mode: str
    encrypt: str
    upload: str
    download: str
    norm_bound: float = 0.0


CHOICES = [
    *(Choice(*each) for each in product(MODES, ENCRYPT, UPLOADS, DOWNLOADS)),
    *(Choice("FEDERATED_LEARNING", kind, *UPLOADS[:1], *DOWNLOADS[:1], 5.0) for kind in ENCRYPT),
    Choice("CLOUD_TRAINING", "STABLE_PW_ENCRYPT", *UPLOADS[:1], *DOWNLOADS[:1], 5.0),
]
DOCS = Path(__file__).parents[2] / "docs"
DEVICE_NOISE = ("SIGNDS", "DP_ENCRYPT")
# Where the documents say it, in which words; which choices are meant; how the message begins.
REFUSALS: list[tuple[str, str, Callable[[Choice], bool], str]] = [
    (
        "COMPATIBILITY.md",
        "PW_ENCRYPT is refused outside FEDERATED_LEARNING",
        lambda c: c.encrypt == "PW_ENCRYPT" and c.mode != "FEDERATED_LEARNING",
        "encrypt.encrypt_type PW_ENCRYPT masks what devices upload",
    ),
    (
        "COMPATIBILITY.md",
        "STABLE_PW_ENCRYPT outside CLOUD_TRAINING",
        lambda c: c.encrypt == "STABLE_PW_ENCRYPT" and c.mode != "CLOUD_TRAINING",
        "encrypt.encrypt_type STABLE_PW_ENCRYPT masks what cloud workers upload",
    ),
    (
        "COMPATIBILITY.md",
        "SIGNDS or DP_ENCRYPT with CLOUD_TRAINING, as cloud workers apply neither",
        lambda c: c.encrypt in DEVICE_NOISE and c.mode == "CLOUD_TRAINING",
        "is applied by devices",
    ),
    (
        "COMPATIBILITY.md",
        "SIGNDS with `fedcore.update.norm_bound`, as every signed update is equally far from the model",
        lambda c: c.encrypt == "SIGNDS" and c.norm_bound > 0,
        "fedcore.update.norm_bound measures updates, but with encrypt.encrypt_type SIGNDS",
    ),
    (
        "SECURE_AGGREGATION.md",
        "`norm_bound` cannot look under masks, so the two are refused together",
        lambda c: c.encrypt.endswith("PW_ENCRYPT") and c.norm_bound > 0,
        "fedcore.update.norm_bound would refuse every update",
    ),
]
FORCED = "With CLOUD_TRAINING uploads are never compressed, as with PW_ENCRYPT and SIGNDS; there is a warning"


def is_forced(choice: Choice) -> bool:
    """Tell whether uploads are not compressed although that is asked for."""
    plain = choice.encrypt in ("PW_ENCRYPT", "SIGNDS") or choice.mode == "CLOUD_TRAINING"
    return plain and choice.upload != "NO_COMPRESS"


def read(directory: Path, choice: Choice) -> tuple[list[str], tuple[str, ...], str]:
    """Return why a server would not start, its warnings, and how uploads are packed if it starts."""
    file = directory / "fl.yaml"
    settings = {
        "fl_name": "job",
        "fl_iteration_num": 2,
        "server_mode": choice.mode,
        "enable_ssl": False,
        "distributed_cache": {"type": "redis", "address": "127.0.0.1:2345"},
        "round": {
            "start_fl_job_threshold": DEVICES,
            "start_fl_job_time_window": 30_000,
            "update_model_ratio": 1.0,
            "update_model_time_window": 30_000,
            "global_iteration_time_window": 600_000,
        },
        "summary": {"metrics_file": "metrics.json", "failure_event_file": "event.txt"},
        "encrypt": {"encrypt_type": choice.encrypt} | ENCRYPT[choice.encrypt],
        "compression": {
            "upload_compress_type": choice.upload,
            "upload_sparse_rate": 0.4,
            "download_compress_type": choice.download,
        },
        "fedcore": {"update": {"norm_bound": choice.norm_bound}},
    }
    file.write_text(yaml.safe_dump(settings))
    try:
        loaded = load_settings(file, Role.SERVER)
    except ConfigError as error:
        return str(error).splitlines(), (), ""
    packed = loaded.settings.compression.upload_compress_type.value
    return unsupported(loaded.settings, Role.SERVER), loaded.warnings, packed


@pytest.mark.parametrize("mode", MODES)
def test_what_is_refused_at_start_is_what_the_documents_say(tmp_path: Path, mode: str) -> None:
    for choice in (each for each in CHOICES if each.mode == mode):
        faults, warnings, packed = read(tmp_path, choice)
        expected = [reason for _, _, meant, reason in REFUSALS if meant(choice)]
        assert len(faults) == len(expected), (choice, faults)
        assert all(any(reason in fault for fault in faults) for reason in expected), (choice, faults)
        told = [text for text in warnings if text.startswith("compression.upload_compress_type is set to")]
        if not faults:
            assert len(told) == is_forced(choice), (choice, warnings)
            assert packed == ("NO_COMPRESS" if is_forced(choice) else choice.upload)


def test_the_documents_name_each_refusal() -> None:
    named = [*((file, words) for file, words, _, _ in REFUSALS), ("COMPATIBILITY.md", FORCED)]
    for file, words in named:
        assert words in " ".join((DOCS / file).read_text().split()), (file, words)


# ---- devices


class Chance:
    """Random bytes of one device, the same in every run, and those that were drawn since the last training."""

    def __init__(self, number: int) -> None:
        self._number, self._count, self.drawn = number, 0, b""

    def __call__(self, count: int) -> bytes:
        self._count += 1
        made = hashlib.shake_128(f"{self._number} {self._count}".encode()).digest(count)
        self.drawn += made
        return made


class Learner:
    """A trainer whose weights move by what its number and the iteration say, and that notes what it got and made."""

    def __init__(self, number: int) -> None:
        self.number, self.size = number, 1 + number % 5
        self.chance = Chance(number)
        self.bases: dict[int, dict[str, np.ndarray]] = {}
        self.trained: dict[int, dict[str, np.ndarray]] = {}

    def load(self) -> tuple[int, int]:
        return self.size, 0

    def evaluate(self, weights: Arrays) -> float:
        raise AssertionError("there is nothing to evaluate on")

    def fit(self, weights: Arrays, config: FitConfig) -> FitResult:
        return self.train(weights, config.iteration)

    def step(self, weights: Arrays, step: LocalStep) -> FitResult:
        """Take the only step of a silo's iteration."""
        return self.train(weights, step.iteration)

    def train(self, weights: Arrays, iteration: int) -> FitResult:
        random = np.random.default_rng((self.number, iteration))
        self.bases[iteration] = {name: values.copy() for name, values in weights.items()}
        made = {name: values + random.normal(0, 0.1, values.size) for name, values in weights.items()}
        self.trained[iteration] = {name: np.float32(values) for name, values in made.items()}
        self.chance.drawn = b""
        return FitResult(self.trained[iteration], 0.5)


class Recorder(Silent):
    """A device's way to the servers that keeps what was sent, the request before which the device leaves included."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sent: dict[tuple[int, str], bytes] = {}  # the last one of each round
        self.drawn: dict[int, bytes] = {}  # random bytes that were drawn between training and upload
        self.learner: Learner | None = None
        self.iteration = 1

    def post(self, round_: Round, body: bytes) -> tuple[int, bytes]:
        if round_ == "updateModel":
            assert self.learner is not None
            self.iteration = codec.decode(RequestUpdateModel, body).iteration
            self.drawn[self.iteration] = self.learner.chance.drawn
        self.sent[self.iteration, round_] = body
        reply = super().post(round_, body)
        if round_ == "getModel" and codec.decode(ResponseGetModel, reply[1]).retcode == 200:
            self.iteration += 1
        return reply

    def update(self, iteration: int) -> RequestUpdateModel:
        return codec.decode(RequestUpdateModel, self.sent[iteration, "updateModel"])


@dataclass
class Group:
    """Devices, or silos, in threads.

    Attributes:
        leaving: who leaves, before which round.
        stop_after: whether each stops once it has completed an iteration.
    """

    urls: Sequence[str]
    silos: bool = False
    twice: bool = False
    leaving: Mapping[int, str] = field(default_factory=dict)
    before: Callable[[str], object] = lambda round_: None
    stop_after: bool = False

    def __post_init__(self) -> None:
        self.learners = [Learner(number) for number in range(DEVICES)]
        self.ways = [
            Recorder(self.urls, n, self.leaving.get(n), twice=self.twice, before=self.before)
            for n in range(DEVICES)
        ]
        self.summaries: dict[int, Summary] = {}

    def run(self) -> None:
        """Let all take part to the end."""
        threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(DEVICES)]
        for thread in threads:
            thread.start()
        for number, thread in enumerate(threads):
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), f"device {number} does not end"

    def _run(self, number: int) -> None:
        way, learner, name = self.ways[number], self.learners[number], f"device-{number:02}"
        way.learner = learner
        if self.silos:
            worker = CloudWorker(
                learner,
                way,
                sync_frequency=1,
                encrypt_mode="STABLE_PW_ENCRYPT",
                fl_name="job",
                worker_id=name,
                policy=POLICY,
            )
            self.summaries[number] = worker.run()
            return

        def report(done: Any) -> None:
            if self.stop_after and done.outcome.value == "completed":
                client.stop()

        session = Session("job", name, POLICY, None, Protection(PrivacyOptions(), learner.chance))
        client = way.client = Client(
            learner, way, fl_name="job", client_id=name, session=session, on_iteration=report
        )
        self.summaries[number] = client.run()

    def uploaders(self) -> list[Learner]:
        return [
            learner
            for learner, way in zip(self.learners, self.ways, strict=True)
            if way.uploaded or self.silos
        ]


# ---- references, in double precision


def flat(weights: Arrays) -> np.ndarray:
    """Return the weights one behind the other, in the order in which they travel."""
    return np.concatenate([np.float64(weights[name]).reshape(-1) for name in sorted(weights)])


def wrapped(value: int) -> int:
    """Return a number as 32 bits with a sign hold it."""
    return (value + 2**31) % 2**32 - 2**31


def remainder(value: int, divisor: int) -> int:
    """Return what is left of a division that rounds towards zero."""
    return int(math.copysign(abs(value) % divisor, value))


def chosen(iteration: int) -> np.ndarray:
    """Return which elements of the model a compressed update of an iteration holds, bool[SIZE]."""
    modulus, factor = 2**31 - 1, 48271
    kept = int(np.float32(SIZE) * np.float32(RATE))
    places = [n < kept for n in range(SIZE)]
    state = remainder(wrapped(wrapped(iteration + modulus) * factor), modulus)
    for n in range(SIZE):
        other = n + int((state / 4294967294.0 + 0.5) * (SIZE - n))
        places[n], places[other] = places[other], places[n]
        state = remainder(wrapped(state * factor), modulus)
    return np.array(places)


def steps_of(item: CompressFeatureMap) -> tuple[np.ndarray, float]:
    """Return the values of a packed weight, and how far two neighbouring ones are apart."""
    apart = (item.max_val - item.min_val) / 255 + 1e-10
    return (np.float64(item.compress_data) + 128) * apart + item.min_val, apart


def noise_ratio() -> float:
    """Return noise / clip bound by the condition of Balle and Wang, theorem 8, found by halving."""

    def delta(ratio: float) -> float:
        def below(x: float) -> float:
            return math.erfc(-x / math.sqrt(2)) / 2

        near, far = 1 / (2 * ratio), EPS * ratio
        return below(near - far) - math.exp(EPS) * below(-near - far)

    low, high = 1e-3, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > DELTA else (low, middle)
    return high


def normals(drawn: bytes) -> np.ndarray:
    """Return what Box and Muller make of random bytes, float64[SIZE]: weight after weight, half radii, half angles."""
    made, start = [], 0
    for name in sorted(MODEL):
        pairs = (MODEL[name].size + 1) // 2
        uniform = np.float64(np.frombuffer(drawn, "<u8", 2 * pairs, start) >> np.uint64(11)) / 2**53
        start += 16 * pairs
        radius, angle = np.sqrt(-2 * np.log(uniform[:pairs] + 2.0**-53)), 2 * np.pi * uniform[pairs:]
        made.append(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: MODEL[name].size])
    assert start == len(drawn), "every number is drawn once"
    return np.concatenate(made)


# ---- rows


@dataclass(frozen=True)
class Row:
    encrypt: str
    upload: str
    download: str
    servers: int

    @property
    def packed(self) -> bool:
        return self.upload == "DIFF_SPARSE_QUANT" and self.encrypt in ("NOT_ENCRYPT", "DP_ENCRYPT")

    @property
    def masked(self) -> bool:
        return self.encrypt.endswith("PW_ENCRYPT")

    def __str__(self) -> str:
        return f"{self.encrypt}-{self.upload}-{self.download}-{self.servers}"


FREE = [Row(*each) for each in product(("NOT_ENCRYPT", "DP_ENCRYPT"), UPLOADS, DOWNLOADS, (1, 2))]
FORCED_ROWS = [  # what asks for DIFF_SPARSE_QUANT must be served without
    Row(kind, *packing, servers)
    for kind, packing, servers in product(
        ("SIGNDS", "PW_ENCRYPT"), zip(UPLOADS, DOWNLOADS, strict=True), (1, 2)
    )
    if (kind, packing[0], servers) != ("PW_ENCRYPT", "NO_COMPRESS", 2)  # those are late, below
]
SILOS = [Row("STABLE_PW_ENCRYPT", UPLOADS[1], DOWNLOADS[1], servers) for servers in (1, 2)]


@contextmanager
def started(directory: Path, row: Row, **settings: Any) -> Iterator[Fleet]:
    """Start the servers of a job."""
    hosts = {n: n for n in range(row.servers)}
    options = {"start": False, "fl_iteration_num": ITERATIONS, "update_model_ratio": 1.0} | settings
    masks = options.pop("masks", {})
    with fleet_of(directory, hosts, places=DEVICES, **options) as fleet:
        cluster = fleet.cluster
        encrypt = ENCRYPT[row.encrypt] | ({"pw_encrypt": MASKS | masks} if row.masked else {})
        cluster.settings |= {
            "server_mode": MODES[2] if row.encrypt == "STABLE_PW_ENCRYPT" else MODES[0],
            "encrypt": {"encrypt_type": row.encrypt} | encrypt,
            "compression": {
                "upload_compress_type": row.upload,
                "upload_sparse_rate": 0.4,
                "download_compress_type": row.download,
            },
        }
        cluster.yaml.write_text(yaml.safe_dump(cluster.settings))
        write_model(directory / "model.safetensors", MODEL, set(), {})
        fleet.start_all()
        yield fleet


def published(fleet: Fleet, iteration: int) -> np.ndarray:
    """Return a published model in full; all servers must give the same."""
    models = [fleet.at(n).weights(iteration) for n in fleet.running()]
    for model in models:
        assert model.keys() == MODEL.keys()
        assert np.array_equal(flat(model), flat(models[0]))
    return flat(models[0])


@pytest.mark.parametrize("row", [*FREE, *FORCED_ROWS, *SILOS], ids=str)
def test_published_models_are_what_the_devices_trained(tmp_path: Path, row: Row) -> None:
    """With two servers each request comes twice, the second time at the other one."""
    with started(tmp_path, row) as fleet:
        group = Group(
            urls_of(fleet, fleet.hosts), silos=row.encrypt == "STABLE_PW_ENCRYPT", twice=row.servers == 2
        )
        group.run()
        for number, summary in group.summaries.items():
            assert summary.outcome is Outcome.COMPLETED, (number, summary.reason)
        assert fleet.metric("fl_updates_accepted_total") == DEVICES * ITERATIONS
        base = flat(MODEL)
        for iteration in range(1, ITERATIONS + 1):
            model = published(fleet, iteration)
            check_downloads(row, group, iteration, base)
            check_model(row, group, iteration, base, model)
            base = model


def check_downloads(row: Row, group: Group, iteration: int, model: np.ndarray) -> None:
    """All have begun with the model: exactly, or each weight in 255 steps from its least to its greatest value."""
    got = [flat(learner.bases[iteration]) for learner in group.learners]
    assert all(np.array_equal(each, got[0]) for each in got)
    if row.download == "NO_COMPRESS" or group.silos:
        assert np.array_equal(got[0], model)
        return
    start = 0
    for name in sorted(MODEL):
        exact, received = (each[start : start + MODEL[name].size] for each in (model, got[0]))
        start += MODEL[name].size
        low, high = exact.min(), exact.max()
        apart, rounding = (high - low) / 255, 8 * UNIT * max(abs(low), abs(high))
        steps = (received - low) / apart
        assert np.abs(steps - np.rint(steps)).max() * apart <= rounding, "it lies on a step"
        assert np.abs(received - exact).max() <= apart / 2 + rounding, "which is the nearest one"
        assert (received.min(), np.abs(received.max() - high) <= rounding) == (low, True)
        assert not np.array_equal(received, exact)


def check_model(row: Row, group: Group, iteration: int, base: np.ndarray, model: np.ndarray) -> None:
    """Hold what each has sent against what it trained, and the model against all that was sent."""
    learners = group.uploaders()
    sizes = [learner.size for learner in learners]
    total, largest = np.zeros(SIZE), 0.0
    for learner, way in zip(group.learners, group.ways, strict=True):
        if learner not in learners:
            continue
        request, trained = way.update(iteration), flat(learner.trained[iteration])
        largest = max(largest, float(np.abs(trained).max()), float(np.abs(base).max()))
        assert request.iteration == iteration
        if row.masked:
            hidden = np.abs(flat(named(request)) - trained * learner.size)
            assert hidden.max() > 1, "a mask lies over what was sent"
            total += trained * learner.size
        else:
            total += worth(row, learner, request, way.drawn[iteration], base)
    error = np.abs(model - total / sum(sizes)).max()
    assert error <= tolerance(row, sizes, largest), (row, iteration, error)
    assert np.abs(model - base).max() > 1e-3, "the iteration has moved the model"


def tolerance(row: Row, sizes: Sequence[int], largest: float) -> float:
    """Return how far a model may be from the exact mean of what was sent, in units of float32's rounding.

    The model is rounded as it is published, and before that what stands for weights is computed in float32: nothing of
    a plain update; three roundings of a signed element; of a sparse one the step (three), the value (two), the
    product, and the sum. All are of numbers below twice the largest weight, in an update below that times its size.
    """
    if row.masked:
        return bound_of_exact(DEVICES, sizes, largest)
    return UNIT * largest * (1 + (14 if row.packed else 3 if row.encrypt == "SIGNDS" else 1e-6))


def named(request: RequestUpdateModel) -> dict[str, np.ndarray]:
    """Return the weights of an update that is not compressed."""
    return {item.weight_fullname: item.data for item in request.feature_map}


def worth(
    row: Row, learner: Learner, request: RequestUpdateModel, drawn: bytes, base: np.ndarray
) -> np.ndarray:
    """Return what an update adds to the sum, once it has shown to be made of what was trained."""
    iteration, size = request.iteration, learner.size
    if row.encrypt == "SIGNDS":
        return signed(learner, request, base)
    begun, wanted, slack = flat(learner.bases[iteration]), flat(learner.trained[iteration]), 0.0
    largest = float(np.abs(wanted).max()) + 1
    if row.encrypt == "DP_ENCRYPT":
        clip = FIRST_CLIP
        if iteration == 2:
            clip = CLIP_FACTOR * float(np.linalg.norm(begun - flat(learner.bases[1])))
        change, sigma = wanted - begun, clip * noise_ratio()
        change *= min(1.0, clip / float(np.linalg.norm(change)))
        wanted = begun + change + sigma * normals(drawn)
        slack = sigma / 2048 + UNIT * largest  # half a step of the grid, and float32
    slack = size * (slack + 2 * UNIT * largest)
    if not row.packed:
        sent = flat(named(request))
        assert np.abs(sent - wanted * size).max() <= slack
        return sent
    return unpacked(request, (wanted - begun) * size, 2 * slack, base * size)


def unpacked(request: RequestUpdateModel, wanted: np.ndarray, slack: float, base: np.ndarray) -> np.ndarray:
    """Return what a compressed update stands for; each value must be the nearest step to what it was made of.

    Args:
        request: the update.
        wanted: float64[SIZE], the change times the data size.
        slack: how far rounding may have moved a value before it was packed.
        base: the server's model times the data size.
    """
    marks, total, start = chosen(request.iteration), base.copy(), 0
    assert (request.feature_map, request.name_vec) == (None, tuple(sorted(MODEL)))
    assert request.upload_sparse_rate == RATE
    for item, name in zip(request.compress_feature_map, sorted(MODEL), strict=True):
        places = start + np.flatnonzero(marks[start : start + MODEL[name].size])
        start += MODEL[name].size
        values, apart = steps_of(item)
        exact = wanted[places]
        assert (item.weight_fullname, values.size) == (name, places.size)
        assert np.abs(values - exact).max() <= apart / 2 + slack
        assert abs(item.min_val - exact.min()) <= slack and abs(item.max_val - exact.max()) <= slack
        total[places] += values
    return total


def signed(learner: Learner, request: RequestUpdateModel, base: np.ndarray) -> np.ndarray:
    """Return what a signed update stands for; most of its positions must be among those that moved furthest."""
    told, iteration = request.index_array, request.iteration
    assert request.sign in (1, -1) and len(told)
    assert (np.diff(told) > 0).all() and told[0] >= 0 and told[-1] < SIZE
    assert all(item.data.size == 0 for item in request.feature_map)
    change = np.float32(flat(learner.trained[iteration])) - np.float32(flat(learner.bases[iteration]))
    top = np.argsort(-request.sign * change, kind="stable")[: int(SHARE * SIZE)]
    assert np.isin(told, top).sum() >= len(told) / 2
    value = base.copy()
    value[told] += request.sign * STEP
    return value * learner.size


# ---- late requests

REPLIES: dict[str, type[Any]] = {
    "exchangeKeys": ResponseExchangeKeys,
    "getKeys": ReturnExchangeKeys,
    "shareSecrets": ResponseShareSecrets,
    "getSecrets": ReturnShareSecrets,
    "updateModel": ResponseUpdateModel,
    "getClientList": ReturnClientList,
    "reconstructSecrets": ReconstructSecret,
    "getModel": ResponseGetModel,
}
NO_REASON = ("getKeys", "getSecrets")
# Who leaves before which round, two before the first one: at these ratios just as many go on as complete each round.
LEFT = dict(zip(REPLIES, range(1, 9), strict=True))
LEAVING = {0: "exchangeKeys"} | {number: round_ for round_, number in LEFT.items()}
RATIOS = {"masks": {"share_secrets_ratio": 0.9}, "update_model_ratio": 0.7}
STAYS = 12  # takes part in all rounds
UPLOADERS = [n for n in range(DEVICES) if n > LEFT["updateModel"]]

# (code, reason) of what comes for the first time after the lists are frozen: reading is no harm.
FIRST_FROZEN = {
    "exchangeKeys": (300, cipher.KEYS_FULL),
    "getKeys": (200, ""),
    "shareSecrets": (300, cipher.SHARES_FULL),
    "getSecrets": (200, ""),
    "updateModel": (300, admission.UPDATE_FULL),
}
AGAIN_FROZEN = {
    "exchangeKeys": (200, cipher.RECEIVED),
    "getKeys": (200, ""),
    "shareSecrets": (200, cipher.SHARES_REPEATED),
    "getSecrets": (200, ""),
    "updateModel": (200, admission.UPDATE_OK),
    "getClientList": (200, cipher.LIST_OK),
}
# After the end. Whose update counts may still learn that it did, and how it went on.
ENDED = {
    "exchangeKeys": (300, cipher.ITERATION),
    "getKeys": (300, ""),
    "shareSecrets": (300, cipher.SHARES_ITERATION),
    "getSecrets": (300, ""),
    "getClientList": (200, cipher.LIST_OK),
    "reconstructSecrets": (200, cipher.REPORTS_FULL),
    "getModel": (200, "Get model for iteration 1"),
}
FIRST_ENDED = ENDED | {"updateModel": (300, "devices_meta for device-05 is not set. Please retry later.")}
OTHER = "UpdateModel iteration number is invalid:1, current iteration:2, Retry later at time: "
AGAIN_ENDED = ENDED | {"updateModel": (200, admission.UPDATE_OK)}


class Late:
    """Sends requests of the first iteration when they are too late, to each server.

    Attributes:
        group: whose requests these are.
        frozen: whether the first ones were sent.
        fault: what was wrong with the answers to them.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.group: Group | None = None
        self.frozen = False
        self.fault: AssertionError | None = None
        self._lock = threading.Lock()

    def before(self, round_: str) -> None:
        """Let nobody report before the requests are answered that come while all lists are frozen."""
        with self._lock:
            if round_ != "reconstructSecrets" or self.frozen:
                return
            self.frozen = True
            try:
                self.expect(FIRST_FROZEN, LEFT)
                self.expect(AGAIN_FROZEN, dict.fromkeys(REPLIES, STAYS))
            except AssertionError as error:  # this is a device's thread
                self.fault = error

    def expect(self, answers: Mapping[str, tuple[int, str]], who: Mapping[str, int]) -> None:
        """Send what devices have sent, or were about to send; compare codes and reasons."""
        assert self.group is not None
        for round_, answer in answers.items():
            body = self.group.ways[who[round_]].sent[1, round_]
            assert self.post(round_, body) == [answer] * 2, (round_, who[round_])

    def post(self, round_: str, body: bytes) -> list[tuple[int, str]]:
        """Send a request to each server; whoever is sent away is told to come back in the future."""
        told = []
        for n in self.fleet.running():
            now = time.time_ns() // 1_000_000
            reply = codec.decode(REPLIES[round_], self.fleet.at(n).post(f"/{round_}", body)[1])
            told.append((reply.retcode, "" if round_ in NO_REASON else reply.reason))
            if reply.retcode == 300:
                assert int(reply.next_req_time) > now, (round_, reply)
        return told

    def counted(self) -> list[float]:
        """Return what both servers have counted in the rounds of the current iteration, the first of all included."""
        rounds = ("startFLJob", *list(REPLIES)[:-1])
        return [
            self.fleet.cluster.metric(f'fl_iteration_clients{{round="{round_}"}}', n)
            for n in self.fleet.running()
            for round_ in rounds
        ]


def test_late_requests_are_answered_and_count_for_nothing(tmp_path: Path) -> None:
    """Each round's of iteration 1, again and for the first time: once all lists are frozen, and in iteration 2."""
    row = Row("PW_ENCRYPT", UPLOADS[0], DOWNLOADS[0], 2)
    with started(tmp_path, row, **RATIOS) as fleet:
        late, urls = Late(fleet), urls_of(fleet, fleet.hosts)
        group = late.group = Group(urls, leaving=LEAVING, before=late.before, stop_after=True)
        group.run()
        assert late.frozen
        if late.fault is not None:
            raise late.fault
        assert [learner.number for learner in group.uploaders()] == UPLOADERS
        first = published(fleet, 1)
        check_model(row, group, 1, flat(MODEL), first)
        wait_until(lambda: not any(late.counted()), "iteration 2 has begun at both servers")
        late.expect(FIRST_ENDED, LEFT)
        late.expect(AGAIN_ENDED, dict.fromkeys(REPLIES, STAYS))
        for lost in (f"device-{n:02}" for n in (0, 4, 5)):  # their updates do not count
            asked = codec.encode(GetClientList(lost, 1, "1"))
            assert late.post("getClientList", asked) == [(300, cipher.ITERATION)] * 2
            report = codec.encode(SendReconstructSecret(lost, (ClientShare("device-12", b"1", 1),), 1, "1"))
            assert late.post("reconstructSecrets", report) == [(300, cipher.REPORTS_FULL)] * 2
        assert not any(late.counted())
        device = group.ways[LEFT["updateModel"]]
        fleet.at(0).post("/startFLJob", device.sent[1, "startFLJob"])  # with a place it hears why
        for code, reason in late.post("updateModel", device.sent[1, "updateModel"]):
            assert (code, reason[: len(OTHER)], reason[-20:]) == (300, OTHER, ", fl id is device-05")
        again = Group(urls, leaving=LEAVING)
        again.run()
        assert [learner.number for learner in again.uploaders()] == UPLOADERS
        check_model(row, again, 2, first, published(fleet, 2))
