"""The rules as their papers write them, and what their clients upload: one client and one line after another.

Nothing here knows of sums, partials or data sizes on the wire: the rules' formulas are computed from what clients
hold, in float64. What they upload is computed as clients do, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedcore.wire.arrays import Floats

Model = Mapping[str, np.ndarray]


@dataclass
class Client:
    """A client after its training.

    Attributes:
        weights: name -> float32[n] after training; those that are missing it neither trained nor sends.
        data_size: n_i.
        steps: tau_i.
        control_moves: name -> float32[n], c_i+ - c_i.
    """

    weights: dict[str, Floats]
    data_size: int = 1
    steps: int = 1
    control_moves: dict[str, Floats] = field(default_factory=dict)


# ---- what they upload: name -> float32[n], and the data size that they tell


def upload_fedavg(client: Client, model: Model) -> tuple[dict[str, Floats], int]:
    return {name: w * np.float32(client.data_size) for name, w in client.weights.items()}, client.data_size


def upload_scaffold(client: Client, model: Model) -> tuple[dict[str, Floats], int]:
    weights, size = upload_fedavg(client, model)
    return weights | {f"control.{name}": move for name, move in client.control_moves.items()}, size


def upload_fednova(client: Client, model: Model) -> tuple[dict[str, Floats], int]:
    tau = np.float32(client.steps)
    return {name: (w - model[name]) / tau for name, w in client.weights.items()}, client.steps


# ---- what the server makes of it


def fedavg(clients: Sequence[Client], model: Model) -> dict[str, np.ndarray]:
    """McMahan et al., algorithm 1: w <- sum over S of n_k/n w_k, with S those who sent the weight."""
    new = {name: w.astype(np.float64) for name, w in model.items()}
    for name in model:
        senders = [client for client in clients if name in client.weights]
        n = sum(client.data_size for client in senders)
        if senders:
            new[name] = np.zeros(model[name].shape)
        for client in senders:
            new[name] = new[name] + client.data_size / n * client.weights[name].astype(np.float64)
    return new


def scaffold(clients: Sequence[Client], model: Model, population: int) -> dict[str, np.ndarray]:
    """Karimireddy et al., algorithm 1: c <- c + |S|/N dc, with dc the mean of c_i+ - c_i over S."""
    new = fedavg(clients, model)
    for name in model:
        if name.startswith("control."):
            continue
        participants = len(clients)
        dc = np.zeros(model[name].shape)
        for client in clients:
            if name in client.control_moves:
                dc = dc + client.control_moves[name].astype(np.float64) / participants
        control = model[f"control.{name}"].astype(np.float64)
        new[f"control.{name}"] = control + participants / population * dc
    return new


def fednova(clients: Sequence[Client], model: Model) -> dict[str, np.ndarray]:
    """Wang et al., section 5: x <- x - tau_eff sum p_i eta d_i with tau_eff = sum p_i tau_i.

    The client's move x_i - x is -eta tau_i d_i; a client that did not train a weight has moved it by nothing.
    """
    p = [1 / len(clients) for _ in clients]
    tau = [client.steps for client in clients]
    tau_eff = sum(p[i] * tau[i] for i in range(len(clients)))
    new = {}
    for name in model:
        x = model[name].astype(np.float64)
        step = np.zeros(x.shape)
        for i, client in enumerate(clients):
            x_i = client.weights.get(name, model[name]).astype(np.float64)
            eta_d_i = -(x_i - x) / tau[i]
            step = step + p[i] * eta_d_i
        new[name] = x - tau_eff * step
    return new
