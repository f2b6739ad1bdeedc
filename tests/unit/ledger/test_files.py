"""Real files: who holds the lock, and what happens where there is no room."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.ledger.histories import MODEL, SHAPE

from fedcore.ledger.files import SUFFIX, Held, MappedFile, NoSpace, create_file, ledger_files, open_file
from fedcore.ledger.layout import Damaged, Epoch
from fedcore.ledger.ledger import Ledger

SIZE = 16384
OWNER = """
import sys
from pathlib import Path
from fedcore.ledger.files import create_file
file = create_file(Path(sys.argv[1]), "theirs", 16384)
file.write(8192, b"theirs")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that owns the ledger named theirs."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


class TestLock:
    def test_it_is_held_while_the_owner_lives(self, tmp_path: Path, owner: subprocess.Popen[bytes]) -> None:
        with pytest.raises(Held, match="a living process"):
            open_file(tmp_path / "theirs.ledger")

    def test_a_paused_owner_is_not_dead(self, tmp_path: Path, owner: subprocess.Popen[bytes]) -> None:
        owner.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, owner.pid, os.WSTOPPED | os.WNOWAIT)
        with pytest.raises(Held):
            open_file(tmp_path / "theirs.ledger")
        owner.send_signal(signal.SIGCONT)

    def test_after_a_kill_it_is_free_and_everything_written_is_there(
        self, tmp_path: Path, owner: subprocess.Popen[bytes]
    ) -> None:
        owner.kill()
        owner.wait()
        file = open_file(tmp_path / "theirs.ledger")
        assert bytes(file.buffer[8192:8198]) == b"theirs"
        with pytest.raises(Held):
            open_file(tmp_path / "theirs.ledger")

    def test_closing_drops_it_though_the_bytes_are_still_mapped(self, tmp_path: Path) -> None:
        file = create_file(tmp_path, "x", SIZE)
        view = file.buffer[:10]
        file.close()
        again = open_file(file.path)
        again.write(0, b"something")
        assert bytes(view) == b"something\0"
        again.close()

    def test_a_program_that_the_owner_starts_does_not_inherit_it(self, tmp_path: Path) -> None:
        file = create_file(tmp_path, "x", SIZE)
        with subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False
        ) as child:
            file.close()
            open_file(file.path).close()
            child.communicate(b"\n")


