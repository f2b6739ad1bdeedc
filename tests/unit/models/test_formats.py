"""Model files: round trips, foreign files, hostile files."""

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from twisted.logger import capturedLogs

from fedcore.errors import ArrayError, ConfigError, LocalError, NonFinite, ShapeMismatch
from fedcore.models.formats import (
    MODEL_LIMIT_BYTES,
    ModelFile,
    check_weights,
    read_metadata,
    read_model,
    write_ckpt,
    write_model,
)

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = TEXTS.filter(lambda name: name not in ("", "__metadata__"))
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, max_side=4), elements=FLOATS)
MODELS = st.dictionaries(NAMES, ARRAYS, min_size=1, max_size=5)
IN_ONE_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SMALL: dict[str, Any] = {
    "dense.bias": np.array([1.5, -2.0], np.float32),
    "dense.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
    "scale": np.array(0.25, np.float32),
}


def assert_same(model: ModelFile, expected: Mapping[str, np.ndarray]) -> None:
    assert list(model.weights) == sorted(expected, key=str.encode)
    for name, values in model.weights.items():
        assert values.dtype == np.float32
        assert values.dtype.isnative and values.flags.c_contiguous and values.flags.aligned
        assert not values.flags.writeable
        assert values.shape == expected[name].shape
        np.testing.assert_array_equal(values, expected[name])


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.hint or "Feature name" in str(caught.value)
    return str(caught.value)


# -- MindSpore's format, written by hand from the protobuf encoding


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def part(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(dims: list[int], kind: str, content: bytes, packed: bool = False) -> bytes:
    if packed:
        shape = part(1, b"".join(map(varint, dims)))
    else:
        shape = b"".join(b"\x08" + varint(size) for size in dims)
    return shape + part(2, kind.encode()) + part(3, content)


def value(tag: str, dims: list[int], kind: str, content: bytes, packed: bool = False) -> bytes:
    return part(1, part(1, tag.encode()) + part(2, tensor(dims, kind, content, packed)))


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


SMALL_CKPT = (
    value("dense.weight", [3, 2], "Float32", floats(0, 1, 2, 3, 4, 5)),
    value("scale", [0], "Float32", floats(0.25)),
    value("dense.bias", [2], "Float32", floats(1.5, -2.0)),
)

# -- files of every format


def small_safetensors(path: Path) -> None:
    write_model(path, SMALL, ["scale"], {"made_by": "test"})


def small_ckpt(path: Path) -> None:
    path.write_bytes(b"".join(SMALL_CKPT))


def small_npz(path: Path) -> None:
    np.savez(path, **SMALL)


def small_compressed_npz(path: Path) -> None:
    np.savez_compressed(path, **SMALL)


def small_torch(path: Path, **options: Any) -> None:
    torch = pytest.importorskip("torch")
    torch.save({name: torch.tensor(values) for name, values in SMALL.items()}, path, **options)


def small_legacy_torch(path: Path) -> None:
    small_torch(path, _use_new_zipfile_serialization=False)


SMALL_FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "safetensors": ("m.safetensors", small_safetensors),
    "ckpt": ("m.ckpt", small_ckpt),
    "npz": ("m.npz", small_npz),
    "npz-compressed": ("m.npz", small_compressed_npz),
    "torch": ("m.pt", small_torch),
    "torch-legacy": ("m.pth", small_legacy_torch),
}


@pytest.fixture(params=SMALL_FILES)
def small_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name, write = SMALL_FILES[request.param]
    write(tmp_path / name)
    return tmp_path / name


def test_every_format_gives_the_same_model(small_file: Path) -> None:
    assert_same(read_model(small_file), SMALL)


def test_suffix_in_upper_case(small_file: Path) -> None:
    assert_same(read_model(small_file.rename(small_file.with_suffix(small_file.suffix.upper()))), SMALL)


def test_truncated_at_every_length(small_file: Path) -> None:
    content = small_file.read_bytes()
    whole_messages = {
        len(SMALL_CKPT[0]),
        len(SMALL_CKPT[0] + SMALL_CKPT[1]),
    }  # valid checkpoints by themselves
    for length in range(len(content)):
        small_file.write_bytes(content[:length])
        if small_file.suffix == ".ckpt" and length in whole_messages:
            read_model(small_file)
        else:
            refused(small_file)


