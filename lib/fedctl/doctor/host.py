"""Looks at this host for ``fl doctor``: roles, files, certificates, disks, ports."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import pwd
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from cryptography import x509
from cryptography.hazmat.primitives.serialization import pkcs12

from fedcore.aggregation.rules import rule_named
from fedcore.config import (
    Address,
    Role,
    Settings,
    address_of_instance,
    load_settings,
    port_of_instance,
    unsupported,
)
from fedcore.config.crosscheck import redis_has_tls
from fedcore.errors import ConfigError, FedcoreError
from fedcore.models import checkpoints
from fedcore.models.formats import read_model
from fedcore.models.kept import with_kept
from fedcore.services.terms import ledger_shape
from fedcore.wire.arrays import Layout
from fedctl.doctor.findings import (
    Daemon,
    Finding,
    Port,
    Seen,
    Volume,
    failed,
    of_certificate,
    ok,
    warning,
)
from fedctl.processes import fetch
from fedctl.scale.units import instance_of

USER = "fl"
STATE = Path("/var/lib/fl")
PROBE_S = 3.0  # for a listener of this host


@dataclass(frozen=True, slots=True)
class Secrets:
    """Passwords of daemons, from the files or credentials that are theirs; b"" for none."""

    server: bytes = b""
    redis: bytes = b""
    sentinel: bytes = b""


# ---- who is to run here


def roles_of(links: Iterable[str]) -> tuple[set[Role], list[int]]:
    """Read roles and server instances from the names of enabled units."""
    names = set(links)
    instances = sorted(n for name in names if (n := instance_of(name)) is not None)
    roles = {Role.SERVER} if instances else set()
    if "fl-schedulerd.service" in names:
        roles.add(Role.SCHEDULER)
    if "fl-workerd.service" in names:
        roles.add(Role.WORKER)
    return roles, instances


# ---- configuration


def configuration(path: Path, roles: Iterable[Role]) -> tuple[list[Finding], dict[Role, Settings]]:
    """Read the configuration once for each role."""
    findings: dict[str, Finding] = {}
    good: dict[Role, Settings] = {}
    for role in roles:
        try:
            loaded = load_settings(path, role)
            if faults := unsupported(loaded.settings, role):
                raise ConfigError("\n".join(faults))
        except ConfigError as error:
            for line in str(error).splitlines():
                text = line.removeprefix("warning: ")
                make = failed if text == line else warning
                findings[text] = make("configuration", text, _mend(path))
            continue
        good[role] = loaded.settings
        for text in loaded.warnings:
            findings.setdefault(text, warning("configuration", text, _mend(path)))
    if good:
        names = " and ".join(role.value for role in good)
        findings[""] = ok("configuration", f"{path} is good for {names}")
    return list(findings.values()), good


def _mend(path: Path) -> str:
    return f"mend {path}; where Ansible writes it: fl_job in the inventory, then ansible-playbook site.yml"


# ---- files


@dataclass(frozen=True, slots=True)
class Need:
    """A file or folder that daemons use.

    Attributes:
        path: absolute.
        option: that names it.
        write: whether it is written to; it may then be missing, if its folder can be written to.
    """

    path: Path
    option: str
    write: bool = False


def needs_of(file: Path, settings: Mapping[Role, Settings], base: Path) -> list[Need]:
    """List what daemons of some roles use; relative paths begin at ``base``."""
    needs = {Need(file, "--yaml-config"): None}
    for role, given in settings.items():
        cache, own = given.distributed_cache, given.fedcore
        read = {
            "fedcore.redis.password_file": own.redis.password_file,
            "fedcore.redis.sentinel_password_file": own.redis.sentinel_password_file,
        }
        if given.enable_ssl:
            read["ssl.server_cert_path"] = given.ssl.server_cert_path
        if redis_has_tls(given):
            read["distributed_cache.cacert_filename"] = cache.cacert_filename
            read["distributed_cache.capath"] = cache.capath
            read["distributed_cache.cert_filename"] = cache.cert_filename
            read["distributed_cache.private_key_filename"] = cache.private_key_filename
        written = {}
        if role is Role.SERVER:
            read["fedcore.server.model"] = own.server.model
            written["fedcore.server.checkpoint_dir"] = own.server.checkpoint_dir
            written["fedcore.server.ledger_dir"] = str(ledger_folder(given))
            written["summary.failure_event_file"] = given.summary.failure_event_file
        needs |= {Need(base / path, option): None for option, path in read.items() if path}
        needs |= {Need(base / path, option, True): None for option, path in written.items() if path}
    return list(needs)


def ledger_folder(settings: Settings) -> Path:
    """Return where ledgers are."""
    own = settings.fedcore.server
    return Path(own.ledger_dir) if own.ledger_dir else Path(own.checkpoint_dir) / "ledgers"


def daemon_user() -> str:
    """Return the user that daemons of this host have, "" if that is ourselves."""
    with contextlib.suppress(KeyError):
        if pwd.getpwnam(USER).pw_uid != os.geteuid() and os.geteuid() == 0:
            return USER
    return ""


def files(needs: Sequence[Need], user: str) -> list[Finding]:
    """Find out what of it the daemons' user may not do."""
    asked = [_question(need) for need in needs]
    answers = _as_user(user, asked)
    who = user or pwd.getpwuid(os.geteuid()).pw_name
    findings = []
    for need, (path, _), (may, there) in zip(needs, asked, answers, strict=True):
        if may:
            continue
        verb = "write to" if need.write else "read"
        fault = f"user {who} cannot {verb} {need.path} ({need.option})"
        if not there:
            findings.append(
                failed("files", f"{fault}: it is not there", "check the path, or put the file there")
            )
        else:
            remedy = (
                f"give {path} to the user: chown or chgrp {who}, and chmod; its folders must let him pass"
            )
            findings.append(failed("files", f"{fault}: permission denied", remedy))
    return findings or [ok("files", f"user {who} can use all {len(needs)} files and folders")]


