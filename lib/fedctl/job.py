"""``fl job``: what an operator may do to a job, by a scheduler that asks who it is."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fedcore.config import Role, Settings
from fedctl import deployed
from fedctl.state import SCHEDULER, Operator, ask, scheduler_of

TOKEN = Path("/etc/fl/credentials/operator-token")
_FILE = click.Path(dir_okay=False, path_type=Path)
_DOINGS = {"disable": "/disableFLS", "enable": "/enableFLS", "new": "/newInstance"}
EXAMPLES = """
\b
Examples:
  sudo fl job disable                                     on a deployed host: its scheduler, its token
  fl job enable --scheduler http://10.0.0.5:11202 --token-file token
  fl job new '{"start_fl_job_threshold": 20}' --token-file token
"""


@click.command(epilog=EXAMPLES)
@click.argument("what", type=click.Choice(tuple(_DOINGS)))
@click.argument("values", required=False)
@click.option(
    "--scheduler",
    metavar="URL",
    help=f"Whom to ask; default: the one that the configuration names, without one {SCHEDULER}.",
)
@click.option("--ca-file", type=_FILE, help="Authorities of its certificate (PEM); default: as fl state.")
@click.option(
    "--token-file",
    type=_FILE,
    help="File whose first line is the scheduler's token; default: fedcore.scheduler.token_file of the configuration, "
    f"without one {TOKEN}, if this user can read it.",
)
@click.option(
    "--certificate", type=_FILE, help="Operator's certificate and its key (PEM), instead of a token."
)
@click.option(
    "--yaml-config",
    type=_FILE,
    help=f"Configuration of the job. Default: {deployed.CONFIGURATION}, if it is there and --scheduler is not given.",
)
def job(
    what: str,
    values: str | None,
    scheduler: str | None,
    ca_file: Path | None,
    token_file: Path | None,
    certificate: Path | None,
    yaml_config: Path | None,
) -> None:
    """Suspend a job (disable), let it go on (enable), or start it anew (new) with other hyper-parameters.

    VALUES, for new only, is a JSON object with the hyper-parameters that shall change.
    """
    if values is not None and what != "new":
        raise click.UsageError(f"{what} takes no values")
    if yaml_config is None and scheduler is None:
        yaml_config = deployed.find_configuration()
    settings = None if yaml_config is None else deployed.read_settings(yaml_config, Role.SCHEDULER)
    if scheduler is None:
        scheduler = SCHEDULER if settings is None else scheduler_of(settings)
    authorities = None if ca_file is None else str(ca_file)
    if authorities is None and settings is not None and settings.enable_ssl:
        authorities = settings.ssl.ca_cert_path
    operator = Operator(
        "" if certificate is not None else token_of(token_file, settings),
        None if certificate is None else str(certificate),
    )
    body = b"" if what != "new" else (values or json.dumps({})).encode()
    answer = ask(scheduler, _DOINGS[what], authorities, body=body, operator=operator)
    click.echo(answer.get("message", "done"))


def token_of(named: Path | None, settings: Settings | None) -> str:
    """Return the token to show, "" for none.

    Raises:
        ClickException: the file that is named cannot be read, or others can read it.
    """
    own = "" if settings is None else settings.fedcore.scheduler.token_file
    path = named or (Path(own) if own else TOKEN)
    try:
        if path.stat().st_mode & 0o077:
            raise click.ClickException(f"others can read the operator token in {path}: chmod 600 {path}")
        return path.read_text("ascii").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        if named is None:
            return ""  # perhaps none is needed; if one is, the scheduler says so
        reason = error.strerror if isinstance(error, OSError) else "it is no ASCII text"
        raise click.ClickException(f"the operator token in {path} cannot be read: {reason}") from error
