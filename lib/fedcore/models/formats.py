"""Model files: read ours, MindSpore's, PyTorch's and NumPy's; write ours and MindSpore's.

=================  =================================================================  ======================
suffix             what it is                                                         weights kept
=================  =================================================================  ======================
``.safetensors``   ours; metadata ``require_aggr_false`` lists what is not averaged   floating types
``.ckpt``          MindSpore checkpoint (protobuf)                                    Float32 only, as there
``.npz``           NumPy archive of plain arrays                                      floating types
``.pt``, ``.pth``  PyTorch ``state_dict``, loaded without running pickled code        floating types
=================  =================================================================  ======================

Rules kept here:

* A file is hostile until proven otherwise: whatever its bytes, the answer is a checked ``ModelFile`` or a
  ``ConfigError`` with path and remedy. No code in it runs, and sizes are judged before memory is taken.
* Every model passes ``check_weights``, in and out: the protocol's limits on names, sizes and finite values.
* Weights are float32 on the wire, so other floating types are converted; the metadata key ``converted`` says
  which. Integer buffers that training keeps for itself are left out (``skipped``); any other type is refused.
* Equal models give equal bytes (``write_model``).

Which file belongs to which iteration is not known here: see ``checkpoints``.

Source: safetensors format description (8-byte little-endian header length, JSON header, data); NumPy NEP 1
(.npy); protobuf encoding; MindSpore's public message ``Checkpoint``.
"""

from __future__ import annotations

import json
import math
import stat
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from safetensors import safe_open
from twisted.logger import Logger

from fedcore.errors import ArrayError, ConfigError, FedcoreError, LocalError, NonFinite, ShapeMismatch
from fedcore.models.durable import replace_file
from fedcore.wire.arrays import Floats, all_finite

NOT_AGGREGATED_KEY = "require_aggr_false"
"""safetensors metadata: JSON list of the weights that keep their initial value."""
SKIPPED_KEY = "skipped"
"""Metadata of a read model: JSON list of the parameters that were left out."""
CONVERTED_KEY = "converted"
"""Metadata of a read model: JSON object, name -> the type it had in the file."""

FEATURE_LIMIT_BYTES = 2**32 - 1
MODEL_LIMIT_BYTES = 2**31 - 1
"""The error text says UINT32_MAX; a FlatBuffer, and so an answer to a device, ends at 2^31-1 bytes."""
FILE_LIMIT_BYTES = 4 * MODEL_LIMIT_BYTES
"""A float64 model together with as much of optimiser state; more is no model and is not even read."""

_OWN_INTEGERS = frozenset({"num_batches_tracked", "position_ids"})
"""Last part of names of integer buffers in models of floats: BatchNorm's counter, transformers' positions."""

_FLOAT32 = frozenset({"F32", "Float32", "float32"})
"""How the formats call it."""

_log = Logger()


@dataclass(frozen=True, eq=False)
class ModelFile:
    """What a model file holds.

    Attributes:
        weights: name -> float32 array, finite, C-contiguous, read-only, of the original shape (a scalar:
            ``()``), in bytewise order of the names.
        not_aggregated: names of weights that keep their initial value for the whole job (``require_aggr``
            false).
        metadata: the file's own texts, and the notes ``skipped`` and ``converted``.
    """

    weights: Mapping[str, Floats]
    not_aggregated: frozenset[str] = frozenset()
    metadata: Mapping[str, str] = field(default_factory=dict)


class _Found(NamedTuple):
    """One parameter of a file: its type as the file says; values only if that is a usable floating type."""

    name: str
    type: str
    values: npt.NDArray[Any] | None


# -- public functions --


