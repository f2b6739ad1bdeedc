"""Faults put into the simulated shell on purpose: does the simulator find them? Run by hand, from the folder tests.

    python -m model.mutations [SECONDS [NAME]]      each mutation, or those whose name has NAME, for so long at most

A mutation is a replacement in the source of ``model.simulated_server`` or ``model.cluster``. Each runs in a process of
its own, so nothing of it stays. Those in HARMLESS are not expected to be found; the reason stands beside them.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import time
import types
from typing import NamedTuple


class Mutation(NamedTuple):
    """A fault: in ``module`` each ``text`` becomes ``fault``."""

    module: str
    text: str
    fault: str


SERVER, STATE = "model.simulated_server", "model.cluster"
MUTATIONS = {
    "doubt ignored": Mutation(
        SERVER, "if now >= self.doubt_until:\n            self.oth", "if True:\n            self.oth"
    ),
    "silent peers not waited for": Mutation(SERVER, "(uncounted or silent & set(everybody))", "uncounted"),
    "uncounted ledgers not waited for": Mutation(
        SERVER, "(uncounted or silent & set(everybody))", "silent & set(everybody)"
    ),
    "below the quorum is final": Mutation(
        SERVER, "if not self.is_short((instance, number, now.attempt)) or everybody:", "if False:"
    ),
    "quorum of seal.lua ignored": Mutation(STATE, "or len(self.uploads.get(number, ())) < quorum", ""),
    "own_ledger compares nothing": Mutation(
        STATE, 'if self.owners.get(ledger_id, "") not in (before, node_id):', "if False:"
    ),
    "rebase does not end the iteration": Mutation(
        STATE, "if not self.clients.get(number) and status.phase is Phase.COLLECTING:", "if True:"
    ),
    "claim while collecting": Mutation(
        STATE, "s.phase is Phase.COLLECTING or s.token != token", "s.token != token"
    ),
    "token of claims ignored": Mutation(
        STATE, "s.phase is Phase.COLLECTING or s.token != token", "s.phase is Phase.COLLECTING"
    ),
    "record_model counts nothing": Mutation(
        STATE, "if len(self.uploads.get(number, {})) != updates:", "if False:"
    ),
    "instance of uploads ignored": Mutation(STATE, 'return self.name not in ("", instance)', "return False"),
    "restore while a candidate stands": Mutation(
        STATE, "status.number != number or made:", "status.number != number:"
    ),
    "an old look is used": Mutation(
        SERVER,
        "if seen is not None and not self.busy and cluster is self.cluster:",
        "if seen is not None and cluster is self.cluster:",
    ),
    "attempt of UploadCounted ignored": Mutation(
        SERVER,
        "core.UploadCounted(number, attempt, count)",
        "core.UploadCounted(number, self.iteration.attempt, count)",
    ),
    "Resume not done": Mutation(
        SERVER,
        "                self.resume(attempt)\n                self.awaken",
        "                self.awaken",
    ),
    "rebased ignored": Mutation(
        SERVER,
        "        again, self.opened = self",
        "        if self.opened == effect.number:\n            return\n        again, self.opened = self",
    ),
    "sum not compared with what was counted": Mutation(
        SERVER, "        have = total.partials\n", "        return None\n"
    ),
    "judge's clock kept over a loss": Mutation(SERVER, "self.forget_missed()", "pass"),
    "judge does not wait": Mutation(
        SERVER, "self.world.now - since >= LOSS_S", "self.world.now - since >= 3.0"
    ),
    "adopted partial tells nothing": Mutation(
        SERVER, "await self.tell_again(instance, epoch, partial)", "pass"
    ),
    "adopted ledgers not claimed again": Mutation(
        SERVER,
        'await ask("own_ledger", instance, ledger_id, self.name, self.former.get(ledger_id, ""))',
        "pass",
    ),
    "verdict dropped while busy": Mutation(
        SERVER, "if lost and cluster is self.cluster:", "if lost and not self.busy:"
    ),
    "fence not kept over a wipe": Mutation(SERVER, "            self.fence,\n", "            0,\n"),
    "late open serves twice": Mutation(
        SERVER, "and number == self.iteration.number and not self.busy:", "and True:"
    ),
    "the ledger is not put on record again": Mutation(
        SERVER, "await self.remind()\n            if owner", "return\n            if owner"
    ),
    "a server that comes back to an instance says nothing": Mutation(
        SERVER, "        if back:\n            await self.remind()\n", ""
    ),
    "a server that comes back to an iteration begins anew": Mutation(
        SERVER, "self.own is self.begun_in and self.intake_epoch == self.epoch()", "False"
    ),
    "places are not brought back": Mutation(SERVER, 'await restore("", self.places)', "pass"),
    "a peer that is replaced is waited for": Mutation(
        SERVER,
        "        except Replaced:\n            return []  # the",
        "        except KeyError:\n            return []  # the",
    ),
    "seal does not wait for open questions": Mutation(
        SERVER, "not self.asking.isdisjoint(questions)", "False"
    ),
    "stopped ledgers adopted anew in the old epoch": Mutation(
        SERVER, "if file.epoch != epoch:\n            if", "if file.epoch is None:\n            if"
    ),
}
HARMLESS = {
    "uncounted ledgers not waited for": "who offers one has seen the seal: the quorum is missed, and that waits",
    "attempt of UploadCounted ignored": "seal.lua counts anew, and its refusal brings a fresh look",
    "verdict dropped while busy": "the judge repeats it each second; only time is lost",
    "late open serves twice": "the model is in front once before the next await, and catch_up compares again",
    "an old look is used": "each effect of it is a compare-and-set that fails, followed by a fresh look",
}


def mutate(mutation: Mutation) -> None:
    """Load a module with a fault in it, in this process."""
    module = importlib.import_module(mutation.module)
    source = inspect.getsource(module)
    if mutation.text not in source:
        raise SystemExit(f"{mutation.module} has no {mutation.text!r} any more")
    mutant = types.ModuleType(mutation.module)
    mutant.__file__ = module.__file__
    sys.modules[mutation.module] = mutant
    exec(
        compile(source.replace(mutation.text, mutation.fault), str(module.__file__), "exec"), mutant.__dict__
    )


def hunt(name: str, seconds: float) -> str:
    """Play histories with a mutation until one fails; tell what was found and when, "" if nothing."""
    mutate(MUTATIONS[name])
    simulation = importlib.import_module("model.simulation")
    begun, seed = time.process_time(), 0
    while time.process_time() - begun < seconds:
        try:
            simulation.Simulation(seed).play()
        except Exception as failure:
            passed = time.process_time() - begun
            return f"{passed:4.0f} s, seed {seed}: {type(failure).__name__}: {str(failure)[:90]}"
        seed += 1
    return ""


def main() -> None:
    """Try all, or play the part of one."""
    if sys.argv[1:2] == ["--one"]:
        print(hunt(sys.argv[2], float(sys.argv[3])))
        return
    seconds, part = (sys.argv[1:2] or ["60"])[0], (sys.argv[2:3] or [""])[0]
    for name in MUTATIONS:
        if part in name:
            command = [sys.executable, "-m", "model.mutations", "--one", name, seconds]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            print(f"{name:42} {found or 'not found. ' + HARMLESS.get(name, '!')}", flush=True)


if __name__ == "__main__":
    main()