@IN_ONE_FOLDER
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_never_escape(small_file: Path, flips: list[tuple[int, int]]) -> None:
    sound = small_file.read_bytes()
    content = bytearray(sound)
    for place, mask in flips:
        content[place % len(content)] ^= mask
    damaged = small_file.with_name("damaged" + small_file.suffix)
    damaged.write_bytes(content)
    try:
        check_weights(read_model(damaged).weights, ())
    except ConfigError as error:
        assert str(damaged) in str(error)


@IN_ONE_FOLDER
@given(suffix=st.sampled_from([".safetensors", ".ckpt", ".npz", ".pt"]), content=st.binary(max_size=300))
def test_any_bytes_at_all(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    refused(path)


def test_wrong_suffix(tmp_path: Path) -> None:
    text = refused(tmp_path / "model.h5")
    assert "The value of parameter 'feature_map' is expected to be model file path, ends with" in text
    assert "'.safetensors', '.ckpt', '.npz', '.pt' or '.pth'" in text
    assert "save_checkpoint" in refused(tmp_path / "model.mindir")


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "m.npz")
    (tmp_path / "d.npz").mkdir()
    assert "not a file" in refused(tmp_path / "d.npz")
    (tmp_path / "e.ckpt").touch()
    assert "the file is empty" in refused(tmp_path / "e.ckpt")
    with (tmp_path / "huge.ckpt").open("wb") as file:
        file.truncate(4 * MODEL_LIMIT_BYTES + 1)  # sparse
    assert "more than any model" in refused(tmp_path / "huge.ckpt")


# -- the checks of an initial model


def test_texts_of_the_original() -> None:
    one = np.ones(1, np.float32)
    with pytest.raises(ShapeMismatch, match=r"^Feature name cannot be empty$"):
        check_weights({"": one}, ())
    with pytest.raises(ShapeMismatch, match=r"^Feature size 0  cannot <=0 or >=UINT32_MAX"):
        check_weights({"a": np.ones((3, 0), np.float32)}, ())
    with pytest.raises(ShapeMismatch, match=r"^Feature size 4294967296  cannot <=0 or >=UINT32_MAX"):
        check_weights({"a": np.broadcast_to(one, 2**30)}, ())
    with pytest.raises(ShapeMismatch, match=r"^Model size 2147483652 cannot <=0 or >=UINT32_MAX"):
        check_weights({"a": np.broadcast_to(one, 2**29), "b": one}, ())
    with pytest.raises(ShapeMismatch, match=r"^Model size 0 cannot <=0 or >=UINT32_MAX"):
        check_weights({}, ())
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(NonFinite, match=r"^Verify feature map failed for initial model\. .*'b'"):
            check_weights({"a": one, "b": np.array([[0, bad]], np.float32)}, ())
    with pytest.raises(ShapeMismatch, match="'zz'"):
        check_weights({"a": one}, ["a", "zz"])
    with pytest.raises(ShapeMismatch, match="not valid Unicode"):
        check_weights({"\ud800": one}, ())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".ckpt"])
def test_nan_in_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    bad = np.array([1, np.nan], np.float32)
    if suffix == ".npz":
        np.savez(path, w=bad)
    elif suffix == ".safetensors":
        safetensors.numpy.save_file({"w": bad}, path)
    else:
        path.write_bytes(value("w", [2], "Float32", bad.tobytes()))
    assert "Verify feature map failed for initial model." in refused(path)


# -- safetensors


