import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import PeerError
from fedcore.net.http_head import CHUNK_SLACK, ChunkedBody, HeadFault, RequestHead, parse_head


def head(*lines: bytes, first: bytes = b"POST /x HTTP/1.1") -> bytes:
    return b"\r\n".join((first, *lines, b"", b""))


READ = {
    "nothing but a first line": (head(), RequestHead(b"POST", b"/x")),
    "a length": (head(b"Content-Length: 5"), RequestHead(b"POST", b"/x", 5)),
    "a length with zeros and blanks": (head(b"CONTENT-LENGTH:  005 "), RequestHead(b"POST", b"/x", 5)),
    "the longest length": (
        head(b"Content-Length: 18446744073709551615"),
        RequestHead(b"POST", b"/x", 2**64 - 1),
    ),
    "an empty field before": (head(b"A:", b"Content-Length: 5"), RequestHead(b"POST", b"/x", 5)),
    "an underscore is another field": (head(b"Content_Length: 5"), RequestHead(b"POST", b"/x")),
    "chunks": (head(b"Transfer-Encoding: Chunked "), RequestHead(b"POST", b"/x", chunked=True)),
    "close": (head(b"Connection: close"), RequestHead(b"POST", b"/x", keep_alive=False)),
    "close last": (head(b"Connection: Keep-Alive, Close"), RequestHead(b"POST", b"/x", keep_alive=False)),
    "close first": (
        head(b"Connection: close", b"Connection: keep-alive"),
        RequestHead(b"POST", b"/x", keep_alive=False),
    ),
    "close with a body": (
        head(b"Connection: close", b"Content-Length: 1"),
        RequestHead(b"POST", b"/x", 1, keep_alive=False),
    ),
    "1.0": (head(first=b"PUT /x HTTP/1.0"), RequestHead(b"PUT", b"/x", keep_alive=False)),
    "1.0 kept alive": (
        head(b"Connection: keep-alive", first=b"PUT /x HTTP/1.0"),
        RequestHead(b"PUT", b"/x", keep_alive=False),
    ),
    "expectation": (
        head(b"Expect: 100-Continue", b"Content-Length: 1"),
        RequestHead(b"POST", b"/x", 1, expects_continue=True),
    ),
    "expectation in 1.0": (
        head(b"Expect: 100-continue", b"Content-Length: 1", first=b"POST /x HTTP/1.0"),
        RequestHead(b"POST", b"/x", 1, keep_alive=False),
    ),
    "upgrade": (
        head(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 5"),
        RequestHead(b"POST", b"/x", 5),
    ),
    "upgrade with chunks": (
        head(b"Connection: Upgrade", b"Upgrade: h2c", b"Transfer-Encoding: chunked"),
        RequestHead(b"POST", b"/x", chunked=True),
    ),
    "query": (head(first=b"GET /x?y=%31 HTTP/1.1"), RequestHead(b"GET", b"/x")),
    "percent signs": (head(first=b"GET /%78%2Fy HTTP/1.1"), RequestHead(b"GET", b"/x/y")),
    "absolute form": (head(first=b"GET http://h:1/x?y HTTP/1.1"), RequestHead(b"GET", b"/x")),
    "absolute form without a path": (head(first=b"GET http://h HTTP/1.1"), RequestHead(b"GET", b"/")),
    "two slashes": (head(first=b"GET //x HTTP/1.1"), RequestHead(b"GET", b"//x")),
    "asterisk": (head(first=b"GET * HTTP/1.1"), RequestHead(b"GET", b"*")),
    "HEAD": (head(first=b"HEAD /x HTTP/1.1"), RequestHead(b"HEAD", b"/x")),
}

REFUSED = {
    "length and chunks": (400, head(b"Content-Length: 5", b"Transfer-Encoding: chunked")),
    "chunks and length": (400, head(b"Transfer-Encoding: chunked", b"Content-Length: 5")),
    "two lengths": (400, head(b"Content-Length: 5", b"Content-Length: 6")),
    "the same length twice": (400, head(b"Content-Length: 5", b"content-length: 5")),
    "list of lengths": (400, head(b"Content-Length: 5, 5")),
    "sign": (400, head(b"Content-Length: +5")),
    "negative": (400, head(b"Content-Length: -5")),
    "hexadecimal": (400, head(b"Content-Length: 0x5")),
    "underscore in a length": (400, head(b"Content-Length: 1_0")),
    "vertical tab after a length": (400, head(b"Content-Length: 5\x0b")),
    "empty length": (400, head(b"Content-Length:")),
    "length beyond 64 bits": (400, head(b"Content-Length: 18446744073709551616")),
    "folded field": (400, head(b"A: b", b" c", b"Content-Length: 5")),
    "field after a blank": (400, head(b" Content-Length: 5")),
    "blank before the colon": (400, head(b"Content-Length : 5")),
    "bare line feed": (400, head(b"A: b\nContent-Length: 5")),
    "bare line feed in the first line": (400, b"POST /x HTTP/1.1\nContent-Length: 5\r\n\r\n"),
    "bare carriage return": (400, head(b"A: b\rContent-Length: 5")),
    "NUL": (400, head(b"A: \x00")),
    "no colon": (400, head(b"A")),
    "no name": (400, head(b": a")),
    "identity, then chunks": (501, head(b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked")),
    "chunks, then identity": (400, head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity")),
    "packed chunks": (501, head(b"Transfer-Encoding: gzip, chunked")),
    "packed": (400, head(b"Transfer-Encoding: gzip")),
    "nearly chunked": (400, head(b"Transfer-Encoding: xchunked")),
    "chunked with a tail": (400, head(b"Transfer-Encoding: chunked;q=1")),
    "chunks in 1.0": (400, head(b"Transfer-Encoding: chunked", first=b"POST /x HTTP/1.0")),
    "0.9": (505, head(first=b"POST /x")),
    "2.0": (505, head(first=b"POST /x HTTP/2.0")),
    "1.2": (400, head(first=b"POST /x HTTP/1.2")),
    "HTTP/2 preface": (505, head(first=b"PRI * HTTP/2.0")),
    "another protocol": (501, head(first=b"SOURCE /x ICE/1.0")),
    "TLS hello": (400, b"\x16\x03\x01\x02\x00\x01\r\n\r\n"),
    "CONNECT": (501, head(first=b"CONNECT h:80 HTTP/1.1")),
    "OPTIONS": (501, head(first=b"OPTIONS * HTTP/1.1")),
    "PATCH": (501, head(first=b"PATCH /x HTTP/1.1")),
    "unknown method": (400, head(first=b"FOO /x HTTP/1.1")),
    "no path": (400, head(first=b"POST x HTTP/1.1")),
    "blank in the path": (400, head(first=b"POST /x y HTTP/1.1")),
    "beyond ASCII": (400, head(first=b"POST /\xc3\xa4 HTTP/1.1")),
    "nothing": (505, b"\r\n\r\n"),
}


@pytest.mark.parametrize("case", READ)
def test_head_is_read(case: str) -> None:
    data, expected = READ[case]
    assert parse_head(data) == expected


@pytest.mark.parametrize("case", REFUSED)
def test_head_is_refused(case: str) -> None:
    status, data = REFUSED[case]
    fault = parse_head(data)
    assert isinstance(fault, HeadFault)
    assert fault.status == status


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_a_fault(data: bytes) -> None:
    assert isinstance(parse_head(b"POST " + data + b"\r\n\r\n"), RequestHead | HeadFault)
    assert isinstance(parse_head(data + b"\r\n\r\n"), RequestHead | HeadFault)


# ---- chunks


def take(*segments: bytes, limit: int = 20) -> bytes | None:
    """Return the content of a body that arrives in segments, None if it is not complete."""
    buffer = bytearray(limit)
    body = ChunkedBody(memoryview(buffer), limit)
    for segment in segments:
        body.feed(segment)
    return bytes(buffer[: body.length]) if body.complete else None


GOOD_CHUNKS = {
    "one": (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "several": (b"1\r\nh\r\n3\r\nell\r\n1\r\no\r\n0\r\n\r\n", b"hello"),
    "none": (b"0\r\n\r\n", b""),
    "as much as fits": (b"14\r\n" + bytes(20) + b"\r\n0\r\n\r\n", bytes(20)),
    "zeros before the size": (b"0005\r\nhello\r\n000\r\n\r\n", b"hello"),
    "extensions": (b'5;a="b;c"\r\nhello\r\n0;d\r\n\r\n', b"hello"),
    "trailers": (b"5\r\nhello\r\n0\r\nA: b\r\nC: d\r\n\r\n", b"hello"),
    "a request behind": (
        b"5\r\nhello\r\n0\r\n\r\nPOST /x HTTP/1.1\r\nContent-Length: 5\r\n\r\nworld",
        b"hello",
    ),
    "more chunks behind": (b"5\r\nhello\r\n0\r\n\r\n5\r\nworld\r\n0\r\n\r\n", b"hello"),
    "garbage behind": (b"5\r\nhello\r\n0\r\n\r\n\x00\x00", b"hello"),
    "size without an end": (b"5", None),
    "content without an end": (b"5\r\nhello", None),
    "no last chunk": (b"5\r\nhello\r\n", None),
    "no end of trailers": (b"5\r\nhello\r\n0\r\nA: b\r\n", None),
}

BAD_CHUNKS = {
    "no size": b"\r\n",
    "no hexadecimal": b"0x5\r\nhello\r\n0\r\n\r\n",
    "negative": b"-5\r\nhello\r\n0\r\n\r\n",
    "blank before": b" 5\r\nhello\r\n0\r\n\r\n",
    "blank after": b"5 \r\nhello\r\n0\r\n\r\n",
    "bare line feeds": b"5\nhello\n0\n\n",
    "longer than said": b"5\r\nhello!\r\n0\r\n\r\n",
    "no end after the content": b"5\r\nhello0\r\n\r\n",
    "beyond 64 bits": b"10000000000000000\r\n",
    "length in a trailer": b"5\r\nhello\r\n0\r\nContent-Length: 5\r\n\r\n",
    "folded trailer": b"5\r\nhello\r\n0\r\nA: b\r\n c\r\n\r\n",
    "one byte too many": b"15\r\n" + bytes(21) + b"\r\n0\r\n\r\n",
    "too many chunks": b"10\r\n" + bytes(16) + b"\r\n5\r\nhello\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("case", GOOD_CHUNKS)
def test_chunks_are_joined(case: str) -> None:
    data, expected = GOOD_CHUNKS[case]
    assert take(data) == expected
    assert take(*(data[at : at + 1] for at in range(len(data)))) == expected


@pytest.mark.parametrize("case", BAD_CHUNKS)
def test_bad_chunks_are_refused(case: str) -> None:
    data = BAD_CHUNKS[case]
    with pytest.raises(PeerError):
        take(data)
    with pytest.raises(PeerError):
        take(*(data[at : at + 1] for at in range(len(data))))


def test_overflow_is_told_from_bad_chunks() -> None:
    body = ChunkedBody(memoryview(bytearray(4)), 4)
    with pytest.raises(PeerError):
        body.feed(b"5\r\nhello\r\n")
    assert body.overflow
    body = ChunkedBody(memoryview(bytearray(4)), 4)
    with pytest.raises(PeerError):
        body.feed(b"x\r\n")
    assert not body.overflow


@pytest.mark.parametrize(
    ("first", "more"),
    [(b"5;", b"a"), (b"5;a=", b"a"), (b"0\r\nA: ", b"a"), (b"0\r\n", b"A: b\r\n"), (b"", b"0")],
    ids=[
        "name of an extension",
        "value of an extension",
        "value of a trailer",
        "trailers",
        "zeros of a size",
    ],
)
def test_endless_wrapping_is_refused(first: bytes, more: bytes) -> None:
    body = ChunkedBody(memoryview(bytearray(20)), 20)
    body.feed(first + more)
    with pytest.raises(PeerError):
        for _ in range(CHUNK_SLACK // len(more) + 1):
            body.feed(more)


def test_the_smallest_chunks_are_no_endless_wrapping() -> None:
    content = bytes(range(256)) * 40
    assert take(*(b"1\r\n%c\r\n" % byte for byte in content), b"0\r\n\r\n", limit=len(content)) == content


def test_what_follows_a_body_in_chunks_is_never_looked_at() -> None:
    """Not even where the parser has a word of its own for it: an upgrade, a CONNECT."""
    upgrade = b"POST / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    for follows in (upgrade, b"CONNECT h:1 HTTP/1.1\r\n\r\n", b"\0\xff nonsense"):
        assert take(b"2\r\nab\r\n0\r\n\r\n" + follows, limit=9) == b"ab"