def read_model(path: Path) -> ModelFile:
    """Read and check a model of any of the known formats.

    Parameters that were left out are logged as one warning.

    Args:
        path: the file; its suffix names the format, upper or lower case.

    Raises:
        ConfigError: no such file, unknown suffix, damaged or hostile content, or a model the protocol cannot
            carry. Its ``__cause__`` is the ``OSError`` if the file could not be read at all.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise _wrong_suffix(path)
    try:
        _check_file(path)
        model = read(path)
        check_weights(model.weights, model.not_aggregated)
    except FedcoreError as error:
        raise ConfigError(f"{path}: {error.args[0]}", hint=error.hint) from error
    except OSError as error:
        text = f"{path}: cannot be read: {error.strerror or error}"
        raise ConfigError(text, hint="check the path and that the daemon's user may read it") from error
    except Exception as error:
        # Parsers of four formats met foreign bytes: no list of their exceptions is complete.
        raise _damaged(path, error) from error
    return model


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a ``.safetensors`` file; its header is checked, its weights are not read.

    Raises:
        ConfigError: the file cannot be read, its header is damaged or it is shorter than the header says.
    """
    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # as in read_model
        raise _damaged(path, error) from error


def write_model(
    path: Path, weights: Mapping[str, Floats], not_aggregated: Collection[str], metadata: Mapping[str, str]
) -> None:
    """Write a ``.safetensors`` file, atomically and durably; equal arguments give equal bytes.

    Args:
        path: the target; an existing file is replaced.
        weights: name -> float32 array of any shape.
        not_aggregated: names whose ``require_aggr`` is false.
        metadata: further texts; the key ``require_aggr_false`` is reserved.

    Raises:
        ArrayError: ``check_weights`` refuses the model; nothing is written.
        LocalError: a reserved name, a weight of another type, or metadata that is no text.
        OSError: see ``durable.replace_file``.
    """
    if path.suffix != ".safetensors":
        raise LocalError(f"{path}: write_model writes .safetensors only")
    replace_file(path, _encode_safetensors(weights, not_aggregated, metadata))


def write_ckpt(path: Path, weights: Mapping[str, Floats]) -> None:
    """Write a MindSpore checkpoint, atomically and durably, to take a model back to MindSpore.

    The format has no place for ``require_aggr`` and metadata. A scalar gets the dims ``[0]``, as MindSpore
    does it.

    Raises:
        ArrayError: ``check_weights`` refuses the model; nothing is written.
        OSError: see ``durable.replace_file``.
    """
    check_weights(weights, ())
    _check_types(weights)

    def chunks() -> Iterator[bytes]:
        # Messages written one after the other read as one message with all their repeated fields.
        for name, values in weights.items():
            value = {
                "dims": values.shape or (0,),
                "tensor_type": "Float32",
                "tensor_content": _bytes_of(values).tobytes(),
            }
            yield _checkpoint_message()(value=[{"tag": name, "tensor": value}]).SerializeToString()

    replace_file(path, chunks())


def check_weights(weights: Mapping[str, npt.NDArray[np.float32]], not_aggregated: Collection[str]) -> None:
    """Check an initial model as the protocol demands (spec: model store, limits at the start).

    Args:
        weights: name -> float32 array of any shape.
        not_aggregated: must be a subset of the names.

    Raises:
        ShapeMismatch: an empty or unprintable name, a size out of range, or an unknown name in
            ``not_aggregated``.
        NonFinite: NaN or infinity anywhere.
    """
    for name, values in weights.items():
        if not name:
            raise ShapeMismatch("Feature name cannot be empty")
        if not _is_text(name):
            raise ShapeMismatch(f"weight {name!r}: the name is not valid Unicode", hint="rename it")
        if not 0 < values.nbytes < FEATURE_LIMIT_BYTES:
            text = f"Feature size {values.nbytes}  cannot <=0 or >=UINT32_MAX"
            raise ShapeMismatch(text, hint=f"weight {name!r}, shape {list(values.shape)}")
    total = sum(values.nbytes for values in weights.values())
    if not 0 < total < MODEL_LIMIT_BYTES:
        text = f"Model size {total} cannot <=0 or >=UINT32_MAX"
        raise ShapeMismatch(text, hint=f"it needs a weight and less than {MODEL_LIMIT_BYTES} bytes")
    unknown = sorted(set(not_aggregated) - set(weights))
    if unknown:
        text = f"{NOT_AGGREGATED_KEY} names what is not in the model: {', '.join(map(repr, unknown[:5]))}"
        raise ShapeMismatch(text, hint="correct the names")
    broken = [name for name, values in weights.items() if not all_finite(values.reshape(-1))]
    if broken:
        text = "Verify feature map failed for initial model."
        names = ", ".join(map(repr, broken[:5]))
        raise NonFinite(text, hint=f"NaN or infinity in {names}: train or export it again")


