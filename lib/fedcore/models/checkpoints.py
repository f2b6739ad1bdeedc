"""The checkpoints of a job: one file per iteration, the three newest kept, the newest sound one loaded.

Names: ``{fl_name}_recovery_iteration_{k}_{YYYYmmdd_HHMMSS}.safetensors``; ``k`` is the iteration whose result
the model is. The original's ``.ckpt`` files of the same pattern are read and counted too.

Rules kept here:

* A checkpoint appears complete and durable or not at all; older ones go only afterwards.
* Newest means: the instance that wrote last, in it the highest iteration, of that the latest time stamp.
  (After /newInstance the iterations start at 1 again; without the first rule the abandoned instance's high
  numbers would hide the new ones, and the retention would delete what was just written.) The instance is the
  caller's metadata ``instance``; files without it form one group, so that they are ordered by iteration and
  time stamp alone.
* A damaged file never counts as one of the three, and is passed over, with a warning, when loading.
* Files of other jobs and of other names are never touched.

Several servers may share a directory: they write files of different or, within one second, identical content.

Source: MindSpore Federated 0.1 (names, retention, start-up).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from twisted.logger import Logger

from fedcore.errors import ConfigError, LocalError
from fedcore.models.durable import TEMPORARY_EXTRA_BYTES, make_directory, remove_leftovers
from fedcore.models.formats import ModelFile, read_metadata, read_model, write_model
from fedcore.wire.arrays import Floats

KEPT_ITERATIONS = 3
"""Origin: the original keeps three."""
ITERATION_KEY = "iteration"
INSTANCE_KEY = "instance"
CHECKSUM_KEY = "checksum"
"""Metadata of our checkpoints: ``xxh3_128`` over flags, names, shapes and values."""

_NAME_MAX_BYTES = 255
"""Linux' NAME_MAX."""
_MIDDLE = r"_recovery_iteration_(?P<iteration>[0-9]+)_(?P<stamp>[0-9]{8}_[0-9]{6})\.(?:safetensors|ckpt)"

