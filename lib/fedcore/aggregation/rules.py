"""The rules that there are, by the names that the configuration knows; ``rule`` says what a rule is."""

from __future__ import annotations

from fedcore.aggregation.fedavg import FedAvg
from fedcore.aggregation.fednova import FedNova
from fedcore.aggregation.rule import Rule
from fedcore.aggregation.scaffold import Scaffold
from fedcore.errors import LocalError


def rule_named(name: str, total_client_num: int = 1) -> Rule:
    """Return a rule.

    Args:
        name: ``FedAvg``, ``FedProx``, ``Scaffold`` or ``FedNova``.
        total_client_num: clients in the whole population, >= 1; used by Scaffold.
    """
    match name:
        case "FedAvg" | "FedProx":
            return FedAvg()
        case "Scaffold":
            return Scaffold(total_client_num)
        case "FedNova":
            return FedNova()
    raise LocalError(f"there is no aggregation rule {name!r}")
