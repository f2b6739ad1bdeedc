"""A server of answers written beforehand, and the answers: for tests of device clients."""

from __future__ import annotations

import contextlib
import http.server
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from fedcore.wire.codec import encode
from fedcore.wire.messages import (
    CipherPublicParams,
    FeatureMap,
    FLPlan,
    ResponseFLJob,
    ResponseGetModel,
    ResponseUpdateModel,
)

MODEL = {"b.bias": np.array([0.5, -0.5], np.float32), "a.weight": np.array([1, 2, 3], np.float32)}
SAFEMODE = b"The cluster is in safemode."
NOT_READY = b"The server's training job is not ready."
OVER = b"The server's training job is disabled or finished."
INNER = b"An inner error occurred"


def feature_map(weights=MODEL):
    return tuple(FeatureMap(name, values) for name, values in weights.items())


def plan(**changes: Any) -> FLPlan:
    usual = {
        "server_mode": "FEDERATED_LEARNING",
        "fl_name": "job",
        "iterations": 3,
        "epochs": 2,
        "mini_batch": 16,
        "lr": 0.25,
        "cipher": CipherPublicParams("NOT_ENCRYPT"),
    }
    return FLPlan(**(usual | changes))


def started(iteration=1, **changes: Any) -> bytes:
    usual = {
        "retcode": 200,
        "reason": "success",
        "iteration": iteration,
        "is_selected": True,
        "next_req_time": "",
        "fl_plan_config": plan(),
        "feature_map": feature_map(),
    }
    return encode(ResponseFLJob(**(usual | changes)))


def not_started(next_req_time: str | None, iteration=1, retcode=300, **changes: Any) -> bytes:
    usual = {"reason": "full", "feature_map": (), "fl_plan_config": plan()}
    reply = usual | {"retcode": retcode, "iteration": iteration, "next_req_time": next_req_time} | changes
    return encode(ResponseFLJob(**reply))


def updated(retcode=200, next_req_time: str | None = "", reason="success not ready") -> bytes:
    return encode(ResponseUpdateModel(retcode=retcode, reason=reason, next_req_time=next_req_time))


def model(retcode=200, timestamp: str | None = "", weights=MODEL, **changes: Any) -> bytes:
    usual = {"retcode": retcode, "reason": "", "iteration": 1, "timestamp": timestamp}
    maps = {"feature_map": feature_map(weights) if retcode == 200 else ()}
    return encode(ResponseGetModel(**(usual | maps | changes)))


class Script:
    """Answers a fixed list, one after the other, to whoever asks; remembers (round, body).

    An answer is a body, a (status, body) pair, or an exception to raise.
    """

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, bytes]] = []

    def __call__(self, round_: str, body: bytes) -> tuple[int, bytes]:
        self.asked.append((round_, body))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, tuple) else (200, answer)

    post = __call__  # as the http of a StrictDevice

    @property
    def rounds(self) -> list[str]:
        return [round_ for round_, _ in self.asked]


class ScriptedServer:
    """Serves ``answer(path, headers, body)`` -> (status, headers, body) on a free loopback port, in a thread.

    None as an answer closes the connection without a word; ``hang`` as a status waits for the server's end.
    """

    hang = -1

    def __init__(self, answer: Callable[..., Any], tls: ssl.SSLContext | None = None) -> None:
        outer = self
        self.closing = threading.Event()
        self.asked = threading.Event()
        self.connections = 0
        self._sockets: list[socket.socket] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                outer.connections += 1
                outer._sockets.append(self.request)
                super().setup()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.asked.set()
                reply = answer(self.path, self.headers, body)
                if reply is None:
                    self.close_connection = True
                    return
                status, headers, content = reply
                if status == outer.hang:
                    outer.closing.wait(60)
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    if value is not None:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                pass  # broken connections are what some tests are about

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def drop_connections(self) -> None:
        """Close the kept connections, as a server does with idle ones."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self.drop_connections()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
