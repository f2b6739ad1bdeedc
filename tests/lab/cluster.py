"""The cluster that the playbooks have made of the hosts: jobs to deploy, addresses, and what its daemons tell.

Jobs are given as a user gives them, in variables of the playbook; what a host runs is seen through systemctl, the
journal and the admin ports of its daemons.
"""

from __future__ import annotations

import json
import re
import ssl
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import devices
from lab.commands import wait_until
from lab.controller import Played
from lab.errors import HostDown
from lab.host import Host
from lab.lab import Lab

from fedcore.models.formats import write_model
from fedexamples import lenet

DEVICE_PORT, SERVER_ADMIN_PORT, BALANCER_PORT = 6666, 6866, 6600
OPERATOR_PORT, SCHEDULER_ADMIN_PORT, WORKER_ADMIN_PORT = 11202, 11302, 6966
SERVER_HOSTS = ("server1", "server2")
MOST_SERVERS = 4  # of one host that devices look for
START_S = 60.0  # from a start or the end of a fault until a server is ready
PLAY_S = 1200.0  # a first deployment takes two minutes on a quiet machine
BUDGET = "16MiB"  # of a server's ledger: hosts are small
ASK = """\
import sys, urllib.error, urllib.request
try:
    answer = urllib.request.urlopen(sys.argv[1], timeout=5)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status, answer.read().decode())
"""


@dataclass(frozen=True)
class Job:
    """A job as its operator describes it.

    Attributes:
        sections: of the YAML.
        model: name -> weight that it starts from.
        variables: others for the playbook.
    """

    sections: Mapping[str, Any]
    model: Mapping[str, Any]
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.sections["fl_name"])


def lenet_job(mode: str, iterations: int, silos: int) -> Job:
    """Return a training of LeNet on handwritten digits, which so many devices take part in.

    Args:
        mode: server_mode.
        iterations: after which it ends.
        silos: devices, all of which are needed.
    """
    return Job(
        {
            "fl_name": f"lenet-{mode.split('_', maxsplit=1)[0].lower()}",
            "fl_iteration_num": iterations,
            "server_mode": mode,
            "round": {
                "start_fl_job_threshold": silos,
                "update_model_ratio": 1.0,
                "start_fl_job_time_window": 120_000,
                "update_model_time_window": 120_000,
                "global_iteration_time_window": 300_000,
            },
            "client": {
                "client_epoch_num": lenet.EPOCHS,
                "client_batch_size": lenet.BATCH_SIZE,
                "client_learning_rate": lenet.LEARNING_RATE,
            },
        },
        lenet.initial_weights(seed=1),
        {
            "worker_trainer": "fedexamples.lenet_worker_numpy:NumpyLeNetWorker",
            "worker_options": "data=digits,learning_rate=0.02",
        },
    )


def endless_job() -> Job:
    """Return the job of ``lab.devices``."""
    return Job(devices.job(), devices.initial_model())


