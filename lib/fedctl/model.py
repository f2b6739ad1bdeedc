"""``fl model``: model files."""

from __future__ import annotations

from pathlib import Path

import click

from fedcore.errors import FedcoreError
from fedcore.models.formats import write_model
from fedexamples import lenet

EXAMPLES = {"lenet": lenet.initial_weights}


@click.group()
def model() -> None:
    """Make initial models."""


@model.command()
@click.option("--example", type=click.Choice(sorted(EXAMPLES)), default="lenet", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same weights.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("lenet.safetensors"),
    show_default=True,
    help="File to write; an existing one is replaced.",
)
def init(example: str, seed: int, output: Path) -> None:
    """Write an example's weights before any training, for ``fl-serverd --model``."""
    try:
        write_model(output, EXAMPLES[example](seed), (), {})
    except (FedcoreError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(output)
