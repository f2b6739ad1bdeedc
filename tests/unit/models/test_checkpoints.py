"""Checkpoints: what a directory holds after any fault, and which file is loaded from it."""

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.logger import capturedLogs

from fedcore.errors import ConfigError, LocalError, NonFinite
from fedcore.models import checkpoints, durable
from fedcore.models.checkpoints import Checkpoint, holds, load_newest, save
from fedcore.models.formats import write_ckpt, write_model

START = datetime(2026, 3, 1, 12, 0, 0)
IN_ONE_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def weights(k: int) -> dict[str, np.ndarray]:
    """A model that tells of which iteration it is."""
    return {"bn": np.array(1, np.float32), "w": np.full((4, 500), k, np.float32)}


def put(directory: Path, k: int, job: str = "lenet", at: int | None = None, **metadata: str) -> Path:
    now = START + timedelta(seconds=k if at is None else at)
    return save(directory, job, k, weights(k), ["bn"], metadata, now)


def load(directory: Path, job: str = "lenet") -> Checkpoint:
    checkpoint = load_newest(directory, job)
    assert checkpoint is not None
    np.testing.assert_array_equal(checkpoint.model.weights["w"], weights(checkpoint.iteration)["w"])
    return checkpoint


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def iterations(directory: Path) -> list[int]:
    return sorted(int(name.split("_")[-3]) for name in names(directory))


def test_save_and_load(tmp_path: Path) -> None:
    path = put(tmp_path, 7, instance="i1", result="ok")
    assert path == tmp_path / "lenet_recovery_iteration_7_20260301_120007.safetensors"
    found = load(tmp_path)
    assert (found.iteration, found.path) == (7, path)
    assert found.model.not_aggregated == {"bn"}
    assert found.model.weights["bn"].shape == ()
    assert found.model.metadata["iteration"] == "7"
    assert found.model.metadata["instance"] == "i1"
    assert found.model.metadata["result"] == "ok"
    save(tmp_path, "lenet", 8, found.model.weights, found.model.not_aggregated, found.model.metadata, START)
    again = load_newest(tmp_path, "lenet")
    assert again is not None
    assert again.iteration == 8
    assert again.model.metadata["iteration"] == "8"


def test_same_model_same_bytes(tmp_path: Path) -> None:
    one, two = put(tmp_path / "a", 1, instance="i"), put(tmp_path / "b", 1, instance="i")
    assert one.read_bytes() == two.read_bytes()


def test_nothing_to_load(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "missing", "lenet") is None
    assert load_newest(tmp_path, "lenet") is None
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_newest(tmp_path / "file", "lenet")


def test_modes_of_what_is_created(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = put(tmp_path / "a" / "b", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o750


# -- the three newest


def test_three_newest_iterations_stay(tmp_path: Path) -> None:
    for k in (8, 9, 10, 11, 99, 100):
        put(tmp_path, k)
        assert load(tmp_path).iteration == k
    assert iterations(tmp_path) == [11, 99, 100]


def test_one_iteration_twice_counts_once(tmp_path: Path) -> None:
    for k, at in ((1, 1), (2, 2), (3, 3), (3, 4), (3, 5)):
        put(tmp_path, k, at=at)
    assert iterations(tmp_path) == [1, 2, 3]
    assert load(tmp_path).path.name == "lenet_recovery_iteration_3_20260301_120005.safetensors"


def test_late_writer_of_an_older_iteration_takes_nothing_away(tmp_path: Path) -> None:
    for k in (1, 2, 3, 4):
        put(tmp_path, k, instance="i")
    put(tmp_path, 3, at=50, instance="i")  # another server, behind
    put(tmp_path, 1, at=51, instance="i")
    assert set(iterations(tmp_path)) == {1, 2, 3, 4}  # what was just written stays in any case
    assert load(tmp_path).iteration == 4


def test_two_servers_saving_at_once_never_remove_each_others_file(tmp_path: Path) -> None:
    from fedcore.models import checkpoints

    first, second = tmp_path / "a", tmp_path / "b"
    early, late = put(first, 5, at=1), put(second, 5, at=2)
    moved = late.rename(first / late.name)
    checkpoints._drop_older(first, "lenet", early)
    assert moved.exists() and early.exists()
    checkpoints._drop_older(first, "lenet", moved)
    assert moved.exists() and not early.exists()


def test_new_instance_starts_at_one_again(tmp_path: Path) -> None:
    for k in (98, 99, 100):
        put(tmp_path, k, instance="old")
    for k, kept in ((1, [1, 99, 100]), (2, [1, 2, 100]), (3, [1, 2, 3]), (4, [2, 3, 4])):
        put(tmp_path, k, at=1000 + k, instance="new")
        assert iterations(tmp_path) == kept
        assert load(tmp_path).iteration == k


def test_without_instances_the_number_decides(tmp_path: Path) -> None:
    put(tmp_path, 9, at=0)
    put(tmp_path, 10, at=-100)
    assert load(tmp_path).iteration == 10


def test_damaged_files_do_not_count(tmp_path: Path) -> None:
    paths = [put(tmp_path, k) for k in (1, 2, 3)]
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:-5])
    put(tmp_path, 4)
    assert iterations(tmp_path) == [1, 4]