class Cluster:
    """The cluster on the lab's hosts.

    Args:
        lab: the hosts.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    # ---- deploying

    def play(self, playbook: str, job: Job, *arguments: str, **options: Any) -> Played:
        """Run a playbook with a job and its initial model; see ``Controller.play``."""
        folder = Path(tempfile.mkdtemp(prefix=f"{job.name}-", dir=self.lab.places.run))
        model, variables = folder / "model.safetensors", folder / "variables.json"
        write_model(model, dict(job.model), set(), {})
        given = {"fl_job": job.sections, "fl_model": str(model), "fl_ledger_budget": BUDGET, **job.variables}
        variables.write_text(json.dumps(given))
        options = {"timeout": PLAY_S} | options
        return self.lab.controller.play(playbook, "-e", f"@{variables}", *arguments, **options)

    def deployed(self, job: Job) -> bool:
        """Tell whether the hosts run this job already, as in a lab that is held."""
        name = re.compile(rf"^fl_name: \"?{re.escape(job.name)}\"?$", re.MULTILINE)
        return all(name.search(self[host].sh("cat /etc/fl/fl.yaml || true")) for host in SERVER_HOSTS)

    # ---- addresses

    def __getitem__(self, host: str) -> Host:
        return self.lab[host]

    @property
    def ca_file(self) -> Path:
        """The certificate that all others lead to."""
        return self.lab.controller.secrets / "ca.crt"

    @property
    def tls(self) -> ssl.SSLContext:
        """How devices and operators know whom they talk to."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    @property
    def device_addresses(self) -> list[devices.Address]:
        """Return the devices' ports of all servers that there may ever be: number 0 is the first of server1."""
        ports = range(DEVICE_PORT, DEVICE_PORT + MOST_SERVERS)
        return [(self[host].address, port) for host in SERVER_HOSTS for port in ports]

    @property
    def balancer(self) -> devices.Address:
        """Return the address that devices are told where there is a balancer."""
        return self["scheduler"].address, BALANCER_PORT

    def number(self, host: str, instance: int) -> int:
        """Return the number of a server among the addresses."""
        return SERVER_HOSTS.index(host) * MOST_SERVERS + instance

    # ---- what daemons tell

    def get(self, host: str, port: int, path: str) -> tuple[int, str] | None:
        """Ask a daemon's admin listener, from its own host; None while nobody listens or the host is down."""
        url = f"http://{self[host].address}:{port}{path}"
        try:
            said = self[host].run("python3", "-c", ASK, url, check=False, timeout=15)
        except HostDown:
            return None
        status, _, body = said.partition(" ")
        return (int(status), body) if status.isdigit() else None

    def ready(self, host: str, instance: int = 0) -> bool:
        """Tell whether a server says that it is ready."""
        answer = self.get(host, SERVER_ADMIN_PORT + instance, "/readyz")
        return answer is not None and answer[0] == 200

    def reasons(self, host: str, instance: int = 0) -> str:
        """Return what /readyz of a server says, "" while nobody listens."""
        answer = self.get(host, SERVER_ADMIN_PORT + instance, "/readyz")
        return "" if answer is None else answer[1]

    def instances(self, host: str) -> list[int]:
        """Return the enabled instances of a host: the links of systemd."""
        links = self[host].sh("ls /etc/systemd/system/fl.target.wants/ || true")
        return sorted(int(n) for n in re.findall(r"fl-serverd@(\d+)\.service", links))

    def await_servers(self, counts: Mapping[str, int], seconds: float = START_S) -> None:
        """Wait until so many servers of each host are ready, and there are no others."""
        for host, count in counts.items():
            wait_until(
                lambda host=host, count=count: self.instances(host) == list(range(count)),
                seconds,
                f"{host} has {count} servers",
            )
            for instance in range(count):
                wait_until(
                    lambda host=host, instance=instance: self.ready(host, instance),
                    seconds,
                    f"server {instance} of {host} is ready",
                    pause=0.3,
                )

    def set_servers(self, each: int) -> None:
        """Have so many servers on each host, by hand as an operator would, and wait until they are ready."""
        for host in SERVER_HOSTS:
            for instance in range(each):
                self.enable(host, instance)
            for instance in reversed(self.instances(host)):
                if instance >= each:
                    self[host].run(
                        "systemctl", "disable", "--now", f"fl-serverd@{instance}.service", timeout=START_S
                    )
        self.await_servers(dict.fromkeys(SERVER_HOSTS, each))

    def enable(self, host: str, instance: int) -> None:
        """Start a server, now and at every boot."""
        self[host].run("systemctl", "enable", "--now", f"fl-serverd@{instance}.service", timeout=START_S)

    def main_pid(self, host: str, unit: str) -> int:
        """Return the process of a unit, 0 if there is none."""
        return int(self[host].run("systemctl", "show", "--value", "--property", "MainPID", unit))

    def kill(self, host: str, unit: str) -> None:
        """Kill a unit's main process with SIGKILL."""
        pid = self.main_pid(host, unit)
        assert pid, f"{unit} of {host} does not run"
        self[host].run("kill", "-9", str(pid))

    def await_another(self, host: str, unit: str, than: int, seconds: float = START_S) -> None:
        """Wait until systemd has started a unit again that ran as another process."""
        wait_until(lambda: self.main_pid(host, unit) not in (0, than), seconds, f"{host} starts {unit} again")

    def hosts(self, names: Sequence[str] = SERVER_HOSTS) -> list[Host]:
        """Return hosts by name."""
        return [self[name] for name in names]

    def mend(self) -> None:
        """End all faults: the network's, and hosts that are paused or off."""
        self.lab.network.heal()
        for host in self.lab:
            host.resume()
        self.lab.up()
