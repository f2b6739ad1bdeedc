"""``fl decode``: a message of the device protocol, made readable."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any, BinaryIO

import click
import numpy as np

from fedcore.errors import MalformedRequest
from fedcore.wire import codec, messages

SHOWN = 4  # values of a weight that are printed
TABLES = {
    name: table
    for name, table in vars(messages).items()
    if isinstance(table, type) and is_dataclass(table) and name.startswith(("Request", "Response"))
}
EXAMPLES = """
\b
Examples:
  curl -s --data-binary @examples/startFLJob.bin http://127.0.0.1:6666/startFLJob | fl decode ResponseFLJob
  fl decode RequestFLJob examples/startFLJob.bin
"""


@click.command(epilog=EXAMPLES)
@click.argument("table", type=click.Choice(sorted(TABLES)), metavar="TABLE")
@click.argument("file", type=click.File("rb"), default="-")
def decode(table: str, file: BinaryIO) -> None:
    """Print the message in FILE (or standard input) as JSON.

    TABLE is its name in the protocol: RequestFLJob, ResponseFLJob, RequestUpdateModel and so on. Parts that are
    absent are left out, long weights are cut.
    """
    body = file.read()
    try:
        message = codec.decode(TABLES[table], body)
    except MalformedRequest as error:
        text = body[:200].decode("utf-8", "replace")
        raise click.ClickException(f"this is no {table}: {error}; it begins with {text!r}") from error
    click.echo(json.dumps(readable(message), indent=2, ensure_ascii=False))


def readable(value: Any) -> Any:
    """Return a message as plain JSON values."""
    if is_dataclass(value):
        parts = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {name: readable(part) for name, part in parts if part is not None}
    if isinstance(value, tuple):
        return [readable(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, np.ndarray):
        shown = [float(item) if value.dtype.kind == "f" else int(item) for item in value[:SHOWN]]
        return shown if value.size <= SHOWN else [*shown, f"... {value.size} values"]
    return value
