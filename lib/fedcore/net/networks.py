"""Sets of networks, as the configuration names them."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address, ip_network


class Networks:
    """Hosts of some networks: ``"10.0.0.7" in Networks(["10.0.0.0/24"])``."""

    def __init__(self, networks: Iterable[str]) -> None:
        """Take networks in CIDR form.

        Raises:
            ValueError: one of them is none.
        """
        self._networks = [ip_network(network) for network in networks]

    def __contains__(self, host: object) -> bool:
        try:
            address = ip_address(str(host))
        except ValueError:
            return False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped  # how IPv4 looks on a listener for both
        return any(address in network for network in self._networks)
