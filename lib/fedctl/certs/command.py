"""The commands ``fl certs …``."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from cryptography import x509

from fedcore.errors import FedcoreError
from fedcore.pki.authority import (
    CA_DAYS,
    CRL_DAYS,
    LEAF_DAYS,
    Issued,
    KeyKind,
    Role,
    issue,
    issue_device,
    lasting,
    make_authority,
    make_device_authority,
)
from fedcore.pki.chain import signed_by
from fedctl.certs import checks, display, files
from fedctl.certs.folder import AuthorityFolder

EXAMPLES = """
\b
Examples, a cluster of two servers and a scheduler:
  fl certs ca pki                                                 an authority in the folder pki
  fl certs issue server node1 --ca pki --host 10.0.0.5 --host fl.example.org
  fl certs issue client node1 --ca pki --host 10.0.0.5            what node1 shows to other nodes
  fl certs issue scheduler node3 --ca pki --host 10.0.0.7
  fl certs issue operator alice --ca pki --pem                    for curl --cert alice.crt --key alice.key
  fl certs list --ca pki
  fl certs show pki/hosts/node1/server.crt
  fl certs verify pki/hosts/node1/server.crt --ca pki --host 10.0.0.5
  fl certs issue server node1 --ca pki --host 10.0.0.5 --replace  renewed; the password stays
  fl certs revoke pki/hosts/node2/client.crt --ca pki             then give pki/ca.crl to every node

\b
Examples, devices with pki_verify:
  fl certs ca maker --devices --name "Example Ltd"                a root and the maker's equipment CA
  fl certs device phone-1 --ca maker                              a device's chain and its key

Files of keys and passwords can be read by their owner only, and no file is written over unless --replace says so. The
folder of an authority holds the key that everything hangs on: keep it off the nodes, and keep a copy.
"""

_F = TypeVar("_F", bound=Callable[..., None])
EQUIPMENT = 1  # place of the equipment certificate in a device's chain
FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


def _now() -> datetime:
    return datetime.now(UTC)


def _explained(command: _F) -> _F:
    """Print what goes wrong as one line, and exit with 1."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (FedcoreError, OSError) as error:
            raise click.ClickException(str(error)) from error

    return run  # type: ignore[return-value]


def _authority_option(command: _F) -> _F:
    return click.option(
        "--ca", "folder", type=FOLDER, default="pki", show_default=True, help="Folder of the authority."
    )(command)


def _key_option(command: _F) -> _F:
    return click.option(
        "--key",
        "kind",
        type=click.Choice([KeyKind.EC_P256.value, KeyKind.RSA_3072.value]),
        default=KeyKind.EC_P256.value,
        show_default=True,
        help="Kind of its key.",
    )(command)


@click.group(epilog=EXAMPLES)
def certs() -> None:
    """Make, look at, check and revoke certificates."""


@certs.command("ca")
@click.argument("directory", type=FOLDER)
@click.option("--name", default="fl CA", show_default=True, help="Common name; for devices the maker's name.")
@click.option(
    "--days", type=click.FloatRange(1), default=CA_DAYS, show_default=True, help="How long it lasts."
)
@click.option(
    "--devices", is_flag=True, help="For devices: a root, and the equipment CA of their maker. RSA only."
)
@_key_option
@_explained
def make_ca(directory: Path, name: str, days: float, devices: bool, kind: str) -> None:
    """Make an authority in DIRECTORY.

    With it comes a list of revoked certificates, which is empty. ca.crt and ca.crl are for every node
    (ssl.ca_cert_path, ssl.crl_path), ca.crt for devices as well. Of an authority for devices, root.crt is what
    servers trust (client_verify.root_first_ca_path), ca.crl is their client_verify.equip_crl_path.
    """
    now, folder = _now(), AuthorityFolder(directory)
    validity = lasting(now, days)
    root: Issued | None = None
    if devices:
        root, made = make_device_authority(name, now, validity=validity)
    else:
        made = make_authority(name, now, kind=KeyKind(kind), validity=validity)
    folder.create(made, now, root)
    click.echo(f"{folder.certificate}, until {validity.end:%Y-%m-%d}")
    click.echo(f"{directory / 'ca.key'} signs everything: keep it off the nodes, and keep a copy", err=True)
    if root is not None:
        click.echo(f"{directory / 'root.key'} is needed no more: move it to a safe place", err=True)