def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    others = [
        "lenet.safetensors",
        "lenet_recovery_iteration_1_20260101_000000.npz",
        "lenet_recovery_iteration_1_20260101_000000.safetensors.bak",
        "lenet_recovery_iteration_x_20260101_000000.safetensors",
        "lenet_recovery_iteration_٣_20260101_000000.safetensors",
        "lenet_recovery_iteration_-1_20260101_000000.safetensors",
        "lenet_recovery_iteration_1_2026_000000.safetensors",
        "lenet_recovery_iteration_1_20260101_000000_1.safetensors",
        "lenet_recovery_iteration__20260101_000000.ckpt",
        "xlenet_recovery_iteration_1_20260101_000000.safetensors",
        "lenet_recovery_iteration_1_recovery_iteration_1_20260101_000000.safetensors",
        ".lenet_recovery_iteration_1_20260101_000000.npz.01234567.tmp",
        ".xlenet_recovery_iteration_1_20260101_000000.safetensors.01234567.tmp",
        ".lenet_recovery_iteration_1_20260101_000000.safetensors.tmp",
        "lenet_recovery_iteration_1_20260101_000000.safetensors.01234567.tmp",
    ]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    assert load_newest(tmp_path, "lenet") is None
    for k in range(1, 6):
        put(tmp_path, k)
    assert load(tmp_path).iteration == 5
    assert set(others) <= set(names(tmp_path))
    assert len(names(tmp_path)) == len(others) + 3


JOBS = st.lists(
    st.sampled_from(
        ["a", "_", "1", ".", " ", "*", "[", "\n", "é", "_recovery_iteration_", "20260301_120001"]
    ),
    min_size=1,
    max_size=5,
).map("".join)


@IN_ONE_FOLDER
@given(jobs=st.lists(JOBS, min_size=2, max_size=3, unique=True))
def test_jobs_of_any_names_share_a_directory(
    tmp_path_factory: pytest.TempPathFactory, jobs: list[str]
) -> None:
    directory = tmp_path_factory.mktemp("jobs")
    for k in range(5):
        for number, job in enumerate(jobs):
            put(directory, 10 * number + k, job)
    for number, job in enumerate(jobs):
        assert load(directory, job).iteration == 10 * number + 4
    assert len(names(directory)) == 3 * len(jobs)


@pytest.mark.parametrize("job", ["", "a/b", "/", "a\0b", "\ud800"])
def test_names_that_no_file_can_have(tmp_path: Path, job: str) -> None:
    with pytest.raises(ConfigError, match="fl_name"):
        put(tmp_path / "d", 1, job)
    with pytest.raises(ConfigError, match="fl_name"):
        load_newest(tmp_path, job)
    assert names(tmp_path) == []


def test_long_names(tmp_path: Path) -> None:
    put(tmp_path, 10**6, "x" * 180, at=0)
    assert load_newest(tmp_path, "x" * 180) is not None
    with pytest.raises(ConfigError, match="too long"):
        put(tmp_path, 1, "é" * 100)


def test_models_that_could_not_be_loaded_again(tmp_path: Path) -> None:
    bad = {"w": np.array([np.nan], np.float32)}
    with pytest.raises(NonFinite):
        save(tmp_path, "lenet", 1, bad, (), {}, START)
    with pytest.raises(LocalError):
        save(tmp_path, "lenet", -1, weights(1), (), {}, START)
    assert names(tmp_path) == []


# -- the newest sound one


def test_damaged_files_are_passed_over(tmp_path: Path) -> None:
    paths = {k: put(tmp_path, k) for k in (1, 2, 3)}
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    content = bytearray(paths[2].read_bytes())
    content[-1] ^= 0x01  # one bit of one weight: only the checksum tells
    paths[2].write_bytes(content)
    with capturedLogs() as logs:
        found = load(tmp_path)
    assert (found.iteration, found.path) == (1, paths[1])
    assert {log["path"] for log in logs} == {str(paths[3]), str(paths[2])}
    paths[1].write_bytes(b"")
    assert load_newest(tmp_path, "lenet") is None


