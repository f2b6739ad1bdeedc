"""Fuzzing over sockets: real daemons with a real Redis get damaged bytes on every port that strangers can reach.

    PYTHONPATH=tests python -m fuzz.sockets --inputs 200000

The daemons must live, answer a good request in between and at the end, log no failure, and not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz.mutation import Mutator
from fuzz.targets import TARGETS
from integration.cluster import Cluster

AT_ONCE = 24  # connections
PATIENCE_S = 20.0  # for an answer or the end of a connection, on a machine with other work
BETWEEN = 5000  # inputs between two good requests
GROWTH = 64 << 20  # bytes that a daemon may grow by, after the first inputs
_ROUTES = (b"startFLJob", b"updateModel", b"getModel", b"pushWeight", b"nothing")
_OPERATIONS = (b"state", b"queryInstance", b"newInstance", b"enableFLS", b"disableFLS")


@dataclass
class Port:
    """Where inputs go.

    Attributes:
        name: of the port.
        number: of the port.
        make: gives an input by its number.
    """

    name: str
    number: int
    make: Callable[[int], bytes]


def ports_of(cluster: Cluster, seed: int) -> list[Port]:
    """Return all ports; the devices' one comes twice, for damaged bodies and for damaged HTTP."""
    inputs = {name: Mutator(name, TARGETS[name].seeds, TARGETS[name].words, seed) for name in TARGETS}

    def body(number: int) -> bytes:
        content = inputs["tables"].input(number)[1:]
        path = _ROUTES[number % len(_ROUTES)]
        return b"POST /%s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (path, len(content), content)

    def stream(number: int) -> bytes:
        return inputs["stream"].input(number).replace(b"/echo", b"/" + _ROUTES[number % len(_ROUTES)])

    def operation(number: int) -> bytes:
        if number % 2:
            return inputs["head"].input(number)
        content = inputs["operator_body"].input(number)
        path = _OPERATIONS[number // 2 % 3]  # none that ends the job
        return b"POST /%s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (path, len(content), content)

    return [
        Port("bodies", cluster.http, body),
        Port("HTTP", cluster.http, stream),
        Port("nodes", cluster.tcp, lambda number: inputs["frames"].input(number)[1:]),
        Port("operators", cluster.manage, operation),
    ]


async def send(port: Port, number: int, chance: random.Random) -> bool:
    """Send one input and hear the daemon out; tell whether it came to an end in time."""
    source = (f"127.0.{chance.randrange(1, 250)}.{chance.randrange(1, 250)}", 0)
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port.number, local_addr=source)
            with contextlib.suppress(OSError):  # the daemon may have had enough before we have
                writer.write(port.make(number))
                await writer.drain()
                writer.write_eof()
                while await reader.read(1 << 16):
                    pass
            writer.transport.abort()
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def resident(pid: int) -> int:
    """Return the bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def problems(cluster: Cluster, before: dict[str, int]) -> list[str]:
    """Return what is wrong with the daemons."""
    found = []
    for name in ("server", "scheduler"):
        process, log = cluster.processes[name], cluster.log(name)
        if process.poll() is not None:
            found.append(f"the {name} has ended with {process.returncode}: {log[-3000:]}")
            continue
        if "Traceback" in log:
            found.append(f"the {name} has logged a failure: {log[log.index('Traceback') - 500 :][:4000]}")
        growth = resident(process.pid) - before.get(name, 1 << 60)
        if growth > GROWTH:
            found.append(f"the {name} has grown by {growth >> 20} MiB")
    return found


def run(directory: Path, inputs: int, seed: int, say: Callable[[str], None]) -> list[str]:
    """Start the daemons and send inputs; return what is wrong."""
    fedcore = {"device": {"hold_time": 0.0}, "scheduler": {"unauthenticated": True}}
    with Cluster(directory, fedcore=fedcore, start_fl_job_threshold=50) as cluster:
        cluster.start_redis()
        cluster.start_server()
        cluster.start_scheduler()
        ports, before, began = ports_of(cluster, seed), {}, time.monotonic()
        for first in range(0, inputs, BETWEEN):
            numbers = range(first, min(inputs, first + BETWEEN))
            late = asyncio.run(_send_all(ports, numbers, seed))
            found = problems(cluster, before)
            if late:
                found.append(f"{late} connections without an end within {PATIENCE_S:.0f} s")
            status, _ = cluster.post("/getModel", b"")
            if status != 500:  # an empty body
                found.append(f"a good request is answered by {status}")
            before = before or {
                name: resident(cluster.processes[name].pid) for name in ("server", "scheduler")
            }
            if found:
                return found
            done = numbers[-1] + 1
            say(f"{done:,} inputs, {done / (time.monotonic() - began):,.0f}/s")
        return []


async def _send_all(ports: list[Port], numbers: range, seed: int) -> int:
    todo, late = iter(numbers), 0

    async def worker(which: int) -> None:
        nonlocal late
        chance = random.Random(seed << 40 | numbers[0] << 8 | which)
        for number in todo:
            late += not await send(ports[number % len(ports)], number // len(ports), chance)

    await asyncio.gather(*(worker(which) for which in range(AT_ONCE)))
    return late


def main() -> int:
    """Parse the arguments, run, print; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="fuzz.sockets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), arguments.inputs, arguments.seed, lambda line: print(line, flush=True))
    for each in found:
        print(each)
    print("no findings" if not found else f"{len(found)} findings")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
