"""The device side: implement a Trainer, hand it to a Client."""

from fedclient.client import Client, IterationReport, Summary
from fedclient.session import Policy
from fedclient.steps import IterationOutcome, Outcome
from fedclient.trainer import FitConfig, FitResult, Trainer, Weights
from fedclient.transport import HttpTransport, MemoryTransport, Transport

__all__ = [
    "Client",
    "FitConfig",
    "FitResult",
    "HttpTransport",
    "IterationOutcome",
    "IterationReport",
    "MemoryTransport",
    "Outcome",
    "Policy",
    "Summary",
    "Trainer",
    "Transport",
    "Weights",
]