@IN_ONE_FOLDER
@given(model=MODELS, metadata=st.dictionaries(TEXTS, TEXTS, max_size=4), data=st.data())
def test_round_trip(
    tmp_path: Path, model: dict[str, Any], metadata: dict[str, str], data: st.DataObject
) -> None:
    metadata.pop("require_aggr_false", None)
    frozen = data.draw(st.sets(st.sampled_from(sorted(model))))
    path = tmp_path / "m.safetensors"
    write_model(path, model, frozen, metadata)
    read = read_model(path)
    assert_same(read, model)
    assert read.not_aggregated == frozen
    assert read.metadata == metadata
    raw = read_metadata(path)
    assert json.loads(raw.pop("require_aggr_false", "[]")) == sorted(frozen)
    assert raw == metadata
    for name, values in safetensors.numpy.load_file(path).items():  # the library agrees
        np.testing.assert_array_equal(values, model[name])

    content = path.read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0  # so that the values are aligned when mapped
    shuffled = data.draw(st.permutations(sorted(model)))
    write_model(path, {name: model[name] for name in shuffled}, frozen, dict(reversed(metadata.items())))
    assert path.read_bytes() == content


def test_strided_and_transposed_arrays(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    model = {"t": base.T, "s": base[::2, ::3]}
    write_model(tmp_path / "m.safetensors", model, (), {})
    write_ckpt(tmp_path / "m.ckpt", model)
    assert_same(read_model(tmp_path / "m.safetensors"), model)
    assert_same(read_model(tmp_path / "m.ckpt"), model)


def test_what_write_model_refuses(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    one = np.ones(1, np.float32)
    for weights, frozen, metadata, error in (
        ({"a": one.astype(np.float64)}, [], {}, LocalError),
        ({"__metadata__": one}, [], {}, LocalError),
        ({"a": one}, [], {"require_aggr_false": "[]"}, LocalError),
        ({"a": one}, [], {"k": "\udc80"}, LocalError),
        ({"a": one}, [], {"k": 1}, LocalError),
        ({"a": one}, ["b"], {}, ArrayError),
        ({"a": one * np.float32("nan")}, [], {}, ArrayError),
        ({}, [], {}, ArrayError),
    ):
        with pytest.raises(error):
            write_model(path, weights, frozen, metadata)  # type: ignore[arg-type]
    with pytest.raises(LocalError):
        write_model(tmp_path / "m.npz", {"a": one}, [], {})
    with pytest.raises(LocalError):
        write_ckpt(tmp_path / "m.ckpt", {"a": one.astype(np.float64)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "null", "{}", "[1]", '"a"', "[" * 100_000, '["a", "zz"]'])
def test_bad_list_of_what_is_not_aggregated(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({"a": np.ones(1, np.float32)}, path, {"require_aggr_false": text})
    assert "require_aggr_false" in refused(path)


def test_other_types_in_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    arrays: dict[str, Any] = {
        "half": np.array([0.5, 65504], np.float16),
        "double": np.array([[0.1]], np.float64),
        "single": np.array([3], np.float32),
        "bn.num_batches_tracked": np.array(7, np.int64),
    }
    safetensors.numpy.save_file(
        arrays, path, {"require_aggr_false": '["bn.num_batches_tracked", "half"]', "a": "b"}
    )
    with capturedLogs() as logs:
        model = read_model(path)
    assert_same(model, {k: v.astype(np.float32) for k, v in arrays.items() if v.dtype.kind == "f"})
    assert model.not_aggregated == {"half"}
    assert model.metadata == {
        "a": "b",
        "converted": '{"double": "F64", "half": "F16"}',
        "skipped": '["bn.num_batches_tracked"]',
    }
    assert [(log["path"], log["skipped"]) for log in logs] == [(str(path), '["bn.num_batches_tracked"]')]

    safetensors.numpy.save_file({"w": np.array([1, 2], np.int8)}, path)
    assert "weight 'w' is of type I8" in refused(path)
    safetensors.numpy.save_file({"w": np.array([1e300])}, path)
    assert "Verify feature map failed" in refused(path)


def test_bfloat16_in_safetensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    path = tmp_path / "m.safetensors"
    weights = torch.tensor([[1.0, -0.007], [3e38, 1e-40]], dtype=torch.bfloat16)
    save_file({"odd": torch.ones(1, dtype=torch.bfloat16), "w": weights}, path)
    model = read_model(path)
    np.testing.assert_array_equal(model.weights["w"], weights.float().numpy())
    assert json.loads(model.metadata["converted"]) == {"odd": "BF16", "w": "BF16"}


# -- MindSpore


@IN_ONE_FOLDER
@given(model=MODELS, packed=st.booleans(), cuts=st.lists(st.integers(0, 1000), max_size=3), data=st.data())
def test_hand_made_checkpoints(
    tmp_path: Path, model: dict[str, Any], packed: bool, cuts: list[int], data: st.DataObject
) -> None:
    path = tmp_path / "m.ckpt"
    content = b""
    for name, values in model.items():
        dims = list(values.shape) or data.draw(st.sampled_from([[], [0]]))
        raw = values.tobytes()
        ends = sorted({min(cut, len(raw)) for cut in cuts} | {len(raw)})
        for begin, end in zip([0, *ends], ends, strict=False):  # a large parameter comes in several entries
            content += value(name, dims, "Float32", raw[begin:end], packed)
    path.write_bytes(content)
    assert_same(read_model(path), model)


@IN_ONE_FOLDER
@given(model=MODELS)
def test_written_checkpoint_is_the_hand_made_one(tmp_path: Path, model: dict[str, Any]) -> None:
    path = tmp_path / "m.ckpt"
    write_ckpt(path, model)
    by_hand = [value(name, list(v.shape) or [0], "Float32", v.tobytes()) for name, v in model.items()]
    assert path.read_bytes() == b"".join(by_hand)
    assert_same(read_model(path), model)


def test_other_parameters_of_a_checkpoint_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    others = value("step", [1], "Int32", b"\1\0\0\0") + value("half", [1], "Float16", b"\0\0")
    path.write_bytes(others + value("w", [1], "Float32", floats(2)) + b"\x18\x05")  # and an unknown field
    with capturedLogs() as logs:
        model = read_model(path)
    assert_same(model, {"w": np.array([2], np.float32)})
    assert json.loads(model.metadata["skipped"]) == ["half", "step"]
    assert len(logs) == 1
    path.write_bytes(others)
    assert "Model size 0" in refused(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (value("w", [2], "Float32", floats(1)), "bytes, its shape"),
        (value("w", [-1, -1], "Float32", floats(1)), "bytes, its shape"),
        (value("w", [2**62, 4], "Float32", b""), "bytes, its shape"),
        (value("w", [], "Float32", b""), "bytes, its shape"),
        (value("w", [0], "Float32", b""), "Feature size 0  cannot"),
        (value("w", [1] * 100, "Float32", floats(1)), "not a .ckpt file"),
        (value("", [1], "Float32", floats(1)), "Feature name cannot be empty"),
        (value("w", [1], "Float32", floats(1)) * 2, "bytes, its shape"),
        (
            value("w", [1], "Float32", floats(1))
            + value("v", [1], "Float32", floats(1))
            + value("w", [1], "Float32", floats(1)),
            "two parameters named 'w'",
        ),
        (value("w", [2], "Float32", floats(1)) + value("w", [2], "Int32", floats(1)), "several types"),
        (part(1, part(1, b"w") + part(3, b"anything")), "is not a tensor"),
        (part(1, part(1, b"w")), "is not a tensor"),
        (part(1, part(1, b"\xff") + part(2, tensor([1], "Float32", floats(1)))), "not valid Unicode"),
        (part(1, part(2, tensor([1], "Float32", floats(1)))), ".ckpt"),
        (part(1, part(1, b"w") + part(2, part(2, b"Float32"))), ".ckpt"),
        (b"\x18\x05", "no parameter in it"),
    ],
)
def test_wrong_checkpoints(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "m.ckpt").write_bytes(content)
    assert text in refused(tmp_path / "m.ckpt")


# -- NumPy


def test_other_types_in_npz(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    fortran = np.asfortranarray(np.arange(6, dtype=">f8").reshape(2, 3))
    arrays: dict[str, Any] = {"layer/w": fortran, "half": np.float16(0.5)}
    np.savez(path, **arrays)
    model = read_model(path)
    assert_same(model, {"layer/w": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.array(0.5, "f4")})
    assert json.loads(model.metadata["converted"]) == {"half": "float16", "layer/w": "float64"}
    for bad in (np.array([1, 2]), np.array([1j]), np.array(["a"]), np.zeros(2, "f4,f4"), np.array([True])):
        np.savez(path, w=bad)
        assert "weight 'w' is of type" in refused(path)


class Bomb:
    """An object whose unpickling touches a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_pickled_npz_never_runs(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    np.savez(path, w=np.array([Bomb(tmp_path / "boom")], dtype=object))
    refused(path)
    assert not (tmp_path / "boom").exists()


def npy(header: str, body: bytes) -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


@pytest.mark.parametrize(
    "members",
    [
        {"w.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,)}", b"1234")},
        {"w.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", b"1234")},
        {"w.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}", b"")},
        {"w.npy": npy("__import__('os').abort()", b"")},
        {"w.npy": npy("(" * 5000, b"")},
        {"w.npy": b"no array"},
        {"w.txt": b"no array"},
        {"w": b"no array"},
        {".npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"\0\0\0\0")},
    ],
)
def test_hostile_npz(tmp_path: Path, members: dict[str, bytes]) -> None:
    path = tmp_path / "m.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_one_name_twice_in_npz(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ones(1, np.float32))
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("w.npy", buffer.getvalue())
        archive.writestr("w.npy", buffer.getvalue())
    assert "two parameters named 'w'" in refused(tmp_path / "m.npz")


def test_zip_bomb_is_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcore.models.formats.FILE_LIMIT_BYTES", 100_000)
    np.savez_compressed(tmp_path / "m.npz", w=np.zeros(100_000, np.float32))
    assert (tmp_path / "m.npz").stat().st_size < 10_000
    assert "unpacked are more than any model has" in refused(tmp_path / "m.npz")


# -- PyTorch


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict"])
def test_a_real_state_dict(tmp_path: Path, key: str | None) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(2, 2).bfloat16()
    )
    state = net.state_dict()
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "m.pt")
    model = read_model(tmp_path / "m.pt")
    counter = "1.num_batches_tracked"
    assert_same(model, {k: v.float().numpy() for k, v in state.items() if k != counter})
    assert json.loads(model.metadata["skipped"]) == [counter]
    assert json.loads(model.metadata["converted"]) == {"2.bias": "bfloat16", "2.weight": "bfloat16"}


def test_unusual_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "t": shared.T,
        "row": shared[1],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "repeated": torch.ones(1).expand(3),
        "eight": torch.ones(2).to(torch.float8_e4m3fn),
    }
    torch.save(tensors, tmp_path / "m.pth")
    assert_same(read_model(tmp_path / "m.pth"), {k: v.detach().float().numpy() for k, v in tensors.items()})


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.pt"
    for thing, text in (
        (torch.ones(2), "holds a Tensor, not a state_dict"),
        ([torch.ones(2)], "holds a list"),
        ({"w": torch.ones(2), "lr": 0.1}, "entry 'lr' is a float"),
        ({1: torch.ones(2)}, "entry 1 is a Tensor"),
        ({"w": torch.ones(2, dtype=torch.int32)}, "weight 'w' is of type int32"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "weight 'w' is of type complex64"),
        ({"w": torch.eye(2).to_sparse()}, ".pt"),
        ({"w": torch.ones(1, device="meta")}, ".pt"),
        ({"w": torch.ones(1).expand(2**32)}, "Model size 17179869184 cannot <=0 or >=UINT32_MAX"),
        ({}, "Model size 0"),
        (torch.nn.Linear(1, 1), "state_dict()"),
    ):
        torch.save(thing, path)
        assert text in refused(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_never_runs(tmp_path: Path, new_format: bool) -> None:
    torch = pytest.importorskip("torch")
    bomb = Bomb(tmp_path / "boom")
    torch.save({"w": bomb}, tmp_path / "m.pt", _use_new_zipfile_serialization=new_format)
    assert "only tensors are loaded, never code" in refused(tmp_path / "m.pt")
    (tmp_path / "m.pth").write_bytes(pickle.dumps(bomb))
    refused(tmp_path / "m.pth")
    assert not (tmp_path / "boom").exists()


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.pt").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'fedcore[torch]'" in refused(tmp_path / "m.pt")
