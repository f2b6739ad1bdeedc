"""A device listener in a process of its own, for tests; it ends with its standard input.

    python echo_listener.py [P12 PASSWORD]

It prints its port. /echo answers with the body, /digest with the body's SHA-256, /model with MODEL bytes.
"""

from __future__ import annotations

import hashlib
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twisted.internet import reactor, stdio
from twisted.internet.protocol import Protocol
from twisted.protocols.tls import TLSMemoryBIOFactory

from fedcore.errors import FedcoreError
from fedcore.net import tls
from fedcore.net.device_http import DeviceSite
from fedcore.net.routes import Limits, Response, text_response

LIMIT = 24 << 20
MODEL = 32 << 20
SUITE = "ECDHE-ECDSA-AES128-GCM-SHA256"
_MODEL_BYTES = bytes(range(256)) * (MODEL // 256)


class Room:
    def __init__(self, length: int) -> None:
        self.buffer = memoryview(bytearray(length))
        self.length = 0


class Echo:
    """Every route."""

    def __init__(self, name: str) -> None:
        self.name = name

    def limit(self) -> int:
        return LIMIT

    def sink(self, length: int) -> Room:
        return Room(length)

    def discard(self, sink: Room) -> None:
        pass

    async def handle(self, sink: Room) -> Response:
        body = sink.buffer[: sink.length]
        if self.name == "model":
            return Response((b"head", _MODEL_BYTES))
        return Response((hashlib.sha256(body).digest() if self.name == "digest" else bytes(body),))


class Pages:
    def empty_body(self) -> Response:
        return text_response(500, "empty")

    def not_found(self) -> Response:
        return text_response(404, "nothing here")

    def too_many(self) -> Response:
        return text_response(200, "too many")

    def error(self, error: BaseException) -> Response:
        return text_response(error.http_status if isinstance(error, FedcoreError) else 500, str(error))


class UntilTheEnd(Protocol):
    def connectionLost(self, reason: Any = None) -> None:
        reactor.callWhenRunning(reactor.stop)  # type: ignore[attr-defined]


def main() -> None:
    routes = {f"/{name}".encode(): Echo(name) for name in ("echo", "digest", "model")}
    site: Any = DeviceSite(routes, Pages(), Limits(), 200, reactor)  # type: ignore[arg-type]
    if len(sys.argv) > 1:
        p12, password = Path(sys.argv[1]), sys.argv[2].encode()
        sources = tls.Sources(
            p12, p12, p12, None, SUITE, lambda: password, lambda: password, http=tls.HttpListener()
        )
        material = tls.make(sources, lambda: datetime.now(UTC), lambda sentence: None)
        context = tls.Links(material, reactor.seconds).http  # type: ignore[attr-defined]
        site = TLSMemoryBIOFactory(context, False, site)
    port = reactor.listenTCP(0, site, interface="127.0.0.1")  # type: ignore[attr-defined]
    stdio.StandardIO(UntilTheEnd())
    print(port.getHost().port, flush=True)
    reactor.run()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
