"""fl-serverd: takes the devices' updates and makes the next model of them."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fedcore.config import (
    HTTP_ADDRESS_FAULT,
    Role,
    Settings,
    address_of_instance,
    parse_address,
    parse_host,
    port_of_instance,
)
from fedcore.net.proxy import behind_proxies
from fedcore.net.sd_notify import Notifier
from fedcore.observe.health import Readiness
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.admin import admin_site
from fedcore.services.callbacks import Callback
from fedcore.services.server import Server, ServerOptions, check_writable, size_of_models
from fedcore.services.supervision import longest_work
from fedcore.store.keys import changes
from fldaemons import launch
from fldaemons.configuration import Configuration

EXAMPLES = """
\b
Examples:
  fl-serverd --yaml-config /etc/fl/fl.yaml --model lenet.safetensors
  fl-serverd --yaml-config fl.yaml --http-server-address 10.0.0.7:6666 --checkpoint-dir /var/lib/fl
  fl-serverd --yaml-config fl.yaml --instance 3       ports 6669, 6769 and 6869
"""


@click.command(epilog=EXAMPLES + launch.COMMON_HELP + launch.EXIT_CODES_HELP)
@launch.common_options
@launch.both_spellings("--http-server-address", help="host:port for devices, taken as it is.")
@launch.both_spellings(
    "--tcp-server-ip", help="Address for other nodes; default: the one that reaches Redis."
)
@launch.both_spellings("--checkpoint-dir", type=launch.FILE, help="Folder of published models.")
@launch.both_spellings(
    "--model",
    type=launch.FILE,
    help="Initial weights: .safetensors, .ckpt, .npz, .pt or .pth.",
)
@launch.both_spellings(
    "--instance", type=click.IntRange(0, 99), default=0, help="Number N of this server: configured ports + N."
)
@launch.both_spellings(
    "--ledger-dir",
    type=launch.FILE,
    help="Folder of the update ledgers, shared by the servers of a host; default: ledgers/ among the checkpoints.",
)
def main(**options: Any) -> None:
    """Serve devices: give out the model, take updates, publish the next model, go on."""
    sys.exit(serve(options))


def serve(options: dict[str, Any], callback: Callback | None = None) -> int:
    """Run a server until it is told to stop; for the command line and for people who embed a server.

    Args:
        options: the command line's options, names with underscores; see ``main``.
        callback: follows the training.

    Returns:
        The exit code.
    """
    return launch.run(
        "fl-serverd", lambda reactor, notifier: build(options, callback or Callback(), reactor, notifier)
    )


def build(
    options: dict[str, Any], callback: Callback, reactor: Any, notifier: Notifier
) -> launch.Daemon | None:
    """Build the server from its command line.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    path: Path = options["yaml_config"]
    configuration = Configuration.read(path, Role.SERVER)
    settings = configuration.settings
    own, n = settings.fedcore.server, options["instance"]
    http = address_of_instance(own.http_address, n)
    admin = address_of_instance(own.admin_address, n)
    if options["http_server_address"]:
        http = parse_address(options["http_server_address"], HTTP_ADDRESS_FAULT)
    if options["admin_address"]:
        admin = parse_address(options["admin_address"])
    model = options["model"] or (Path(own.model) if own.model else None)
    checkpoints = options["checkpoint_dir"] or Path(own.checkpoint_dir)
    ledgers = options["ledger_dir"] or (Path(own.ledger_dir) if own.ledger_dir else checkpoints / "ledgers")
    tcp_ip = parse_host(options["tcp_server_ip"]) if options["tcp_server_ip"] else own.tcp_ip
    server_options = ServerOptions(
        checkpoint_dir=checkpoints,
        model=model,
        ledger_dir=ledgers,
        tcp_ip=tcp_ip,
        tcp_port=port_of_instance(own.tcp_port, n),
    )
    check_writable(checkpoints)
    links = launch.links_of(configuration, options, reactor)
    metrics = ServerMetrics()
    redis = launch.redis_of(settings, metrics.redis_errors.inc, reactor)
    notifier.extend(longest_work(size_of_models(settings.fl_name, server_options)))
    if options["check_config"]:
        settings = _without_journal(settings)
    node_links = links if links is not None and links.encrypts_nodes else None
    server = Server(settings, server_options, redis, metrics, callback, reactor, node_links)
    if options["check_config"]:
        click.echo(f"{path}: the configuration is good")
        return None
    if settings.enable_ssl and node_links is None:
        launch.log.warn("fedcore.node.tls is false: keep the port of the node channel inside the subnet")
    if links is not None:
        links.on_renewal.append(lambda: server.drop_nodes(links.is_revoked))
    context = None if links is None else links.http
    node_context = None if links is None else links.node_listening
    proxies = settings.fedcore.device.proxies, settings.fedcore.device.header_timeout
    devices = launch.Listener(
        "device API",
        http,
        *behind_proxies(server.site, context, *proxies, reactor),
        shut=server.has_no_room,
    )
    shut = "shut until there is room for updates"
    readiness = Readiness({**server.checks(), "device API": lambda: None if devices.is_open else shut})
    notices = launch.notices_of(settings, server.driver.heard, reactor)
    notices.follow(changes(settings.fl_name))
    daemon = launch.Daemon(
        configuration,
        [
            devices,
            launch.Listener(
                "node channel", server.node_address, server.node_listener, node_context, stays=True
            ),
            launch.Listener("admin", admin, admin_site(readiness, metrics)),
        ],
        [*server.services, notices, *launch.certificate_watch(configuration, links, metrics, reactor)],
        status=lambda: server.leaving or readiness.status(server.doing()),
        follow=server.follow,
        alive=server.threads.alive,
        started=server.started,
        drain=server.drain,
        last_work=lambda: server.threads.longest,
    )
    server.driver.on_fatal = daemon.give_up
    server.driver.on_leave = daemon.leave
    return daemon


def _without_journal(settings: Settings) -> Settings:
    """Return settings with which nothing is written: a check must leave no file that only its own user may use."""
    return replace(settings, summary=replace(settings.summary, failure_event_file=os.devnull))