@IN_ONE_FOLDER
@given(place=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_any_damaged_byte_is_noticed(tmp_path: Path, place: int, mask: int) -> None:
    put(tmp_path, 1)
    newest = put(tmp_path, 2)
    content = bytearray(newest.read_bytes())
    content[place % len(content)] ^= mask
    newest.write_bytes(content)
    # Either the damage is in texts or spaces that mean nothing to the model, or the older file is taken.
    load(tmp_path)


def test_checkpoints_of_the_original(tmp_path: Path) -> None:
    for k in (3, 20):
        write_ckpt(tmp_path / f"lenet_recovery_iteration_{k}_20250101_010203.ckpt", weights(k))
    found = load(tmp_path)
    assert (found.iteration, found.path.suffix) == (20, ".ckpt")
    assert found.model.not_aggregated == frozenset()
    found.path.write_bytes(b"\x00")
    assert load(tmp_path).iteration == 3
    put(tmp_path, 21, instance="i")
    assert load(tmp_path).iteration == 21


def test_hand_made_checkpoint_needs_no_checksum(tmp_path: Path) -> None:
    path = tmp_path / "lenet_recovery_iteration_6_20250101_010203.safetensors"
    write_model(path, weights(6), (), {})
    assert load(tmp_path).iteration == 6


def test_file_that_may_not_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_newest(tmp_path, "lenet")


# -- faults of the system


class Crash(BaseException):
    """The process is dead: nothing after this runs."""


class Disk:
    """The os functions that change a directory, watched; the n-th call fails, or kills the process."""

    WATCHED = ("open", "write", "fsync", "replace", "unlink", "mkdir", "close")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: BaseException | None, at: int = -1) -> None:
        self.patch = monkeypatch
        self.fault = fault
        self.at = at
        self.trace: list[str] = []
        self.kinds: dict[int, str] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        with self.patch.context() as patch:
            for name in self.WATCHED:
                patch.setattr(os, name, self._watch(name, getattr(os, name)))
            yield
        for descriptor in self.kinds:  # those of a dead process are closed by the kernel
            os.close(descriptor)

    def _watch(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.trace.append(f"{name} {self._subject(name, arguments)}")
            dead = isinstance(self.fault, Crash) and len(self.trace) > self.at
            if len(self.trace) == self.at + 1 or dead:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[:10])  # a part of it still arrives
                if name == "close" and not dead:
                    self.kinds.pop(arguments[0])
                    real(*arguments)  # as close(2): the descriptor is gone in any case
                assert self.fault is not None
                raise self.fault
            result = real(*arguments, **options)
            if name == "open":
                self.kinds[result] = "directory" if arguments[1] & os.O_DIRECTORY else "file"
            if name == "close":
                self.kinds.pop(arguments[0], None)
            return result

        return call

    def _subject(self, name: str, arguments: tuple[Any, ...]) -> str:
        if name in ("write", "fsync", "close"):
            return self.kinds.get(arguments[0], "?")
        return "temporary" if str(arguments[0]).endswith(".tmp") else Path(arguments[0]).suffix or "directory"


def full_trace(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    disk = Disk(monkeypatch, None)
    with disk.watched():
        put(directory, 4)
    return disk.trace


def prepare(directory: Path) -> Path:
    for k in (1, 2, 3):
        put(directory, k)
    return directory


def test_order_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = full_trace(prepare(tmp_path), monkeypatch)
    assert trace == [
        "open temporary",
        "write file",  # the header, then one array each
        "write file",
        "write file",
        "fsync file",
        "replace temporary",
        "close file",
        "open directory",
        "fsync directory",
        "close directory",
        "unlink .safetensors",
    ]


def every_step() -> range:
    return range(11)


@pytest.mark.parametrize("at", every_step())
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_failing_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, number: int) -> None:
    prepare(tmp_path)
    disk = Disk(monkeypatch, OSError(number, os.strerror(number)), at)
    with disk.watched():
        if at == 10:  # the older file cannot be removed: the new one is durable, so this is no failure
            with capturedLogs() as logs:
                put(tmp_path, 4)
            assert [log["log_format"] for log in logs] == ["Older checkpoints stay: {reason}"]
        else:
            with pytest.raises(OSError, match="; ") as caught:
                put(tmp_path, 4)
            assert caught.value.errno == number
            assert str(tmp_path) in str(caught.value)
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    assert {1, 2, 3} <= set(iterations(tmp_path))
    replaced = "close file" in disk.trace and at > 5
    assert load(tmp_path).iteration == (4 if replaced else 3)
    put(tmp_path, 5)
    assert load(tmp_path).iteration == 5
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("at", every_step())
def test_process_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    prepare(tmp_path)
    disk = Disk(monkeypatch, Crash(), at)
    with disk.watched(), pytest.raises(Crash):
        put(tmp_path, 4)
    leftovers = [name for name in names(tmp_path) if name.endswith(".tmp")]
    assert len(leftovers) == (1 if 0 < at <= 5 else 0)
    assert load(tmp_path).iteration == (4 if at > 5 else 3)
    put(tmp_path, 5)
    assert load(tmp_path).iteration == 5
    assert iterations(tmp_path) == ([3, 4, 5] if at > 5 else [2, 3, 5])


