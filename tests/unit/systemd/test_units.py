"""The units agree with the daemons, with each other, and keep their sandbox."""

import importlib
import re
from pathlib import Path

import pytest

from fedcore.config import settings
from fedcore.services import loss, server
from fldaemons import configuration, launch

ROOT = Path(__file__).parents[3]
UNITS = ROOT / "systemd"
SERVICES = {
    "fl-schedulerd": "fl-schedulerd.service",
    "fl-serverd": "fl-serverd@.service",
    "fl-workerd": "fl-workerd.service",
}
CUDA = "fl-workerd.service.d/cuda.conf.sample"
PROGRAMS = "/opt/fl/current/bin"
CREDENTIALS = {
    configuration.SERVER_PASSWORD,
    configuration.CLIENT_PASSWORD,
    configuration.REDIS_PASSWORD,
    configuration.SENTINEL_PASSWORD,
}
OWN_CREDENTIALS = {"fl-schedulerd": {configuration.OPERATOR_TOKEN}}
SANDBOX = (
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "ProtectSystem=strict",
    "ProtectHome=yes",
    "PrivateTmp=yes",
    "DevicePolicy=closed",
    "PrivateDevices=yes",
    "PrivateIPC=yes",
    "PrivateMounts=yes",
    "PrivateUsers=yes",
    "ProtectProc=invisible",
    "ProtectClock=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectControlGroups=yes",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
    "LockPersonality=yes",
    "RemoveIPC=yes",
    "KeyringMode=private",
    "SystemCallArchitectures=native",
    "SystemCallErrorNumber=EPERM",
    "LimitCORE=0",
    "OOMPolicy=kill",
)


class Unit:
    """What a unit file says: the values of each key, in order; a section once only."""

    def __init__(self, name):
        self.name = name
        self.sections = {}
        for line in (UNITS / name).read_text().splitlines():
            if header := re.fullmatch(r"\[(\w+)\]", line):
                assert header[1] not in self.sections, name
                section = self.sections.setdefault(header[1], {})
            elif line and not line.startswith("#"):
                key, equals, value = line.partition("=")
                assert equals and re.fullmatch(r"[A-Z]\w*", key), f"{name}: {line}"
                section.setdefault(key, []).append(value)

    def all(self, section, key):
        return self.sections[section].get(key, [])

    def one(self, section, key):
        values = self.all(section, key)
        assert len(values) == 1, f"{self.name}: {key} stands {len(values)} times"
        return values[0]

    def words(self, section, key):
        return {word for value in self.all(section, key) for word in value.split()}


@pytest.fixture(params=SERVICES)
def daemon(request):
    return request.param


@pytest.fixture
def unit(daemon):
    return Unit(SERVICES[daemon])


@pytest.fixture(scope="module")
def serverd():
    return Unit(SERVICES["fl-serverd"])


@pytest.fixture(scope="module")
def mount():
    return Unit("var-lib-fl-ledgers.mount")


def test_every_file_is_known():
    names = {str(path.relative_to(UNITS)) for path in UNITS.rglob("*") if path.is_file()}
    assert names == {*SERVICES.values(), CUDA, "fl.slice", "fl.target", "var-lib-fl-ledgers.mount", "verify"}


def test_lines_are_short():
    for path in UNITS.rglob("*.*"):
        if path.is_file():
            assert max(map(len, path.read_text().splitlines())) <= 120, path.name


# ---- what is run


def test_the_program_is_one_of_ours_with_options_that_it_has(unit, daemon):
    program, *words = unit.one("Service", "ExecStart").split()
    assert program == f"{PROGRAMS}/{daemon}"
    assert f'"{daemon} = fldaemons.{daemon[3:]}:main"' in (ROOT / "setup.py").read_text()
    command = importlib.import_module(f"fldaemons.{daemon[3:]}").main
    command.make_context(
        daemon, [word.replace("%i", "3") for word in words]
    )  # ends the process if it knows one not


def test_instance_n_of_the_server(serverd):
    assert serverd.one("Service", "ExecStart").endswith(" --yaml-config /etc/fl/fl.yaml --instance %i")
    assert "%i" in serverd.one("Service", "SyslogIdentifier")


def test_type_notify_with_reload_by_sighup(unit):
    assert unit.one("Service", "Type") == "notify"
    assert unit.one("Service", "NotifyAccess") == "main"
    assert unit.one("Service", "ExecReload") == "/bin/kill -HUP $MAINPID"


def test_a_crash_is_restarted_for_ever_and_a_configuration_never(unit):
    assert unit.one("Service", "Restart") == "on-failure"
    assert unit.one("Unit", "StartLimitIntervalSec") == "0"
    assert int(unit.one("Service", "RestartSec")) >= 1
    assert unit.words("Service", "RestartPreventExitStatus") == {"2", str(launch.EX_CONFIG)}