def _question(need: Need) -> tuple[str, int]:
    """Return the path that matters and what must be allowed there, as ``os.access`` takes it."""
    if not need.write:
        return str(need.path), os.R_OK
    there = _existing(need.path)
    is_file = there == need.path and there.is_file()
    return str(there), os.W_OK if is_file else os.W_OK | os.X_OK


def _existing(path: Path) -> Path:
    """Return a path, or the next one above it that is there."""
    for candidate in (path, *path.parents):
        with contextlib.suppress(OSError):
            if candidate.exists():
                return candidate
    return path


def _as_user(user: str, asked: Sequence[tuple[str, int]]) -> list[tuple[bool, bool]]:
    """Tell of paths whether a user may use them so, and whether they are there at all."""
    there = [os.path.exists(path) for path, _ in asked]
    if not user:
        return list(zip((os.access(path, mode) for path, mode in asked), there, strict=True))
    reading, writing = os.pipe()
    child = os.fork()  # no exec: our interpreter may be out of his reach
    if not child:
        _answer_as(user, asked, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as answers:
        may = answers.read()
    os.waitpid(child, 0)
    return [(answer == 1, is_there) for answer, is_there in zip(may, there, strict=True)]


def _answer_as(user: str, asked: Sequence[tuple[str, int]], answers: int) -> NoReturn:
    """In a process of its own: become the user, write a byte per answer, end. The kernel knows best what he may do."""
    try:
        entry = pwd.getpwnam(user)
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
        os.write(answers, bytes(os.access(path, mode) for path, mode in asked))
    finally:
        os._exit(0)


def secrets(settings: Settings, credentials: Path, base: Path) -> tuple[list[Finding], Secrets]:
    """Read the passwords that the daemons would have."""
    own = settings.fedcore.redis
    findings: list[Finding] = []

    def password(option: str, named: str, name: str) -> bytes:
        path = base / named if named else credentials / name
        try:
            content = path.read_bytes()
            mode = path.stat().st_mode
        except FileNotFoundError:
            return b""
        except OSError as error:
            findings.append(
                warning("passwords", f"{path} cannot be read: {error.strerror}", "repeat with sudo")
            )
            return b""
        if mode & 0o077:
            findings.append(warning("passwords", f"others can read {path}", f"chmod 600 {path}"))
        first = content.split(b"\n", 1)[0].rstrip(b"\r")
        if named and not first:
            findings.append(
                failed("passwords", f"the first line of {path} ({option}) is empty", "put it there")
            )
        return first

    found = Secrets(
        password("--server-password-file", "", "server-password"),
        password("fedcore.redis.password_file", own.password_file, "redis-password"),
        password("fedcore.redis.sentinel_password_file", own.sentinel_password_file, "sentinel-password"),
    )
    if settings.enable_ssl and not found.server and not findings:
        findings.append(
            warning(
                "passwords",
                f"no password for {settings.ssl.server_cert_path} in {credentials}/server-password",
                "put it there, or give the daemons --server-password-file",
            )
        )
    return findings, found


# ---- certificates


def certificates(settings: Settings, password: bytes, base: Path, now: datetime) -> list[Finding]:
    """Read the certificates that are in use and judge their dates."""
    findings = []
    cache, days = settings.distributed_cache, settings.ssl.cert_expire_warning_time_in_day
    if settings.enable_ssl:
        path = base / settings.ssl.server_cert_path
        try:
            if password:
                _, found, _ = pkcs12.load_key_and_certificates(path.read_bytes(), password)
                findings += _dates(f"{path} (ssl.server_cert_path)", [found] if found else [], now, days)
        except OSError:
            pass  # said among the files
        except ValueError:
            findings.append(
                failed(
                    "certificates",
                    f"{path} cannot be opened: wrong password, or no PKCS#12 file",
                    "make it anew with its password: ansible-playbook site.yml, or openssl pkcs12 -export",
                )
            )
    if redis_has_tls(settings):
        for option, name in (
            ("cacert_filename", cache.cacert_filename),
            ("cert_filename", cache.cert_filename),
        ):
            if not name:
                continue
            path = base / name
            try:
                loaded = x509.load_pem_x509_certificates(path.read_bytes())
                findings += _dates(f"{path} (distributed_cache.{option})", loaded, now, days)
            except OSError:
                pass  # said among the files
            except ValueError:
                findings.append(
                    failed("certificates", f"{path} holds no PEM certificate", "put a PEM file there")
                )
    return findings


def _dates(name: str, found: Sequence[x509.Certificate], now: datetime, days: int) -> list[Finding]:
    return [
        of_certificate(name, each.not_valid_before_utc, each.not_valid_after_utc, now, days) for each in found
    ]


# ---- room


def model_of(settings: Settings, base: Path, optional: bool) -> tuple[list[Finding], Layout | None]:
    """Read the model that servers would begin with; ``optional``: they may be given another one when they start."""
    own = settings.fedcore.server
    try:
        newest = checkpoints.load_newest(base / own.checkpoint_dir, settings.fl_name)
        if newest is not None:
            model, name = newest.model, f"{newest.path} of iteration {newest.iteration}"
        elif own.model:
            model, name = read_model(base / own.model), f"{base / own.model}, the initial one"
        else:
            text = f"no checkpoint of {settings.fl_name} in {base / own.checkpoint_dir}, and no initial model"
            make = warning if optional else failed
            remedy = "let fedcore.server.model name the initial weights, or give fl-serverd --model FILE"
            return [make("model", text, remedy)], None
        rule = settings.aggregation
        model = with_kept(model, rule_named(rule.aggregation_type.value, rule.total_client_num))
    except FedcoreError as error:
        return [failed("model", str(error.args[0]), error.hint or "check the file")], None
    layout = Layout.of(model.weights, model.not_aggregated)
    return [ok("model", f"{name}: {len(layout)} weights, {layout.total_floats} values")], layout


def ledger_size(settings: Settings, layout: Layout) -> int:
    """Return the bytes of a server's ledger."""
    return ledger_shape(settings, layout).size


def volume_of(path: Path) -> Volume:
    """Measure the file system of a folder, or of the next one above it that is there."""
    there = _existing(path)
    facts = os.statvfs(there)
    return Volume(
        facts.f_blocks * facts.f_frsize,
        facts.f_bavail * facts.f_frsize,
        os.path.ismount(path),
        _file_system(there) in ("tmpfs", "ramfs"),
    )


def _file_system(path: Path) -> str:
    """Return the kind of the file system of a path."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[2] == wanted:
            return words[words.index("-") + 1]
    return ""


def host_memory() -> int:
    """Return the bytes of this host's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- ports


def daemons_of(settings: Mapping[Role, Settings], instances: Sequence[int]) -> list[Daemon]:
    """List the daemons of this host and where they listen.

    Raises:
        ConfigError: a port is above 65535.
    """
    found = []
    if Role.SCHEDULER in settings:
        own = settings[Role.SCHEDULER].fedcore.scheduler
        found.append(Daemon("fl-schedulerd", own.admin_address, {"operators": own.manage_address}))
    if Role.SERVER in settings:
        server = settings[Role.SERVER].fedcore.server
        for n in instances:
            node = Address(server.tcp_ip or "0.0.0.0", port_of_instance(server.tcp_port, n))
            others = {"devices": address_of_instance(server.http_address, n), "nodes": node}
            admin = address_of_instance(server.admin_address, n)
            found.append(Daemon(f"fl-serverd@{n}", admin, others))
    if Role.WORKER in settings:
        found.append(Daemon("fl-workerd", settings[Role.WORKER].fedcore.worker.admin_address, {}))
    return found


def see(daemon: Daemon) -> Seen:
    """Look at a daemon and its ports."""
    alive, ready = _health(daemon.admin)
    addresses = [daemon.admin, *daemon.others.values()]
    ports = {address: _port(address) for address in addresses}
    return Seen(alive, ready, ports)


def _health(admin: Address) -> tuple[bool, str]:
    try:
        if fetch(f"http://{admin}/livez", PROBE_S)[0] != 200:
            return False, ""
        status, body = fetch(f"http://{admin}/readyz", PROBE_S)
        return True, "" if status == 200 else "; ".join(json.loads(body)["reasons"].values())
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
        return False, ""


def _port(address: Address) -> Port:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Twisted does
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            if error.errno == errno.EACCES:
                return Port.REFUSED
            if error.errno != errno.EADDRINUSE:
                return Port.NO_ADDRESS
        else:
            return Port.FREE
    with contextlib.suppress(OSError), socket.create_connection((address.host, address.port), PROBE_S):
        return Port.LISTENS
    return Port.TAKEN
