"""fl-schedulerd: the operator's window on a job, and the switches behind it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from fedcore.config import SCHEDULER_ADDRESS_FAULT, Role, Settings, parse_address
from fedcore.errors import ConfigError
from fedcore.observe.health import Readiness
from fedcore.observe.metrics import SchedulerMetrics
from fedcore.pki.clients import ClientCertificates
from fedcore.services.admin import admin_site
from fedcore.services.job_watch import JobWatch
from fedcore.services.operator_access import Access, check_token, is_loopback
from fedcore.services.operator_api import OperatorApi
from fedcore.services.operator_http import operator_site
from fldaemons import launch
from fldaemons.configuration import OPERATOR_TOKEN, Configuration, credential, password_of

EXAMPLES = """
\b
Examples:
  fl-schedulerd --yaml-config /etc/fl/fl.yaml
  fl-schedulerd --yaml-config fl.yaml --scheduler-manage-address 10.0.0.5:11202
  curl http://127.0.0.1:11202/state
  curl -d '{"start_fl_job_threshold": 20}' http://127.0.0.1:11202/newInstance
"""


@click.command(epilog=EXAMPLES + launch.COMMON_HELP + launch.EXIT_CODES_HELP)
@launch.common_options
@launch.both_spellings("--scheduler-manage-address", help="host:port of the operator API.")
def main(**options: Any) -> None:
    """Serve the operator API of one job: a stateless window on Redis.

    It may be restarted, or run twice, at any time; training does not notice.
    """
    sys.exit(launch.run("fl-schedulerd", lambda reactor, notifier: build(options, reactor)))


def build(options: dict[str, Any], reactor: Any) -> launch.Daemon | None:
    """Build the scheduler from its command line.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    path: Path = options["yaml_config"]
    configuration = Configuration.read(path, Role.SCHEDULER)
    settings = configuration.settings
    own = settings.fedcore.scheduler
    manage, admin = own.manage_address, own.admin_address
    if options["scheduler_manage_address"]:
        manage = parse_address(options["scheduler_manage_address"], SCHEDULER_ADDRESS_FAULT)
    if options["admin_address"]:
        admin = parse_address(options["admin_address"])
    links = launch.links_of(configuration, options, reactor)
    context = None if links is None else links.http
    token = operator_token(own.token_file)
    metrics = SchedulerMetrics()
    redis = launch.redis_of(settings, metrics.redis_errors.inc, reactor)
    if options["check_config"]:
        click.echo(f"{path}: the configuration is good")
        return None
    metrics.redis_up.set_function(lambda: redis.available)
    readiness = Readiness({"redis": lambda: redis.problem or None})
    api = OperatorApi(
        redis,
        settings.fl_name,
        settings.round.global_iteration_time_window,
        clock=reactor,
        now=datetime.now,
    )
    site = operator_site(
        api,
        integer_code=own.integer_code,
        access=_access(settings, manage.host, token),
        denied=metrics.deny_operator,
    )
    watch = JobWatch(api, settings.fl_name, reactor)
    daemon = launch.Daemon(
        configuration,
        [
            launch.Listener("operator API", manage, site, context),
            launch.Listener("admin", admin, admin_site(readiness, metrics)),
        ],
        [redis, watch, *launch.certificate_watch(configuration, links, metrics, reactor)],
        status=lambda: readiness.status(watch.state),
    )

    def follow(changed: Callable[[], None]) -> None:
        watch.changed = changed
        redis.on_change.append(lambda available: watch.look())

    daemon.follow = follow
    return daemon


def operator_token(named: str) -> Callable[[], bytes] | None:
    """Return what reads the token that changes of the job need, None if there is none.

    Args:
        named: its file, "" for systemd's credential.

    Raises:
        ConfigError: it cannot be used, or others can read it.
    """
    path = Path(named) if named else None
    if path is None and not credential(OPERATOR_TOKEN):
        return None

    def read() -> bytes:
        if path is not None:
            _refuse_if_others_can_read(path)
        return check_token(password_of(path, OPERATOR_TOKEN), named or f"the credential {OPERATOR_TOKEN}")

    read()
    return read


def _refuse_if_others_can_read(path: Path) -> None:
    # systemd's LoadCredential gives access by an ACL, whose mask looks like a right of the group
    if path.absolute().is_relative_to("/run/credentials"):
        return
    try:
        open_to_others = path.stat().st_mode & 0o077
    except OSError:
        return  # whoever reads it says so
    if open_to_others:
        raise ConfigError(f"others can read the operator token in {path}", hint=f"chmod 600 {path}")


def _access(settings: Settings, host: str, token: Callable[[], bytes] | None) -> Access:
    own = settings.fedcore.scheduler
    certificates = settings.enable_ssl and own.client_certificates is not ClientCertificates.NONE
    if own.unauthenticated:
        launch.log.warn(
            "fedcore.scheduler.unauthenticated: whoever reaches {host} can change the job", host=host
        )
    elif token is None and not certificates and not is_loopback(host):
        launch.log.warn(
            "no operator can change the job: give fedcore.scheduler.token_file or the credential {name}",
            name=OPERATOR_TOKEN,
        )
    return Access(
        loopback=is_loopback(host),
        token=token,
        certificates=certificates,
        own_authority=bool(own.client_ca_path),
        unauthenticated=own.unauthenticated,
    )
