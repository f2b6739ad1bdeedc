"""The command ``fl doctor``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from fedcore.config import Role, Settings
from fedcore.errors import ConfigError
from fedctl import deployed
from fedctl.doctor import cluster, host
from fedctl.doctor.findings import (
    Finding,
    Level,
    failed,
    of_checkpoints,
    of_daemon,
    of_ledgers,
    of_mount,
    warning,
)
from fedctl.scale.systemd import LINKS

CREDENTIALS = Path("/etc/fl/credentials")
ROLES = {role.value: role for role in Role}
EXAMPLES = """
\b
Examples:
  sudo fl doctor                                 the daemons that are enabled on this host, /etc/fl/fl.yaml
  sudo fl doctor --json | jq '.findings[] | select(.level != "ok")'
  fl doctor --yaml-config fl.yaml --role server --servers 2      before two servers are started here
  fl-serverd --yaml-config fl.yaml --check-config                one file for one daemon, and nothing else

Each line is ok, a warning or a failure with its remedy. The exit code is 1 if anything failed. Nothing is changed.
As root it looks with the eyes of user fl, and reads the credentials of the daemons.
"""
_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.FAILED: "bold red"}


@click.command(epilog=EXAMPLES)
@click.option(
    "--yaml-config",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Configuration; default: {deployed.CONFIGURATION}.",
)
@click.option(
    "--role",
    "names",
    multiple=True,
    type=click.Choice(sorted(ROLES)),
    help="Daemons to look at; default: those that are enabled on this host, with --yaml-config scheduler and server.",
)
@click.option(
    "--servers",
    type=click.IntRange(0, 100),
    help="Look at so many servers; default: those that are enabled, with --yaml-config one.",
)
@click.option(
    "--credentials",
    type=click.Path(file_okay=False, path_type=Path),
    default=CREDENTIALS,
    show_default=True,
    help="Folder of the passwords that systemd gives to the daemons.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(
    yaml_config: Path | None, names: tuple[str, ...], servers: int | None, credentials: Path, as_json: bool
) -> None:
    """Look for what stands against daemons on this host."""
    found = list(_examine(yaml_config, names, servers, credentials))
    bad = any(finding.level is Level.FAILED for finding in found)
    if as_json:
        click.echo(json.dumps({"ok": not bad, "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        _print(found)
    sys.exit(1 if bad else 0)


def _examine(
    yaml_config: Path | None, names: tuple[str, ...], servers: int | None, credentials: Path
) -> Iterator[Finding]:
    """Look at everything, one check after the other."""
    file = yaml_config or deployed.find_configuration()
    if file is None:
        text = f"there is no {deployed.CONFIGURATION}"
        yield failed("configuration", text, "deploy this host (ansible/site.yml), or give --yaml-config FILE")
        return
    file = file.absolute()
    base = Path.cwd() if yaml_config is not None else host.STATE
    roles, instances = _expected(yaml_config is None, names, servers)
    if not roles:
        yield warning(
            "daemons", "no daemon is enabled on this host", "fl scale 2, or systemctl enable fl-schedulerd"
        )
        roles = {Role.SERVER}
    if os.geteuid() != 0 and yaml_config is None:
        yield warning("user", "not all can be looked at without root", "sudo fl doctor")
    findings, settings = host.configuration(file, [role for role in Role if role in roles])
    yield from findings
    if not settings:
        return
    yield from host.files(host.needs_of(file, settings, base), host.daemon_user())
    any_role = settings.get(Role.SERVER) or next(iter(settings.values()))
    findings, secrets = host.secrets(any_role, credentials, base)
    yield from findings
    yield from host.certificates(any_role, secrets.server, base, datetime.now(UTC))
    if Role.SERVER in settings:
        yield from _room(settings[Role.SERVER], instances, base, optional=yaml_config is not None)
    try:
        for daemon in host.daemons_of(settings, instances):
            yield from of_daemon(daemon, host.see(daemon), awaited=yaml_config is None)
    except ConfigError as error:
        yield failed("ports", str(error), "configure lower ports, or have fewer servers")
    yield from cluster.run(lambda reactor: cluster.examine(any_role, secrets, reactor))


def _expected(on_host: bool, names: tuple[str, ...], servers: int | None) -> tuple[set[Role], list[int]]:
    """Return which daemons are meant."""
    roles, instances = {Role.SCHEDULER, Role.SERVER}, [0]
    if on_host:
        try:
            roles, instances = host.roles_of(os.listdir(LINKS))
        except OSError:
            roles, instances = set(), []
    if names:
        roles = {ROLES[name] for name in names}
    if servers is not None:
        instances = list(range(servers))
    return roles, instances


def _room(settings: Settings, instances: list[int], base: Path, *, optional: bool) -> Iterator[Finding]:
    findings, layout = host.model_of(settings, base, optional)
    yield from findings
    if layout is None:
        return
    folder = base / host.ledger_folder(settings)
    volume = host.volume_of(folder)
    if folder == host.STATE / "ledgers" and instances:
        yield from of_mount(str(folder), volume)
    yield from of_ledgers(
        str(folder),
        volume,
        host.ledger_size(settings, layout),
        max(1, len(instances)),
        host.host_memory(),
    )
    folder = base / settings.fedcore.server.checkpoint_dir
    yield of_checkpoints(str(folder), host.volume_of(folder), 4 * layout.total_floats)


def _print(found: list[Finding]) -> None:
    console = Console(highlight=False)
    for finding, after in zip(found, [*found[1:], None], strict=True):
        line = Text.assemble(
            (f"{finding.level:<8}", _STYLES[finding.level]), f"{finding.check}: {finding.text}"
        )
        console.print(line, soft_wrap=True)
        if finding.remedy and (after is None or after.remedy != finding.remedy):  # once for all that share it
            console.print(Text(f"        -> {finding.remedy}", style="dim"), soft_wrap=True)
