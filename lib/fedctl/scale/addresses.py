"""Where a server listens, and whether it is ready."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from fedcore.config import Address, Role, address_of_instance, port_of_instance
from fedcore.config.settings import ServerSettings
from fedcore.errors import ConfigError
from fedctl.deployed import read_settings
from fedctl.processes import fetch

NO_ANSWER = "no answer"
PROBE_S = 2.0  # patience with an admin listener, which answers at once or not at all


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a server listens."""

    devices: Address
    node_port: int
    admin: Address

    @classmethod
    def of(cls, settings: ServerSettings, instance: int) -> Addresses:
        """Return those of an instance: the configured ports + its number.

        Raises:
            ConfigError: a port is above 65535.
        """
        return cls(
            address_of_instance(settings.http_address, instance),
            port_of_instance(settings.tcp_port, instance),
            address_of_instance(settings.admin_address, instance),
        )


def addresses_of(yaml_config: Path, instances: Iterable[int]) -> dict[int, Addresses]:
    """Read where instances listen.

    Raises:
        ClickException: the configuration cannot be used.
    """
    settings = read_settings(yaml_config, Role.SERVER).fedcore.server
    try:
        return {instance: Addresses.of(settings, instance) for instance in instances}
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


def readiness(admin: Address) -> tuple[bool, str]:
    """Ask a server whether it is ready.

    Returns:
        Whether it is, and the same in words.
    """
    try:
        status, body = fetch(f"http://{admin}/readyz", PROBE_S)
        if status == 200:
            return True, "ready"
        return False, "not ready: " + "; ".join(json.loads(body)["reasons"].values())
    except (OSError, http.client.HTTPException):
        return False, NO_ANSWER
    except (ValueError, KeyError, TypeError, AttributeError):
        return False, f"what answers at {admin} is no server"