class TestCreate:
    def test_it_is_whole_zeroed_named_and_linked(self, tmp_path: Path) -> None:
        directory = tmp_path / "not" / "there yet"
        file = create_file(directory, "x", SIZE)
        assert file.path == directory / "x.ledger"
        assert ledger_files(directory) == [file.path]
        assert len(file.buffer) == file.path.stat().st_size == SIZE
        assert file.path.stat().st_blocks * 512 >= SIZE
        assert not any(file.buffer)
        assert file.linked
        assert stat.S_IMODE(file.path.stat().st_mode) & 0o027 == 0

    def test_it_is_locked_before_it_has_any_bytes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A sibling that looks while the file is made must not take it for one without an owner."""
        seen: list[str] = []
        allocate = os.posix_fallocate

        def look(descriptor: int, offset: int, size: int) -> None:
            with pytest.raises(Held):
                open_file(tmp_path / "x.ledger")
            seen.append("held")
            allocate(descriptor, offset, size)

        monkeypatch.setattr(os, "posix_fallocate", look)
        create_file(tmp_path, "x", SIZE)
        assert seen == ["held"]

    def test_where_only_spans_are_written_the_rest_takes_no_room(self, tmp_path: Path) -> None:
        spans = ((0, 4096), (1 << 20, 8192))
        file = create_file(tmp_path, "x", 1 << 24, spans=spans)
        assert len(file.buffer) == file.path.stat().st_size == 1 << 24
        assert file.path.stat().st_blocks * 512 == 4096 + 8192
        for at, length in spans:
            file.buffer[at : at + length] = b"x" * length
        assert file.path.stat().st_blocks * 512 == 4096 + 8192
        assert file.path.read_bytes().count(b"x") == 4096 + 8192

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_without_room_it_says_how_much_is_needed_and_where(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(NoSpace, match=f"needs {SIZE} bytes at {tmp_path}"):
            create_file(tmp_path, "x", SIZE)
        with pytest.raises(NoSpace, match=f"needs 300 bytes at {tmp_path}"):
            create_file(tmp_path, "x", SIZE, spans=((0, 100), (4096, 200)))
        assert list(tmp_path.iterdir()) == []

    def test_another_failure_leaves_nothing_either(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object) -> None:
            raise OSError(errno.EIO, "broken")

        monkeypatch.setattr(os, "posix_fallocate", broken)
        with pytest.raises(OSError, match="broken"):
            create_file(tmp_path, "x", SIZE)
        assert list(tmp_path.iterdir()) == []

    def test_a_full_tmpfs(self, tmp_path: Path) -> None:
        """The real thing: no SIGBUS, no rest, and it works as soon as there is room."""
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "fedcore-test", str(tmp_path)]
        if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("only root may mount a tmpfs")
        try:
            with pytest.raises(NoSpace, match="needs 131072 bytes"):
                create_file(tmp_path, "big", 131072)
            assert list(tmp_path.iterdir()) == []
            first = create_file(tmp_path, "x", 49152)
            with pytest.raises(NoSpace):
                create_file(tmp_path, "y", 49152)
            first.buffer[:] = bytes([1]) * 49152
            first.remove()
            del first
            second = create_file(tmp_path, "y", 49152)
            second.buffer[:] = bytes([2]) * 49152
            second.close()
            del second
        finally:
            subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


class TestOpen:
    def test_a_file_that_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(Damaged, match="is gone"):
            open_file(tmp_path / "x.ledger")

    def test_an_empty_file_and_things_that_are_no_files(self, tmp_path: Path) -> None:
        (tmp_path / "empty.ledger").touch()
        (tmp_path / "folder.ledger").mkdir()
        (tmp_path / "link.ledger").symlink_to(tmp_path / "empty.ledger")
        os.mkfifo(tmp_path / "pipe.ledger")
        for path in ledger_files(tmp_path):
            with pytest.raises(Damaged, match=path.name):
                open_file(path)

    @pytest.mark.parametrize("replaced", [False, True])
    def test_a_file_that_vanishes_while_it_is_opened(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
    ) -> None:
        """Its owner removed it between our look at the name and the lock."""
        made = create_file(tmp_path, "x", SIZE)
        path = made.path
        made.close()
        real = MappedFile.__init__

        def vanish(self: MappedFile, *arguments: object) -> None:
            real(self, *arguments)  # type: ignore[arg-type]
            path.unlink()
            if replaced:
                path.write_bytes(b"another")

        monkeypatch.setattr(MappedFile, "__init__", vanish)
        with pytest.raises(Damaged, match="was removed"):
            open_file(path)

    def test_a_ledger_survives_its_process(self, tmp_path: Path) -> None:
        file = create_file(tmp_path, "x", SHAPE.size)
        epoch = Epoch("instance", 1, "0" * 64)
        made = Ledger.create(file, MODEL, SHAPE)
        made.begin(epoch)
        file.close()
        found, entries = Ledger.recover(open_file(file.path), MODEL, epoch)
        assert (found.id, found.shape, entries) == (made.id, SHAPE, ())


class TestLinked:
    def test_removed(self, tmp_path: Path) -> None:
        file = create_file(tmp_path, "x", SIZE)
        file.path.unlink()
        assert not file.linked

    def test_replaced(self, tmp_path: Path) -> None:
        file = create_file(tmp_path, "x", SIZE)
        file.path.unlink()
        file.path.write_bytes(b"another")
        assert not file.linked

    def test_removing_leaves_the_bytes_to_those_who_look_at_them(self, tmp_path: Path) -> None:
        file = create_file(tmp_path, "x", SIZE)
        file.write(100, b"abc")
        view = file.buffer[100:103]
        file.remove()
        assert bytes(view) == b"abc"
        assert ledger_files(tmp_path) == []


class TestWrite:
    @pytest.mark.parametrize(
        ("at", "data"), [(0, b"12345678"), (3, b"12345678"), (8, b"123"), (1, b"123456789")]
    )
    def test_what_is_written_stands_there(self, tmp_path: Path, at: int, data: bytes) -> None:
        file = create_file(tmp_path, "x", SIZE)
        file.write(at, data)
        assert file.path.read_bytes() == (bytes(at) + data).ljust(SIZE, b"\0")

    @pytest.mark.parametrize("durable", [True, False])
    def test_only_a_durable_file_waits_for_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
    ) -> None:
        flushed: list[str] = []

        class Mapping:
            def flush(self) -> None:
                flushed.append("flushed")

        file = create_file(tmp_path, "x", SIZE, durable)
        assert file.durable is durable
        file.sync()  # really
        monkeypatch.setattr(file, "_map", Mapping())
        file.sync()
        assert flushed == ["flushed"] * durable


def test_only_ledgers_are_listed_in_order(tmp_path: Path) -> None:
    for name in ("b.ledger", "a.ledger", "a.ledger.damaged", "other"):
        (tmp_path / name).touch()
    assert [path.name for path in ledger_files(tmp_path)] == ["a.ledger", "b.ledger"]
    assert ledger_files(tmp_path / "not there") == []
    assert SUFFIX == ".ledger"
