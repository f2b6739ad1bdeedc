"""Files of keys, certificates and passwords: written whole or not at all, and never over others by accident."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

import click

from fedcore.errors import ConfigError

PUBLIC, PRIVATE = 0o644, 0o600
PRIVATE_FOLDER = 0o700


def make_folder(path: Path) -> None:
    """Make a folder that only its owner may look into, with its parents; one that is there stays as it is."""
    path.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)


def refuse_existing(*paths: Path) -> None:
    """Raise ConfigError if one of these files is there."""
    for path in paths:
        if os.path.lexists(path):
            raise ConfigError(f"{path} is there already", hint="it is not written over; choose another place")


def write(path: Path, content: bytes, mode: int, *, replace: bool = False) -> None:
    """Write a file so that its name stands for nothing, the old content or all of the new one.

    Args:
        path: in a folder that exists.
        content: all of it.
        mode: of the file, whatever the umask.
        replace: whether a file of that name may be there.

    Raises:
        ConfigError: it is there, and may not be.
        OSError: it cannot be written.
    """
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", dir=path.parent
    )  # 0600 from the beginning
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(descriptor, mode)
            file.flush()
            os.fsync(descriptor)
        if replace:
            os.replace(temporary, path)
            return
        try:
            os.link(temporary, path)  # unlike a rename, this fails if somebody was quicker
        except FileExistsError:
            refuse_existing(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def read(path: Path) -> bytes:
    """Return a file's content.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror}") from problem


def password_in(path: Path) -> bytes:
    """Return the first line of a password file.

    Raises:
        ConfigError: it cannot be read, or the line is empty.
    """
    lines = read(path).splitlines()
    if not lines or not lines[0]:
        raise ConfigError(f"the first line of {path} is empty", hint="the password belongs there")
    return lines[0]


def asked_password(prompt: str, *, twice: bool) -> bytes:
    """Ask for a password at the terminal."""
    answer: str = click.prompt(prompt, hide_input=True, confirmation_prompt=twice, err=True)
    return answer.encode()


def generated_password(path: Path) -> bytes:
    """Write a password of 192 random bits into a new file of mode 0600, and return it."""
    password = secrets.token_urlsafe(24).encode()
    write(path, password + b"\n", PRIVATE)
    return password