def test_a_restart_comes_before_others_give_the_ledger_up(serverd):
    assert int(serverd.one("Service", "RestartSec")) < loss.LOSS_S / 2


def test_time_for_a_drain(serverd):
    drain = 2 * server.DRAIN_TIMEOUT_S + server.NODE_GRACE_S + settings.RedisSettings().reply_timeout
    assert int(serverd.one("Service", "TimeoutStopSec")) > drain


def test_a_stop_may_ask_for_time_more_than_once_before_it_is_up(unit):
    assert int(unit.one("Service", "TimeoutStopSec")) > launch.EXTENSION_S


def test_no_pool_of_threads_for_sums(serverd):
    assert {"OPENBLAS_NUM_THREADS=1", "OMP_NUM_THREADS=1"} <= serverd.words("Service", "Environment")


def test_tasks(unit):
    assert int(unit.one("Service", "TasksMax")) >= 64


def test_time_for_a_start_and_for_the_stacks_of_what_hangs(unit):
    assert int(unit.one("Service", "TimeoutStartSec")) >= 90
    assert int(unit.one("Service", "TimeoutAbortSec")) <= 10


def test_what_hangs_tells_where(unit):
    assert unit.one("Service", "WatchdogSec") == "30"
    assert unit.one("Service", "TimeoutStartFailureMode") == "abort"
    assert unit.one("Service", "TimeoutStopFailureMode") == "abort"
    assert "PYTHONFAULTHANDLER=1" in unit.words("Service", "Environment")
    assert not unit.all("Service", "WatchdogSignal"), "SIGABRT is the signal that faulthandler hears"


def test_room_for_all_connections(serverd):
    connections = settings.DeviceSettings().max_connections
    bodies = connections  # each may wait in a spool
    nodes = settings.ClientSettings().connection_num
    assert int(serverd.one("Service", "LimitNOFILE")) > connections + bodies + nodes


# ---- passwords


def test_credentials_are_those_that_the_daemons_look_for(daemon, unit):
    loaded = dict(value.split(":", 1) for value in unit.all("Service", "LoadCredential"))
    names = CREDENTIALS | OWN_CREDENTIALS.get(daemon, set())
    assert loaded == {name: f"/etc/fl/credentials/{name}" for name in names}


def test_a_credential_without_a_file_is_no_password(daemon, unit, tmp_path, monkeypatch):
    given = dict(value.split(":", 1) for value in unit.all("Service", "SetCredential"))
    assert set(given) == CREDENTIALS | OWN_CREDENTIALS.get(daemon, set())
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    for name, value in given.items():
        (tmp_path / name).write_bytes(value.encode().decode("unicode_escape").encode())
        assert configuration.password_of(None, name) == b""


def test_no_password_in_the_environment(unit):
    for variable in unit.words("Service", "Environment"):
        assert not re.search("(?i)pass|secret|token", variable)


# ---- how the units belong together


def test_all_daemons_belong_to_the_target_and_the_slice(unit):
    assert unit.one("Unit", "PartOf") == "fl.target"
    assert "fl.target" in unit.words("Unit", "After"), "else a stop of the target does not wait for the drain"
    assert unit.one("Install", "WantedBy") == "fl.target"
    assert unit.one("Service", "Slice") == "fl.slice"
    assert (unit.one("Service", "User"), unit.one("Service", "Group")) == ("fl", "fl")


def test_network_and_clock_come_first(unit):
    assert {"network-online.target", "time-sync.target"} <= unit.words("Unit", "After") & unit.words(
        "Unit", "Wants"
    )


def test_the_target_comes_with_the_host():
    target = Unit("fl.target")
    assert target.one("Install", "WantedBy") == "multi-user.target"
    assert set(target.sections) == {"Unit", "Install"}


def test_servers_share_their_folder_and_the_ledgers(serverd, mount):
    where = mount.one("Mount", "Where")
    assert where == "/var/lib/fl/ledgers"
    assert mount.name == where[1:].replace("/", "-") + ".mount"
    assert serverd.one("Unit", "RequiresMountsFor") == where
    assert serverd.one("Service", "StateDirectory") == "fl"
    assert serverd.one("Service", "WorkingDirectory") == "/var/lib/fl"
    assert not serverd.all("Service", "TemporaryFileSystem")
    assert not serverd.all("Service", "InaccessiblePaths")


def test_ledgers_are_the_servers_own_and_in_memory(mount):
    assert mount.one("Mount", "Type") == "tmpfs"
    assert mount.one("Mount", "DirectoryMode") == "0750"
    options = set(mount.one("Mount", "Options").split(","))
    assert {"mode=0750", "uid=fl", "gid=fl", "nosuid", "nodev", "noexec"} < options
    assert [option for option in options if option.startswith("size=")] == ["size=50%"]


