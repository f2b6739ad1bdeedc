"""Where a deployed host has what commands need: the one configuration of all its daemons."""

from __future__ import annotations

from pathlib import Path

import click

from fedcore.config import Role, Settings, load_settings
from fedcore.errors import ConfigError

CONFIGURATION = Path("/etc/fl/fl.yaml")


def find_configuration() -> Path | None:
    """Return the host's configuration, None if it has none.

    Raises:
        ClickException: this user may not look.
    """
    try:
        CONFIGURATION.open("rb").close()
    except PermissionError:
        raise click.ClickException(
            f"{CONFIGURATION} cannot be read by this user: repeat the command with sudo, or join the group fl"
        ) from None
    except OSError:
        return None
    return CONFIGURATION


def read_settings(path: Path, role: Role) -> Settings:
    """Read a configuration.

    Raises:
        ClickException: it cannot be used.
    """
    try:
        return load_settings(path, role).settings
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