# -- what the readers share --


def _check_file(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ArrayError("not a file", hint="give the path of a model file")
    if status.st_size == 0:
        raise ArrayError("the file is empty", hint="write it again")
    if status.st_size > FILE_LIMIT_BYTES:
        text = f"{status.st_size} bytes are more than any model has"
        raise ArrayError(text, hint="give the path of a model file")


def _wrong_suffix(path: Path) -> ConfigError:
    if path.suffix.lower() == ".mindir":
        hint = "MindIR holds a graph; save the weights with mindspore.save_checkpoint and give the .ckpt file"
    else:
        hint = "rename or convert it"
    return ConfigError(
        f"{path}: The value of parameter 'feature_map' is expected to be model file path, "
        "ends with '.safetensors', '.ckpt', '.npz', '.pt' or '.pth'.",
        hint=hint,
    )


def _damaged(path: Path, error: Exception) -> ConfigError:
    suffix = path.suffix.lower()
    text = f"{path}: damaged, incomplete or not a {suffix} file: {str(error) or type(error).__name__}"
    return ConfigError(text, hint=_HINTS[suffix])


def _collect(
    path: Path,
    found: Iterable[_Found],
    metadata: Mapping[str, str],
    not_aggregated: Collection[str] = (),
    *,
    may_skip: Callable[[str], bool] = lambda name: name.rpartition(".")[2] in _OWN_INTEGERS,
) -> ModelFile:
    """Make float32 weights of what a reader found and note what was converted or left out.

    Raises:
        ShapeMismatch: two parameters of one name.
        ArrayError: a parameter of an unusable type that may not be skipped.
    """
    weights: dict[str, Floats] = {}
    skipped: list[str] = []
    converted: dict[str, str] = {}
    for name, kind, values in found:
        if name in weights or name in skipped:
            raise ShapeMismatch(f"the file holds two parameters named {name!r}", hint="write it again")
        if values is None:
            if not may_skip(name):
                text = f"weight {name!r} is of type {kind}"
                raise ArrayError(text, hint="convert it to float32 or leave it out")
            skipped.append(name)
            continue
        if kind not in _FLOAT32:
            converted[name] = kind
        weights[name] = _as_floats(values)
    notes = dict(metadata)
    if skipped:
        notes[SKIPPED_KEY] = json.dumps(sorted(skipped))
        _log.warn("{path}: parameters left out: {skipped}", path=str(path), skipped=notes[SKIPPED_KEY])
    if converted:
        notes[CONVERTED_KEY] = json.dumps(converted, sort_keys=True)
    ordered = {name: weights[name] for name in sorted(weights)}
    return ModelFile(ordered, frozenset(not_aggregated) - frozenset(skipped), notes)


def _as_floats(values: npt.NDArray[Any]) -> Floats:
    """Give values as native, aligned, C-contiguous, read-only float32, without a copy where possible."""
    with np.errstate(over="ignore", under="ignore"):  # check_weights refuses what became infinite
        floats: Floats = np.require(values, np.float32, ["C_CONTIGUOUS", "ALIGNED"])
    floats = floats.view()
    floats.setflags(write=False)
    return floats


def _is_text(name: str) -> bool:
    """Tell whether a text can be written: a lone surrogate has no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bytes_of(values: Floats) -> memoryview:
    """View or copy of an array as its bytes, row-major and little-endian."""
    return np.asarray(values, "<f4", order="C").reshape(-1).view(np.uint8).data


# -- safetensors --

_SAFETENSORS_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def _read_safetensors(path: Path) -> ModelFile:
    with safe_open(path, framework="np"):
        pass  # the library checks that types, shapes and offsets agree and cover the data without gap
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", None) or {}
    not_aggregated = _parse_not_aggregated(metadata.pop(NOT_AGGREGATED_KEY, "[]"))
    found = (
        _Found(name, info["dtype"], _slice_safetensors(data, start, info)) for name, info in header.items()
    )
    return _collect(path, found, metadata, not_aggregated)


def _slice_safetensors(data: bytes, start: int, info: Mapping[str, Any]) -> npt.NDArray[Any] | None:
    dtype = _SAFETENSORS_FLOATS.get(info["dtype"])
    if dtype is None:
        return None
    shape = tuple(info["shape"])
    values: npt.NDArray[Any] = np.frombuffer(data, dtype, math.prod(shape), start + info["data_offsets"][0])
    if info["dtype"] == "BF16":  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(shape)


def _parse_not_aggregated(text: str) -> list[str]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        text = f"metadata {NOT_AGGREGATED_KEY} is not a JSON list of names"
        raise ArrayError(text, hint='for example ["bn.weight"]')
    return names


def _encode_safetensors(
    weights: Mapping[str, Floats], not_aggregated: Collection[str], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Check a model and give the chunks of its file (the library's own writer shuffles the metadata)."""
    check_weights(weights, not_aggregated)
    _check_types(weights)
    if "__metadata__" in weights or NOT_AGGREGATED_KEY in metadata:
        raise LocalError(f"__metadata__ and {NOT_AGGREGATED_KEY} are names of the file format")
    if not all(isinstance(text, str) and _is_text(text) for pair in metadata.items() for text in pair):
        raise LocalError("metadata must be texts of valid Unicode")
    texts = dict(metadata)
    if not_aggregated:
        texts[NOT_AGGREGATED_KEY] = json.dumps(sorted(set(not_aggregated)))
    header: dict[str, Any] = {"__metadata__": dict(sorted(texts.items()))} if texts else {}
    ordered = [(name, weights[name]) for name in sorted(weights)]
    offset = 0
    for name, values in ordered:
        end = offset + values.nbytes
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight bytes
    head = len(text).to_bytes(8, "little") + text
    return chain([head], (_bytes_of(values) for _, values in ordered))


def _check_types(weights: Mapping[str, Floats]) -> None:
    for name, values in weights.items():
        if values.dtype != np.float32:
            raise LocalError(f"weight {name!r} is {values.dtype}, not float32")


# -- MindSpore --


@cache
def _checkpoint_message() -> Any:
    """Build the message class of a checkpoint.

    Source: MindSpore's public definition: ``Checkpoint {repeated Value value = 1}``, ``Value {required string
    tag = 1; oneof value {TensorProto tensor = 2; MapTensorProto maptensor = 3}}``, ``TensorProto {repeated
    int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3}``. A map tensor is
    kept as opaque bytes.
    """
    of = descriptor_pb2.FieldDescriptorProto
    optional, required, repeated = of.LABEL_OPTIONAL, of.LABEL_REQUIRED, of.LABEL_REPEATED
    file = descriptor_pb2.FileDescriptorProto(name="ckpt.proto", package="ckpt", syntax="proto2")
    tensor = file.message_type.add(name="Tensor")
    tensor.field.add(name="dims", number=1, label=repeated, type=of.TYPE_INT64)
    tensor.field.add(name="tensor_type", number=2, label=required, type=of.TYPE_STRING)
    tensor.field.add(name="tensor_content", number=3, label=required, type=of.TYPE_BYTES)
    value = file.message_type.add(name="Value")
    value.oneof_decl.add(name="value")
    value.field.add(name="tag", number=1, label=required, type=of.TYPE_STRING)
    message = {"type": of.TYPE_MESSAGE, "type_name": ".ckpt.Tensor"}
    value.field.add(name="tensor", number=2, label=optional, oneof_index=0, **message)
    value.field.add(name="maptensor", number=3, label=optional, oneof_index=0, type=of.TYPE_BYTES)
    checkpoint = file.message_type.add(name="Checkpoint")
    message["type_name"] = ".ckpt.Value"
    checkpoint.field.add(name="value", number=1, label=repeated, **message)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("ckpt.Checkpoint"))