@certs.command("issue")
@click.argument("role", type=click.Choice([role.value for role in Role]))
@click.argument("name")
@_authority_option
@click.option(
    "--host", "hosts", multiple=True, help="Name or address under which it is reached; may be repeated."
)
@click.option(
    "--out", type=FOLDER, help="Folder for the files; default: hosts/NAME in that of the authority."
)
@click.option(
    "--days", type=click.FloatRange(1), help=f"How long it lasts; default: {LEAF_DAYS}, at most its CA."
)
@_key_option
@click.option(
    "--password-file", type=FILE, help="The first line of FILE is the password of the PKCS#12 file."
)
@click.option("--ask-password", is_flag=True, help="Ask for the password.")
@click.option("--pem", "with_pem", is_flag=True, help="Write the key as ROLE.key, too; it has no password.")
@click.option("--replace", is_flag=True, help="Replace the files that are there, but keep the password.")
@_explained
def issue_one(
    role: str,
    name: str,
    folder: Path,
    hosts: tuple[str, ...],
    out: Path | None,
    days: float | None,
    kind: str,
    password_file: Path | None,
    ask_password: bool,
    with_pem: bool,
    replace: bool,
) -> None:
    """Make the certificate of a node or operator.

    ROLE says what for: server is what fl-serverd shows to devices and to nodes that connect to it
    (ssl.server_cert_path), client what any node shows to those that it connects to (ssl.client_cert_path),
    scheduler the former of fl-schedulerd, operator a person or script at the operator API.

    Writes ROLE.p12 and ROLE.crt. Without another word about the password it is that of ROLE-password beside them,
    which is made if it is not there.
    """
    if role != Role.OPERATOR and not hosts:
        raise click.UsageError(
            f"a {role} needs --host: others compare it with the address that they connect to"
        )
    authority, now = AuthorityFolder(folder), _now()
    into = out or folder / "hosts" / name
    if not replace:
        files.refuse_existing(*(into / f"{role}.{suffix}" for suffix in ("p12", "crt")))
    issuer = authority.authority()
    made = issue(
        issuer,
        Role(role),
        name,
        now,
        hosts=hosts,
        kind=KeyKind(kind),
        days=days,
    )
    files.make_folder(into)
    password = _password(into / f"{role}-password", password_file, ask_password)
    authority.write_node(made, into, role, password, with_key=with_pem, replace=replace)
    click.echo(f"{into / role}.p12, until {made.certificate.not_valid_after_utc:%Y-%m-%d}")


def _password(beside: Path, given: Path | None, ask: bool) -> bytes:
    if given is not None and ask:
        raise click.UsageError("--password-file and --ask-password exclude each other")
    if ask:
        return files.asked_password("Password of the PKCS#12 file", twice=True)
    if given is not None:
        return files.password_in(given)
    if beside.exists():
        return files.password_in(beside)
    click.echo(f"a password is generated into {beside}", err=True)
    return files.generated_password(beside)


@certs.command("device")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@_authority_option
@click.option(
    "--out", type=FOLDER, help="Folder for folders NAME; default: devices in that of the authority."
)
@_explained
def issue_devices(names: tuple[str, ...], folder: Path, out: Path | None) -> None:
    """Make the certificates of devices.

    The authority is one made with --devices. Writes NAME/chain.pem: key attestation, equipment, equipment CA and
    root certificate; and NAME/key.pem, the RSA-2048 key that signs requests. Prints each device's fl_id, which
    follows from its equipment certificate.
    """
    authority, now = AuthorityFolder(folder), _now()
    root, maker = authority.device_root(), authority.authority()
    for name in names:
        into = (out or folder / "devices") / name
        files.refuse_existing(into / "chain.pem", into / "key.pem")
        device = issue_device(root, maker, name, now)
        authority.write_device(device, into)
        click.echo(f"{into}  fl_id {device.fl_id}")


def _found(file: Path, password_file: Path | None) -> display.Found:
    def password() -> bytes:
        if password_file is not None:
            return files.password_in(password_file)
        beside = file.with_name(f"{file.stem}-password")
        if beside.exists():
            return files.password_in(beside)
        return files.asked_password(f"Password of {file}", twice=False)

    try:
        return display.parse(files.read(file), password)
    except FedcoreError as fault:
        raise click.ClickException(f"{file}: {fault}") from fault


_password_file = click.option(
    "--password-file",
    type=FILE,
    help="File with the password of a PKCS#12 file; default: ROLE-password beside it, else it is asked for.",
)


@certs.command()
@click.argument("paths", metavar="FILE...", nargs=-1, required=True, type=FILE)
@_password_file
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of objects.")
@_explained
def show(paths: tuple[Path, ...], password_file: Path | None, as_json: bool) -> None:
    """Show what is in files.

    Certificates as PEM, DER or PKCS#12, and revocation lists; of a device's chain also its fl_id.
    """
    now, shown = _now(), []
    for path in paths:
        found = _found(path, password_file)
        for position, certificate in enumerate(found.certificates):
            facts = display.certificate_facts(certificate, found.is_device_chain and position == EQUIPMENT)
            shown.append({"file": str(path), **facts, "remark": display.remark(certificate, now)})
        shown += [{"file": str(path), **display.list_facts(each)} for each in found.lists]
    if as_json:
        click.echo(json.dumps(shown, indent=2))
        return
    click.echo("\n\n".join("\n".join(display.lines(facts)) for facts in shown))


