"""How the operators' requests and answers travel: paths, bodies, status lines.

Answers are compact JSON with keys in bytewise order, the reason phrase is ``Client``, and a failure is a 400 typed
text/html, all as MindSpore Federated 0.1 answers. Any method will do. A body is counted but kept only as far as it
could be hyper-parameters; one that is announced too long is refused unread.

What changes the job is for operators only, see ``operator_access``: a request without the right to it gets a 401 or a
403, its body in the same form.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from twisted.internet import defer
from twisted.logger import Logger
from twisted.web import resource, server

from fedcore.errors import StoreUnavailable
from fedcore.net.web import QuietSite
from fedcore.services import operator_api
from fedcore.services.operator_access import Access, Caller, Denial
from fedcore.services.operator_api import BODY_LIMIT, KEPT_BODY, Answer, Body, OperatorApi, Refusal

_JSON = b"application/json"
_HTML = b"text/html; charset=ISO-8859-1"
_BROWSERS = (b"origin", b"sec-fetch-site")  # headers that pages cannot keep a browser from sending
_LINGER_S = 5.0  # for a peer that sends its body to the end before it reads the refusal

_Operation = Callable[[OperatorApi, Body], Awaitable[Answer]]


class _Way(NamedTuple):
    """What a path does, the text if that fails in a way nobody thought of, and whether it changes the job."""

    operation: _Operation
    unforeseen: str
    changes: bool = False


_WAYS: dict[bytes, _Way] = {
    b"state": _Way(lambda api, _: api.state(), operator_api.NO_STATE),
    b"queryInstance": _Way(lambda api, _: api.query_instance(), operator_api.NO_QUERY),
    b"newInstance": _Way(
        lambda api, body: api.new_instance(body), operator_api.NO_NEW_INSTANCE, changes=True
    ),
    b"enableFLS": _Way(lambda api, _: api.enable(), operator_api.NO_ENABLING, changes=True),
    b"disableFLS": _Way(lambda api, _: api.disable(), operator_api.NO_DISABLING, changes=True),
}
_EVERYBODY = Access(loopback=True, unauthenticated=True)


def operator_site(
    api: OperatorApi,
    *,
    integer_code: bool = False,
    access: Access = _EVERYBODY,
    denied: Callable[[str], None] = lambda reason: None,
) -> QuietSite:
    """Build the listener of the scheduler.

    Args:
        api: what the routes do.
        integer_code: write the code as a number, as the published guide does, instead of as a string.
        access: who may change the job; default: everybody.
        denied: told why a request was refused for want of that right.
    """
    good, bad = (_Form(number if integer_code else str(number)) for number in (0, 1))
    root: Any = resource.Resource()
    for path, way in _WAYS.items():
        root.putChild(path, _Route(api, way, good, bad, access, denied))
    return _OperatorSite(root, bad.refusal(operator_api.LONG_BODY))


class _Form:
    """How a body is written: as the original does, with one kind of code."""

    def __init__(self, code: int | str) -> None:
        self._code = code

    def answer(self, answer: Answer) -> bytes:
        """Write an answer.

        Raises:
            ValueError: it is no JSON: not a finite number, or not Unicode.
        """
        values = {"code": self._code, **answer}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()

    def refusal(self, text: str) -> bytes:
        """Write a refusal."""
        return self.answer({"error_message": text})


class _Route(resource.Resource):
    """One path."""

    isLeaf = True
    log = Logger()

    def __init__(
        self,
        api: OperatorApi,
        way: _Way,
        good: _Form,
        bad: _Form,
        access: Access,
        denied: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._api = api
        self._way = way
        self._good = good
        self._bad = bad
        self._access = access
        self._denied = denied

    def render(self, request: _BoundedRequest) -> int:
        if request.postpath:  # a path exactly as given, nothing below it
            request.setResponseCode(404)
            request.finish()
            return server.NOT_DONE_YET
        gone: list[bool] = []
        request.notifyFinish().addErrback(lambda _: gone.append(True))
        defer.Deferred.fromCoroutine(self._serve(request, gone)).addErrback(
            lambda failure: self.log.failure("an operator request failed", failure)
        )
        return server.NOT_DONE_YET

    async def _serve(self, request: _BoundedRequest, gone: list[bool]) -> None:
        denial = self._access.denial(request.caller()) if self._way.changes else None
        if denial is None:
            status, content_type, answer = await self._answer(request.body())
        else:
            status, content_type, answer = self._deny(request, denial)
        if gone:
            return
        request.setResponseCode(status, b"Client")
        request.setHeader(b"Content-Type", content_type)
        request.setHeader(b"Content-Length", b"%d" % len(answer))
        request.write(answer)
        request.finish()

    def _deny(self, request: _BoundedRequest, denial: Denial) -> tuple[int, bytes, bytes]:
        self._denied(denial.reason)
        self.log.warn(
            "an operator request was denied: {reason}",
            reason=denial.reason,
            peer=request.getClientAddress().host,
        )
        if denial.status == 401:
            request.setHeader(b"WWW-Authenticate", b'Bearer realm="fl-schedulerd"')
        return denial.status, _HTML, self._bad.refusal(denial.text)

    async def _answer(self, body: Body) -> tuple[int, bytes, bytes]:
        try:
            return 200, _JSON, self._good.answer(await self._way.operation(self._api, body))
        except Refusal as refusal:
            cause = refusal.__cause__
            if cause is not None and not isinstance(
                cause, StoreUnavailable
            ):  # Redis' failures are in the log
                self.log.warn("an operator was told: {text}", text=str(refusal), cause=str(cause))
            return 400, _HTML, self._bad.refusal(str(refusal))
        except Exception:
            self.log.failure("an operator request failed")
            return 400, _HTML, self._bad.refusal(self._way.unforeseen)


class _BoundedRequest(server.Request):
    """A request that counts its body and keeps no more of it than could be of use."""

    channel: Any
    content: Any
    transport: Any
    _length = 0
    _refused = False
    _closing: Any = None

    def body(self) -> Body:
        """Return what came with the request."""
        return Body(self._length, self.content.read() if self._length <= KEPT_BODY else b"")

    def caller(self) -> Caller:
        """Return what the request says about who sent it."""
        shown = getattr(self.transport, "getPeerCertificate", lambda: None)()
        return Caller(
            self.getHeader(b"authorization"),
            None if shown is None else shown.to_cryptography(),
            any(self.requestHeaders.hasHeader(name) for name in _BROWSERS),
        )

    def gotLength(self, length: int | None) -> None:
        """Judge the announced length before anything is read."""
        self.requestHeaders.removeHeader(b"content-type")  # or twisted.web reads the body as a form
        super().gotLength(0)
        if length is not None and length > BODY_LIMIT:
            self._refuse()

    def handleContentChunk(self, data: bytes) -> None:
        self._length += len(data)
        if self._length <= KEPT_BODY:
            super().handleContentChunk(data)
        elif self._length > BODY_LIMIT:
            self._refuse()

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        if self._refused:
            self.transport.loseConnection()
        else:
            super().requestReceived(command, path, version)

    def connectionLost(self, reason: Any) -> None:
        if self._closing is not None and self._closing.active():
            self._closing.cancel()
        super().connectionLost(reason)

    def _refuse(self) -> None:
        """Answer at once; then hear the peer out for a while, unread, as a reset could overtake the answer."""
        if self._refused:
            return
        self._refused = True
        answer = self.channel.site.long_body
        self.requestHeaders.removeHeader(b"expect")  # no "100 Continue" behind the answer
        self.transport.write(
            b"HTTP/1.1 400 Client\r\nContent-Type: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
            % (_HTML, len(answer), answer)
        )
        self._closing = self.channel.callLater(_LINGER_S, self.transport.loseConnection)


class _OperatorSite(QuietSite):
    """The listener.

    Attributes:
        long_body: answer to a body above BODY_LIMIT.
    """

    requestFactory = _BoundedRequest

    def __init__(self, root: resource.Resource, long_body: bytes) -> None:
        super().__init__(root)
        self.long_body = long_body
