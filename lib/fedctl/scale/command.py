"""The command ``fl scale``."""

from __future__ import annotations

from pathlib import Path

import click

from fedctl.processes import READY_S
from fedctl.scale import local, systemd
from fedctl.scale.local import MOST
from fedctl.scale.units import TEMPLATE

OURS = {"--instance", "--yaml-config", "--http-server-address", "--admin-address", "--check-config"}
EXAMPLES = """
\b
Examples, on a deployed host (units of systemd, configured by /etc/fl/fl.yaml):
  fl scale                                      what is enabled and runs here
  sudo fl scale 3                               fl-serverd@0, @1 and @2 are enabled and run; those above are
                                                disabled and stopped

\b
Examples, anywhere (processes of this command):
  fl scale 3 --yaml-config fl.yaml              instances 0, 1 and 2 run; those above are stopped
  fl scale --yaml-config fl.yaml                what runs here
  fl scale 0 --yaml-config fl.yaml              stop all
  fl scale 2 --yaml-config fl.yaml -- --model lenet.safetensors

Instance I listens on the configured ports + I.

With --yaml-config: what stands after -- is given to each fl-serverd that this command starts. Servers run in the
working directory of the command that starts them, where relative paths of the configuration begin. They write to
serverd-I.log in the run directory, and go on when the command ends, also if it is interrupted.
"""


def _options_for_servers(
    context: click.Context, parameter: click.Parameter, words: tuple[str, ...]
) -> tuple[str, ...]:
    """Refuse options that would be the same for all servers, but must not be."""
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name in OURS:
            raise click.UsageError(
                f"{name} is not for all servers alike; fl scale takes it from the configuration"
            )
    return words


@click.command(epilog=EXAMPLES)
@click.argument("n", metavar="[N]", type=click.IntRange(0, MOST), required=False)
@click.argument(
    "options", metavar="[-- OPTIONS]", nargs=-1, type=click.UNPROCESSED, callback=_options_for_servers
)
@click.option(
    "--yaml-config",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Configuration file of the job, for processes; without it the units {TEMPLATE} are meant.",
)
@click.option(
    "--run-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of locks and logs; default: NAME-run in the working directory for a configuration NAME.yaml.",
)
@click.option(
    "--ready-timeout",
    type=click.FloatRange(0),
    default=READY_S,
    show_default=True,
    help="Seconds until new servers shall be ready.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0),
    show_default=f"{local.DRAIN_S:g}, for units {systemd.DRAIN_S:g}",
    help="Seconds until servers that are stopped shall have ended.",
)
@click.option("--kill", is_flag=True, help="Kill servers that have not ended by then.")
def scale(
    n: int | None,
    options: tuple[str, ...],
    yaml_config: Path | None,
    run_dir: Path | None,
    ready_timeout: float,
    drain_timeout: float | None,
    kill: bool,
) -> None:
    """Make N servers run on this host, or show those that do.

    Instances 0 to N-1 of fl-serverd are started where they do not run, those from N on are asked to end. Devices,
    the scheduler and the other servers need no word of it. On a host with the systemd units the instances are
    enabled and disabled, too. With --yaml-config only servers that fl scale has started are touched.
    """
    if yaml_config is not None:
        patience = local.DRAIN_S if drain_timeout is None else drain_timeout
        local.scale_here(
            n,
            options,
            yaml_config,
            run_dir,
            ready_timeout=ready_timeout,
            drain_timeout=patience,
            kill=kill,
        )
        return
    if options or run_dir is not None:
        raise click.UsageError(
            "--run-dir and what stands after -- are for processes: give --yaml-config as well. Units read "
            "/etc/fl/fl.yaml; more options for them belong in a drop-in: systemctl edit fl-serverd@.service"
        )
    reason = systemd.why_no_units()
    if reason:
        raise click.ClickException(
            f"servers are no units of systemd on this host ({reason}): deploy it (ansible/site.yml), or give "
            "--yaml-config FILE for servers as processes"
        )
    patience = systemd.DRAIN_S if drain_timeout is None else drain_timeout
    systemd.scale_units(n, ready_timeout=ready_timeout, drain_timeout=patience, kill=kill)