@certs.command()
@click.argument("path", metavar="FILE", type=FILE)
@click.option(
    "--ca",
    "trusted",
    type=click.Path(path_type=Path),
    required=True,
    help="File of the authority's certificate, or its folder.",
)
@click.option(
    "--crl", type=FILE, help="Revocation list; default: ca.crl in the folder of the authority, if there."
)
@click.option("--host", default="", help="Name or address that the certificate has to be for.")
@click.option(
    "--for",
    "purpose",
    type=click.Choice([purpose.value for purpose in checks.Purpose]),
    help="What it is to be used for; default: what it looks like.",
)
@_password_file
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of objects.")
@_explained
def verify(
    path: Path,
    trusted: Path,
    crl: Path | None,
    host: str,
    purpose: str | None,
    password_file: Path | None,
    as_json: bool,
) -> None:
    """Check a certificate as daemons do.

    Says of each check whether it fails, and what helps: dates, chain to the authority, length of the key, usage,
    with --host its names, and revocation. Certificates between FILE's first one and the authority stand in FILE, in
    order. The exit code is 1 if a check fails.
    """
    found = _found(path, password_file)
    if not found.certificates:
        raise click.ClickException(f"{path} holds no certificate")
    anchor, revoked = _trust(trusted, crl)
    meant = checks.Purpose(purpose) if purpose else checks.purpose_of(found.certificates)
    content = files.read(revoked) if revoked else None
    answers = list(checks.check(found.certificates, anchor, meant, _now(), crl=content, host=host))
    if as_json:
        facts = [
            {"check": each.name, "ok": each.good, "text": each.text, "remedy": each.remedy}
            for each in answers
        ]
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(answers)
    sys.exit(0 if all(answer.good for answer in answers) else 1)


def _trust(trusted: Path, crl: Path | None) -> tuple[list[x509.Certificate], Path | None]:
    """Return the certificates that are trusted, and the file of the revocation list."""
    file = trusted
    if trusted.is_dir():
        root = trusted / "root.crt"
        file = root if root.exists() else trusted / "ca.crt"
        if crl is None and (trusted / "ca.crl").exists():
            crl = trusted / "ca.crl"
    found = _found(file, None).certificates
    if not found:
        raise click.ClickException(f"{file} holds no certificate")
    return found, crl


def _print(answers: list[checks.Check]) -> None:
    for answer in answers:
        word = "ok" if answer.good else "failed"
        click.echo(
            f"{click.style(f'{word:8}', fg='green' if answer.good else 'red')}{answer.name}: {answer.text}"
        )
        if answer.remedy:
            click.echo(f"        -> {answer.remedy}")


@certs.command("list")
@_authority_option
@click.option("--json", "as_json", is_flag=True, help="Print the index as it is.")
@_explained
def list_issued(folder: Path, as_json: bool) -> None:
    """List what an authority has issued and revoked."""
    entries = AuthorityFolder(folder).index().certificates
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        state = f"REVOKED {entry.revoked}" if entry.revoked else f"until {entry.until[:10]}"
        click.echo(
            f"{entry.serial}  {entry.role or '-':10} {entry.name:24} {state}  {' '.join(entry.hosts)}".rstrip()
        )


@certs.command()
@click.argument("what", metavar="SERIAL|FILE")
@_authority_option
@click.option("--unknown", is_flag=True, help="Also a serial number that the index does not have.")
@_explained
def revoke(what: str, folder: Path, unknown: bool) -> None:
    """Revoke a certificate.

    Its number gets into the folder's ca.crl. SERIAL is hexadecimal, as show and list print it, with or without
    colons. Nodes refuse the certificate once they have the new ca.crl; they read it again by themselves when it
    changes.
    """
    authority, now = AuthorityFolder(folder), _now()
    entry = authority.revoke(_meant(what, authority), now, unknown=unknown)
    click.echo(f"{entry.serial} {entry.role} {entry.name} is revoked since {entry.revoked}")
    click.echo(f"give {authority.crl} to every node", err=True)


def _meant(what: str, authority: AuthorityFolder) -> x509.Certificate | int:
    """Return a certificate's number, or from a file the first certificate that is one of the authority."""
    if not Path(what).exists():
        try:
            return int(what.replace(":", ""), 16)
        except ValueError:
            raise click.UsageError(f"{what} is neither a file nor a serial number") from None
    found = _found(Path(what), None).certificates
    if not found:
        raise click.ClickException(f"{what} holds no certificate")
    issuer = authority.authority().certificate
    return next((each for each in found if signed_by(each, issuer)), found[0])


@certs.command()
@_authority_option
@click.option(
    "--days", type=click.FloatRange(1), default=CRL_DAYS, show_default=True, help="Until the next one."
)
@_explained
def crl(folder: Path, days: float) -> None:
    """Renew the list of what is revoked.

    ca.crl gets later dates and keeps its content; it is made where there is none. Nodes go on using a list whose
    time is over, and warn.
    """
    authority = AuthorityFolder(folder)
    end = authority.renew_list(_now(), days)
    click.echo(f"{authority.crl}, until {end:%Y-%m-%d}")
