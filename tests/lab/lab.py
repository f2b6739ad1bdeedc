"""The lab as a whole: its hosts, their network, the controller, and the supplies that the hosts install from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lab.cgroups import Hierarchies, HostGroup, find_hierarchies, sweep
from lab.commands import call, say
from lab.controller import Controller
from lab.errors import LabError
from lab.host import Host
from lab.inventory import CONTROLLER, controller_address, read_hosts
from lab.network import Network
from lab.places import INVENTORY, PREFIX, Places


class Lab:
    """Hosts by name: ``lab["server1"].cut()``, ``lab.network.part("server1", "scheduler")``.

    Any process inside may have one: the state is in the kernel and on disk.

    Args:
        prefix: which lab.
        inventory: where its hosts are listed.
    """

    def __init__(self, prefix: str, inventory: Path = INVENTORY) -> None:
        self.places = Places(prefix)
        addresses = read_hosts(inventory)
        everyone = {CONTROLLER: controller_address(addresses), **addresses}
        self.network = Network(self.places.run / "network", everyone)
        self.controller = Controller(self.places, str(everyone[CONTROLLER]))
        self._hierarchies: Hierarchies = find_hierarchies()
        mounts = {f"/srv/lab/{name}": self.places.supply(name).resolve() for name in ("debs", "wheels")}
        self._hosts = {
            name: Host(
                name,
                address,
                self.places,
                HostGroup(self._hierarchies, prefix, name),
                self.network,
                everyone,
                self.places.supply("base").resolve(),
                mounts,
            )
            for name, address in addresses.items()
        }

    @classmethod
    def current(cls) -> Lab:
        """The lab that this process is in.

        Raises:
            LabError: it is in none.
        """
        if PREFIX not in os.environ:
            raise LabError("this process is in no lab: start it with tests/lab/run")
        return cls(os.environ[PREFIX])

    def __getitem__(self, name: str) -> Host:
        try:
            return self._hosts[name]
        except KeyError:
            raise LabError(f"no such host: {name}; there are {', '.join(self._hosts)}") from None

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def chosen(self, names: tuple[str, ...]) -> list[Host]:
        """The hosts of these names, all if there are none."""
        return [self[name] for name in names] if names else list(self)

    def up(self, *names: str) -> None:
        """Switch hosts on, all of them by default, and wait until they have booted.

        Raises:
            LabError: a unit of a host that was off has failed.
        """
        hosts = self.chosen(names)
        were_off = [host for host in hosts if not host.is_up]
        for host in hosts:
            host.start()
        for host in hosts:
            host.await_up(healthy=host in were_off)
        if were_off:
            say(f"up: {', '.join(host.name for host in were_off)}")

    def renew(self, *names: str) -> None:
        """Replace hosts, all of them by default, by new ones with nothing installed."""
        for host in self.chosen(names):
            host.erase()
        if not names:
            call("sh", "-c", 'rm -rf "$0"/*', self.controller.secrets)
        self.up(*names)

    def prepare(self) -> None:
        """Lay the network and make the key; called once, by the first process."""
        self.network.lay()
        self.controller.prepare()

    def erase(self) -> None:
        """End all hosts and remove their disks. Logs stay."""
        for host in self:
            host.erase()
        sweep(self._hierarchies, self.places.prefix)

    def save_journals(self, folder: Path) -> None:
        """Write each host's journal, of all its boots, into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for host in self:
            (folder / f"{host.name}.journal").write_text(host.journal("-o", "short-precise"))