def test_process_dies_while_creating_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = 0
    while True:
        directory = tmp_path / str(at) / "a" / "b"
        disk = Disk(monkeypatch, Crash(), at)
        with disk.watched():
            try:
                put(directory, 1)
            except Crash:
                pass
            else:
                break
        put(directory, 2)
        assert load(directory).iteration == 2
        at += 1
    assert disk.trace[:4] == ["mkdir directory", "open directory", "fsync directory", "close directory"]


def test_writes_that_take_a_few_bytes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:1000]))
    put(tmp_path, 1)
    assert load(tmp_path).iteration == 1


def test_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="a part of the path is a file"):
            put(directory, 1)


def test_live_writer_is_not_swept(tmp_path: Path) -> None:
    target = tmp_path / "lenet_recovery_iteration_1_20260301_120000.safetensors"
    descriptor, temporary = durable._create_temporary(target)
    put(tmp_path, 2)
    assert temporary.exists()
    os.close(descriptor)
    put(tmp_path, 3)
    assert not temporary.exists()


def test_sweep_between_open_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock
    swept: list[str] = []

    def flock(descriptor: int, operation: int) -> None:
        if not swept:
            swept.extend(names(tmp_path))
            durable.remove_leftovers(tmp_path, lambda name: True)
            assert names(tmp_path) == []
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    swept_once = put(tmp_path, 1)
    assert len(swept) == 1
    assert names(tmp_path) == [swept_once.name]


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = tmp_path / ".lenet_recovery_iteration_1_20260301_120000.safetensors.01234567.tmp"
    leftover.touch()

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    put(tmp_path, 1)
    assert load(tmp_path).iteration == 1
    assert leftover.exists()  # who knows whether its writer lives


# ---- whether an iteration is written already


class TestHolds:
    def test_says_so_of_what_was_saved(self, tmp_path: Path) -> None:
        put(tmp_path, 4, digest="d4")
        put(tmp_path, 5, digest="d5")
        assert holds(tmp_path, "lenet", 5, "digest", "d5")
        assert holds(tmp_path, "lenet", 4, "digest", "d4")

    @pytest.mark.parametrize(
        ("job", "iteration", "key", "value"),
        [
            ("other", 5, "digest", "d5"),
            ("lenet", 4, "digest", "d5"),
            ("lenet", 5, "other", "d5"),
            ("lenet", 5, "digest", "d"),
            ("lenet", 5, "digest", ""),
        ],
    )
    def test_says_no_of_anything_else(
        self, tmp_path: Path, job: str, iteration: int, key: str, value: str
    ) -> None:
        put(tmp_path, 5, digest="d5")
        assert not holds(tmp_path, job, iteration, key, value)

    def test_one_of_several_files_is_enough(self, tmp_path: Path) -> None:
        for at, digest in enumerate(("a", "b", "c")):
            put(tmp_path, 5, at=at, digest=digest, instance=f"i{at}")
        assert all(holds(tmp_path, "lenet", 5, "digest", digest) for digest in "abc")

    def test_where_there_is_no_directory(self, tmp_path: Path) -> None:
        assert not holds(tmp_path / "missing", "lenet", 5, "digest", "d5")
        (tmp_path / "file").touch()
        assert not holds(tmp_path / "file", "lenet", 5, "digest", "d5")

    def test_damaged_files_say_nothing_and_hide_nothing(self, tmp_path: Path) -> None:
        path = put(tmp_path, 5, digest="d5")
        for at, content in enumerate((b"", b"short", path.read_bytes()[:50], b"\xff" * 200)):
            path.with_name(f"lenet_recovery_iteration_5_20200101_00000{at}.safetensors").write_bytes(content)
        write_ckpt(path.with_suffix(".ckpt"), weights(5))
        assert holds(tmp_path, "lenet", 5, "digest", "d5")
        path.unlink()
        assert not holds(tmp_path, "lenet", 5, "digest", "d5")

    def test_a_file_that_vanishes_meanwhile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A sibling has written a newer one and drops the oldest."""
        path = put(tmp_path, 5, digest="d5")
        read = checkpoints.read_metadata

        def vanish(which: Path) -> dict[str, str]:
            metadata = read(which)
            path.unlink()
            return metadata

        monkeypatch.setattr(checkpoints, "read_metadata", vanish)
        assert not holds(tmp_path, "lenet", 5, "digest", "d5")