def _read_ckpt(path: Path) -> ModelFile:
    message = _checkpoint_message()()
    message.ParseFromString(path.read_bytes())
    if not message.IsInitialized():
        raise ArrayError("a parameter without name, type or content", hint=_HINTS[".ckpt"])
    if not message.value:
        raise ArrayError("no parameter in it", hint=_HINTS[".ckpt"])
    return _collect(path, _find_ckpt(message.value), {}, may_skip=lambda name: True)


def _find_ckpt(entries: Iterable[Any]) -> Iterator[_Found]:
    """Join the consecutive entries of each parameter: a large one is split, each entry holds a part of it."""
    for tag, group in groupby(entries, key=lambda entry: entry.tag):
        parts = list(group)
        if not isinstance(tag, str):  # the library hands out bytes where the file is not UTF-8
            raise ArrayError(f"parameter {tag!r}: the name is not valid Unicode", hint=_HINTS[".ckpt"])
        if not all(part.HasField("tensor") for part in parts):
            raise ArrayError(f"parameter {tag!r} is not a tensor", hint="map parameters cannot be averaged")
        kind = parts[0].tensor.tensor_type
        if kind != "Float32":
            yield _Found(tag, kind, None)
            continue
        if any(part.tensor.tensor_type != kind for part in parts):
            raise ArrayError(f"parameter {tag!r} is of several types", hint=_HINTS[".ckpt"])
        content = b"".join(part.tensor.tensor_content for part in parts)
        yield _Found(tag, kind, _shape_ckpt(tag, tuple(parts[0].tensor.dims), content))