def test_nothing_but_a_shutdown_ends_the_ledgers(mount, serverd):
    assert mount.one("Unit", "RefuseManualStop") == "yes"
    assert not mount.all("Unit", "PartOf")
    assert not mount.all("Unit", "StopWhenUnneeded")
    assert not serverd.all("Unit", "BindsTo")


def test_the_journal_names_the_daemon(unit, daemon):
    assert unit.one("Service", "SyslogIdentifier").removesuffix("@%i") == daemon


def test_the_worker_has_a_folder_and_sees_no_ledgers():
    worker = Unit(SERVICES["fl-workerd"])
    assert {"HOME=/var/lib/fl/worker", "PYTHONUNBUFFERED=1"} <= worker.words("Service", "Environment")
    assert worker.one("Service", "StateDirectory") == "fl/worker"
    assert worker.one("Service", "WorkingDirectory") == "/var/lib/fl/worker"
    hidden = worker.words("Service", "InaccessiblePaths")
    assert hidden == {"-/var/lib/fl/ledgers", "-/var/lib/fl/checkpoints"}


def test_the_scheduler_keeps_nothing():
    scheduler = Unit(SERVICES["fl-schedulerd"])
    assert not scheduler.all("Service", "StateDirectory")
    assert scheduler.one("Service", "WorkingDirectory") == "/", "its usual folder is hidden from it"
    assert scheduler.words("Service", "InaccessiblePaths") == {"-/var/lib/fl"}


# ---- limits


def test_memory(serverd):
    assert serverd.one("Service", "MemoryMax") == "4G"
    assert serverd.one("Service", "MemorySwapMax") == "0", "updates are never written to a disk"
    assert not serverd.all("Service", "MemoryHigh"), "ledgers cannot be reclaimed: it would only slow down"
    assert Unit("fl.slice").one("Slice", "MemoryMax") == "85%"


def test_few_heaps(unit):
    assert "MALLOC_ARENA_MAX=2" in unit.words("Service", "Environment")


def test_limits_of_the_scheduler():
    scheduler = Unit(SERVICES["fl-schedulerd"])
    assert scheduler.one("Service", "MemoryMax") == "512M"
    assert scheduler.one("Service", "MemorySwapMax") == "0"
    assert "OPENBLAS_NUM_THREADS=1" in scheduler.words("Service", "Environment")


def test_files_of_all(unit):
    assert int(unit.one("Service", "LimitNOFILE")) >= 4096


def test_the_worker_gives_way_to_servers():
    worker = Unit(SERVICES["fl-workerd"])
    assert int(worker.one("Service", "OOMScoreAdjust")) > 0
    assert int(worker.one("Service", "CPUWeight")) < 100


# ---- sandbox


@pytest.mark.parametrize("line", SANDBOX)
def test_the_sandbox_of_every_daemon(unit, line):
    key, _, value = line.partition("=")
    assert unit.one("Service", key) == value


def test_system_calls(unit, daemon):
    refused = "~@privileged" if daemon == "fl-workerd" else "~@privileged @resources"
    assert unit.all("Service", "SystemCallFilter") == ["@system-service", refused]


def test_proc(unit, daemon):
    assert unit.one("Service", "ProcSubset") == ("all" if daemon == "fl-workerd" else "pid")


def test_only_what_was_installed_is_run(unit, daemon):
    if daemon != "fl-workerd":  # trainers bring modules of their own, and torch may compile some
        written = {"/tmp", "/var/tmp", "/dev/shm"} | ({"/var/lib/fl"} if daemon == "fl-serverd" else set())
        assert unit.words("Service", "NoExecPaths") == written
    assert not unit.all("Service", "ExecPaths"), "systemd 252 makes them writable"


def test_others_read_nothing(unit, daemon):
    assert unit.one("Service", "UMask") == ("0077" if daemon == "fl-schedulerd" else "0027")
    if daemon != "fl-schedulerd":
        assert unit.one("Service", "StateDirectoryMode") == "0750"


def test_what_is_off_on_purpose(unit):
    """pyOpenSSL's callbacks are code that is made at run time; where devices come from, nobody knows."""
    assert not unit.all("Service", "MemoryDenyWriteExecute")
    assert not unit.all("Service", "IPAddressDeny")
    assert "# Not MemoryDenyWriteExecute: " in (UNITS / unit.name).read_text()
    assert "# Not IPAddressDeny: " in (UNITS / unit.name).read_text()


def test_cuda_relaxes_devices_and_what_cuda_asks_for_only():
    sample = Unit(CUDA)
    assert sample.one("Service", "PrivateDevices") == "no"
    assert sample.one("Service", "DevicePolicy") == "closed"
    assert all(
        re.fullmatch(r"char-nvidia[a-z-]* rw", value) for value in sample.all("Service", "DeviceAllow")
    )
    assert set(sample.sections["Service"]) == {
        "PrivateDevices",
        "DevicePolicy",
        "DeviceAllow",
        "LimitMEMLOCK",
        "ProcSubset",
        "SystemCallFilter",
    }
