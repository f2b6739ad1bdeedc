"""The side of those who train: implement a Trainer for a Client, or a SiloTrainer for a CloudWorker."""

from fedclient.client import Client, IterationReport, Summary
from fedclient.cloud import CloudWorker
from fedclient.identity import DeviceIdentity, load_identity
from fedclient.protection import PrivacyOptions
from fedclient.rules import Rule, with_absolute_changes
from fedclient.schedule import Adaptive
from fedclient.session import Policy
from fedclient.silo import LocalStep, SiloTrainer
from fedclient.steps import IterationOutcome, Outcome
from fedclient.trainer import FitConfig, FitResult, Trainer, Weights
from fedclient.transport import HttpTransport, MemoryTransport, Transport

__all__ = [
    "Adaptive",
    "Client",
    "CloudWorker",
    "DeviceIdentity",
    "FitConfig",
    "FitResult",
    "HttpTransport",
    "IterationOutcome",
    "IterationReport",
    "LocalStep",
    "MemoryTransport",
    "Outcome",
    "Policy",
    "PrivacyOptions",
    "Rule",
    "SiloTrainer",
    "Summary",
    "Trainer",
    "Transport",
    "Weights",
    "load_identity",
    "with_absolute_changes",
]
