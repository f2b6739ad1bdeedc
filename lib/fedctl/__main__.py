"""The ``fl`` command: one group, a module per subcommand; what a subcommand needs is imported when it runs."""

from __future__ import annotations

import importlib
import io
import sys

import click

from fedcore import __version__

COMMANDS = {
    "bench": ("fedctl.bench.command:bench", "Measure what a feature costs on this machine."),
    "certs": ("fedctl.certs.command:certs", "Make, check and revoke certificates."),
    "decode": ("fedctl.decode:decode", "Print a message of the device protocol."),
    "demo": ("fedctl.demo.command:demo", "Watch a federation learn to read handwriting."),
    "doctor": ("fedctl.doctor.command:doctor", "Look for what stands against daemons on this host."),
    "job": ("fedctl.job:job", "Suspend a job, let it go on, start it anew."),
    "model": ("fedctl.model:model", "Make initial models."),
    "scale": ("fedctl.scale.command:scale", "Start and stop servers on this host."),
    "state": ("fedctl.state:state", "Show the state of a cluster and its nodes."),
}

EXAMPLES = """
Examples:

\b
  fl demo                                        a whole federation on this machine
  fl demo --silo                                 silos instead of devices
  fl demo --hybrid                               devices with few labels, and a worker with some
  fl state --scheduler http://10.0.0.5:11202     who is there, and is it running
  sudo fl job disable                            suspend the job of a deployed host
  fl scale 3 --yaml-config fl.yaml               three servers on this host
  sudo fl scale 3                                the same on a deployed host, with systemd
  sudo fl doctor                                 is all well on a deployed host
  fl bench secagg                                what masked updates cost on this machine
  fl certs ca pki                                a certificate authority, for HTTPS and TLS between nodes
  fl model init --output lenet.safetensors       a model for fl-serverd to begin with
"""


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is called, so that ``fl --help`` is quick."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of all subcommands."""
        return sorted(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import a subcommand."""
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(context)])


@click.group(cls=LazyGroup, epilog=EXAMPLES, context_settings={"max_content_width": 110})
@click.version_option(__version__, prog_name="fl", message="%(prog)s %(version)s")
def main() -> None:
    """Operate a federated-learning cluster."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shall not end a training


if __name__ == "__main__":
    main(prog_name="fl")
