"""fl-schedulerd: the operator's window on a job, and the switches behind it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from fedcore.config import SCHEDULER_ADDRESS_FAULT, Role, parse_address
from fedcore.observe.health import Readiness
from fedcore.observe.metrics import CommonMetrics
from fedcore.services.admin import admin_site
from fedcore.services.job_watch import JobWatch
from fedcore.services.operator_api import OperatorApi
from fedcore.services.operator_http import operator_site
from fldaemons import launch
from fldaemons.configuration import Configuration

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
    context = configuration.listening_context(options["server_password_file"])
    metrics = CommonMetrics("schedulerd")
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
    watch = JobWatch(api, settings.fl_name, reactor)
    daemon = launch.Daemon(
        configuration,
        [
            launch.Listener(
                "operator API", manage, operator_site(api, integer_code=own.integer_code), context
            ),
            launch.Listener("admin", admin, admin_site(readiness, metrics)),
        ],
        [redis, watch],
        status=lambda: readiness.status(watch.state),
    )

    def follow(changed: Callable[[], None]) -> None:
        watch.changed = changed
        redis.on_change.append(lambda available: watch.look())

    daemon.follow = follow
    return daemon