_log = Logger()


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint that was loaded.

    Attributes:
        iteration: of this very file; the job goes on with ``iteration + 1``.
        path: where it was found.
        model: its content; a ``.ckpt`` knows nothing of ``not_aggregated``.
    """

    iteration: int
    path: Path
    model: ModelFile


class _Entry(NamedTuple):
    """A file of the job; ``instance`` is None if its header is damaged."""

    instance: str | None
    iteration: int
    stamp: str
    path: Path


def save(
    directory: Path,
    fl_name: str,
    iteration: int,
    weights: Mapping[str, Floats],
    not_aggregated: Collection[str],
    metadata: Mapping[str, str],
    now: datetime,
) -> Path:
    """Write a checkpoint atomically and durably, then drop all but the three newest iterations of the job.

    Args:
        directory: created with its parents if missing, mode 0750 less the umask.
        fl_name: name of the job; anything a file name may hold.
        iteration: whose result the model is, >= 0.
        weights: name -> float32 array.
        not_aggregated: names whose ``require_aggr`` is false.
        metadata: further texts for the file, such as ``instance``; ``iteration`` and ``checksum`` are added.
        now: time stamp of the name; local time, as the original writes it, so that its files compare.

    Returns:
        Path of the new file, which is durable.

    Raises:
        ConfigError: ``fl_name`` cannot be part of a file name.
        ArrayError: the model cannot be loaded again (NaN, empty); nothing is written.
        OSError: disk full, no permission, ...: the older checkpoints are as they were and no temporary file
            remains; errno is the system's and the text names the remedy. A failure to drop older ones is only
            logged.
    """
    pattern = _pattern(fl_name)
    path = directory / _file_name(fl_name, iteration, now)
    texts = {**metadata, ITERATION_KEY: str(iteration), CHECKSUM_KEY: _checksum(weights, not_aggregated)}
    make_directory(directory)
    remove_leftovers(directory, lambda name: pattern.fullmatch(name) is not None)
    write_model(path, weights, not_aggregated, texts)
    _drop_older(directory, fl_name, path)
    return path


def holds(directory: Path, fl_name: str, iteration: int, key: str, value: str) -> bool:
    """Tell whether a checkpoint of an iteration says a value in its metadata; a file that cannot be read does not."""
    return any(entry.iteration == iteration for entry in _that_say(directory, fl_name, key, value))


def find(directory: Path, fl_name: str, key: str, value: str) -> Checkpoint | None:
    """Load a sound checkpoint that says a value in its metadata, None if there is none."""
    for entry in _that_say(directory, fl_name, key, value):
        try:
            model = read_model(entry.path)
            _verify(model, entry.path)
        except ConfigError as error:
            _log.warn("Checkpoint passed over: {reason}", path=str(entry.path), reason=str(error))
            continue
        return Checkpoint(entry.iteration, entry.path, model)
    return None


def _that_say(directory: Path, fl_name: str, key: str, value: str) -> Iterator[_Entry]:
    try:
        entries = _list(directory, fl_name)
    except OSError:
        return
    for entry in entries:
        if entry.path.suffix != ".ckpt":
            try:
                if read_metadata(entry.path).get(key) == value:
                    yield entry
            except ConfigError:
                continue


def load_newest(directory: Path, fl_name: str) -> Checkpoint | None:
    """Load the newest sound checkpoint of a job; damaged ones are passed over with a warning each.

    Args:
        directory: may be missing.
        fl_name: name of the job.

    Returns:
        The checkpoint, or None if there is none that can be loaded.

    Raises:
        ConfigError: ``fl_name`` cannot be part of a file name, or directory or file may not be read: starting
            from scratch because of a wrong owner would throw the training away.
    """
    try:
        entries = _newest_first(_list(directory, fl_name))
    except FileNotFoundError:
        return None
    except OSError as error:
        text = f"{directory}: cannot be read: {error.strerror}"
        raise ConfigError(text, hint="give the checkpoint directory to the daemon's user") from error
    for entry in entries:
        try:
            model = read_model(entry.path)
            _verify(model, entry.path)
        except ConfigError as error:
            if isinstance(error.__cause__, PermissionError):
                raise
            _log.warn("Checkpoint passed over: {reason}", path=str(entry.path), reason=str(error))
            continue
        return Checkpoint(entry.iteration, entry.path, model)
    return None


def _file_name(fl_name: str, iteration: int, now: datetime) -> str:
    """Name of a checkpoint."""
    if iteration < 0:
        raise LocalError(f"iteration {iteration} is negative")
    name = f"{fl_name}_recovery_iteration_{iteration}_{now:%Y%m%d_%H%M%S}.safetensors"
    if len(os.fsencode(name)) + TEMPORARY_EXTRA_BYTES > _NAME_MAX_BYTES:
        raise ConfigError(f"fl_name {fl_name!r} is too long for a file name", hint="at most about 180 bytes")
    return name


def _check_fl_name(fl_name: str) -> None:
    """Refuse, with a ConfigError, what cannot be part of a file name."""
    try:
        encoded = os.fsencode(fl_name)
    except UnicodeEncodeError:
        encoded = b""
    if not encoded or b"/" in encoded or b"\0" in encoded:
        text = f"fl_name {fl_name!r} cannot be part of a file name"
        raise ConfigError(text, hint="use letters, digits, - and _")


def _pattern(fl_name: str) -> re.Pattern[str]:
    """Pattern of exactly this job's files: what follows the job's name is digits, so no other job fits."""
    _check_fl_name(fl_name)
    return re.compile(re.escape(fl_name) + _MIDDLE)


def _list(directory: Path, fl_name: str) -> list[_Entry]:
    pattern = _pattern(fl_name)
    entries = []
    for match in filter(None, map(pattern.fullmatch, os.listdir(directory))):
        path = directory / match.string
        entries.append(_Entry(_instance_of(path), int(match["iteration"]), match["stamp"], path))
    return entries


def _instance_of(path: Path) -> str | None:
    """Instance that wrote a file: "" if it does not say, None if its header is damaged."""
    if path.suffix == ".ckpt":
        return ""
    try:
        return read_metadata(path).get(INSTANCE_KEY, "")
    except ConfigError:
        return None


def _newest_first(entries: Collection[_Entry]) -> list[_Entry]:
    """Order files as the module's second rule says."""
    last_write: dict[str | None, str] = {}
    for entry in entries:
        last_write[entry.instance] = max(entry.stamp, last_write.get(entry.instance, ""))

    def age(entry: _Entry) -> tuple[str, int, str, str]:
        return (last_write[entry.instance], entry.iteration, entry.stamp, entry.path.name)

    return sorted(entries, key=age, reverse=True)


def _drop_older(directory: Path, fl_name: str, written: Path) -> None:
    """Remove all but the newest file of each of the newest iterations; the one just written always stays.

    What else is kept follows from the directory alone, so that two servers that saved one iteration at the
    same moment never remove each other's file.
    """
    try:
        entries = _newest_first(_list(directory, fl_name))
        newest: dict[tuple[str, int], Path] = {}
        for entry in entries:
            if entry.instance is not None:
                newest.setdefault((entry.instance, entry.iteration), entry.path)
        kept = {written, *islice(newest.values(), KEPT_ITERATIONS)}
        for entry in entries:
            if entry.path not in kept:
                entry.path.unlink(missing_ok=True)
    except OSError as error:
        _log.warn("Older checkpoints stay: {reason}", path=str(directory), reason=str(error))


def _checksum(weights: Mapping[str, Floats], not_aggregated: Collection[str]) -> str:
    """Digest of a model, independent of the order of its weights."""
    digest = xxhash.xxh3_128(json.dumps(sorted(set(not_aggregated))).encode())
    for name in sorted(weights):
        values = weights[name]
        digest.update(json.dumps([name, list(values.shape)]).encode())
        digest.update(values.astype("<f4", order="C", copy=False).reshape(-1).view(np.uint8).data)
    return f"xxh3_128:{digest.hexdigest()}"


def _verify(model: ModelFile, path: Path) -> None:
    """Compare a checkpoint with its checksum, if it has one.

    Raises:
        ConfigError: they differ.
    """
    expected = model.metadata.get(CHECKSUM_KEY)
    if expected is not None and expected != _checksum(model.weights, model.not_aggregated):
        raise ConfigError(f"{path}: its weights are not those that were saved", hint="check the disk")