def _shape_ckpt(tag: str, dims: tuple[int, ...], content: bytes) -> Floats:
    """Give the content its shape; MindSpore writes a scalar with the dims ``[0]`` or none."""
    shape = () if dims == (0,) and len(content) == 4 else dims
    if min(shape, default=0) < 0 or math.prod(shape) * 4 != len(content):
        text = f"parameter {tag!r} has {len(content)} bytes, its shape {list(dims)} asks for another number"
        raise ArrayError(text, hint=_HINTS[".ckpt"])
    return np.frombuffer(content, "<f4").reshape(shape)


# -- NumPy --


def _read_npz(path: Path) -> ModelFile:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > FILE_LIMIT_BYTES:
            raise ArrayError(f"{unpacked} bytes unpacked are more than any model has", hint=_HINTS[".npz"])
        return _collect(path, (_find_npz(archive, member) for member in archive.infolist()), {})


def _find_npz(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Found:
    name, dot, suffix = member.filename.rpartition(".")
    if (dot, suffix) != (".", "npy"):
        raise ArrayError(f"member {member.filename!r} is not an array", hint=_HINTS[".npz"])
    # The whole member is read first, so that zipfile checks its length and CRC.
    values = np.lib.format.read_array(BytesIO(archive.read(member)), allow_pickle=False)
    return _Found(name, values.dtype.name, values if values.dtype.kind == "f" else None)


# -- PyTorch --


def _read_torch(path: Path) -> ModelFile:
    try:
        import torch
    except ImportError as error:
        raise ConfigError("reading it needs PyTorch", hint="pip install 'fedcore[torch]'") from error
    state: Any = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ArrayError(f"holds a {type(state).__name__}, not a state_dict", hint=_HINTS[".pt"])
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ArrayError(f"entry {name!r} is a {type(value).__name__}, not a tensor", hint=_HINTS[".pt"])
    # A tensor may repeat few stored values without end (stride 0): judge the sizes before unfolding them.
    total = sum(value.numel() * 4 for value in state.values())
    if total >= MODEL_LIMIT_BYTES:
        raise ShapeMismatch(f"Model size {total} cannot <=0 or >=UINT32_MAX", hint=_HINTS[".pt"])

    def find(name: str, value: torch.Tensor) -> _Found:
        kind = str(value.dtype).removeprefix("torch.")
        if not value.is_floating_point():
            return _Found(name, kind, None)
        return _Found(name, kind, value.to(torch.float32).contiguous().numpy(force=True))

    return _collect(path, (find(name, value) for name, value in state.items()), {})


_READERS: Mapping[str, Callable[[Path], ModelFile]] = {
    ".safetensors": _read_safetensors,
    ".ckpt": _read_ckpt,
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
}
_HINTS: Mapping[str, str] = {
    ".safetensors": "copy or write the file again",
    ".ckpt": "save it with mindspore.save_checkpoint, without enc_key: encrypted files cannot be read",
    ".npz": "write it again with numpy.savez(path, **arrays), plain float arrays only",
    ".pt": "save it with torch.save(model.state_dict(), path): only tensors are loaded, never code",
    ".pth": "save it with torch.save(model.state_dict(), path): only tensors are loaded, never code",
}
