"""Good inputs of every target, small and the same every time; what was once a finding lies in seeds/ as a file."""

from __future__ import annotations

import base64
import io
import json
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, pkcs12
from unit.ledger.histories import MODEL, SHAPE, Device, body_of, read
from unit.ledger.tracing import Tracing
from unit.wire.samples import MESSAGES, full

from fedcore.config import Settings, hyper_parameters
from fedcore.ledger.decoding import Decoder
from fedcore.ledger.layout import Epoch, partial_head
from fedcore.ledger.ledger import Ledger
from fedcore.models.formats import write_ckpt, write_model
from fedcore.pki.authority import (
    Issued,
    Role,
    issue,
    issue_device,
    make_authority,
    make_device_authority,
    revocation_list,
)
from fedcore.wire import codec, node, node_messages
from fedcore.wire.messages import RequestUpdateModel
from fedcore.wire.node_messages import (
    Done,
    PartialOffer,
    ReadPartial,
    SealPartials,
    TakeLedger,
    offer_of,
    pack,
)

SHAPES = (SHAPE, replace(SHAPE, slots=0))  # of a server's own ledger, and of the copy of another one's
NOW = datetime(2026, 6, 1, tzinfo=UTC)
PASSWORD = b"secret"
EPOCH = Epoch("instance", 3, "3" * 64)
HYPER = hyper_parameters(Settings())
ZEROS = np.zeros(max(weight.size for weight in MODEL), np.float32)
TABLES: list[type] = MESSAGES
NODE_MESSAGES: list[type] = [
    getattr(node_messages, name)
    for name in (
        "LocateLedger",
        "Located",
        "SealPartials",
        "PartialOffer",
        "ReadPartial",
        "TakeLedger",
        "OfferModel",
        "DescribeModel",
        "ModelOffer",
        "ReadModel",
        "Done",
    )
]
KINDS = (SealPartials, ReadPartial, TakeLedger, Done)
FORMATS = (".safetensors", ".ckpt", ".npz")
HTTP_WORDS = (
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b": ",
    b"Content-Length: 5\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Expect: 100-continue\r\n",
    b"Upgrade: h2c\r\n",
    b" HTTP/1.1",
    b"HTTP/2.0",
    b"GET ",
    b"CONNECT ",
    b"%00%2e%ff",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b";ext=1",
    b"\0",
)
PROXY_WORDS = (
    b"PROXY TCP4 ",
    b"PROXY TCP6 ",
    b"PROXY UNKNOWN\r\n",
    b"\r\n\r\n\0\r\nQUIT\n",
    b"\x21\x11\x00\x0c",
    b"\x21\x21\x00\x24",
    b"\x20\x00\x00\x00",
    b"255.255.255.255",
    b"::ffff:1.2.3.4",
    b" 65536\r\n",
)
JSON_WORDS = (
    b"[" * 40,
    b'{"',
    b"NaN",
    b"1e999",
    b"-0",
    b'"\\ud800"',
    b"null",
    b"9" * 400,
    b"\xef\xbb\xbf",
    b'":',
)


DER_WORDS = (
    b"\x30\x82\xff\xff",
    b"\x30\x80",
    b"\x02\x01\x00",
    b"\x05\x00",
    b"\x06\x03\x55\x04\x03",
    b"\x06\x03\x55\x1d\x13",
    b"\x17\x0d9913319999999",
    b"\x03\x02\x07\x80",
    b"\x0c\x00",
    b"-----BEGIN CERTIFICATE-----\n",
    b"-----END X509 CRL-----\n",
)


@cache
def authority() -> Issued:
    """An authority of nodes; its keys are others in each process, which findings do not depend on."""
    return make_authority("CA", NOW)


@cache
def device() -> Any:
    """A device with its chain: attestation, equipment, equipment CA, root."""
    root, maker = make_device_authority("Example", NOW)
    return issue_device(root.certificate, maker, "device-1", NOW)


def certificates() -> Sequence[bytes]:
    return [bytes([i]) + one.public_bytes(Encoding.DER) for i, one in enumerate(device().chain[:3])]


@cache
def pki_files() -> Sequence[bytes]:
    server = issue(authority(), Role.SERVER, "server", NOW, hosts=["127.0.0.1"])
    quick = (
        PrivateFormat.PKCS12.encryption_builder()
        .kdf_rounds(1)
        .key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
        .hmac_hash(hashes.SHA256())
        .build(PASSWORD)
    )
    p12 = pkcs12.serialize_key_and_certificates(b"server", server.key, server.certificate, None, quick)
    plain = pkcs12.serialize_key_and_certificates(None, server.key, server.certificate, None, NoEncryption())
    pem = authority().certificate_pem()
    crl = revocation_list(authority(), [], NOW, number=1)
    return [b"\0" + p12, b"\0" + plain, b"\1" + pem, b"\1" + pem * 2, b"\2" + crl]


def heads() -> Sequence[bytes]:
    return [
        b"POST /startFLJob HTTP/1.1\r\nHost: fl:6666\r\nContent-Type: applicatiom/json;charset=utf-8\r\n"
        b"Content-Length: 120\r\nAccept-Encoding: gzip\r\nUser-Agent: okhttp/3.14\r\n\r\n",
        b"POST /p/updateModel?x=1#y HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n",
        b"GET http://h:1/getModel%2f HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        b"PUT / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade, close\r\n\r\n",
    ]


def chunks() -> Sequence[bytes]:
    return [
        b"\x07" + b"5\r\nhello\r\n3;a=b\r\nyou\r\n0\r\nTrailer: x\r\n\r\n",
        b"\xff" + b"400\r\n" + bytes(1024) + b"\r\n0\r\n\r\nPOST / HTTP/1.1\r\n\r\n",
        b"\x00" + b"1\r\na\r\n" * 20 + b"0\r\n\r\n",
    ]


def streams() -> Sequence[bytes]:
    post = b"POST /echo HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello"
    chunked = b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    return [post, post * 3, chunked, b"GET /nothing HTTP/1.1\r\n\r\n" + post, post[:-2], *heads()]


def proxies() -> Sequence[bytes]:
    signature = b"\r\n\r\n\0\r\nQUIT\n"
    four = bytes([192, 0, 2, 1, 192, 0, 2, 2]) + struct.pack(">HH", 4000, 6666)
    six = bytes(range(32)) + struct.pack(">HH", 4000, 6666)
    return [
        b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 6666\r\nPOST",
        b"PROXY TCP6 2001:db8::1 2001:db8::2 4000 6666\r\n",
        b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n",
        signature + b"\x21\x11" + struct.pack(">H", len(four) + 7) + four + b"\x04\x00\x04abcd",
        signature + b"\x21\x21" + struct.pack(">H", len(six)) + six,
        signature + b"\x20\x00\x00\x00",
    ]


def operator_bodies() -> Sequence[bytes]:
    return [json.dumps(HYPER).encode(), b'{"start_fl_job_threshold": 20, "update_model_ratio": 0.5}', b"{}"]


def tables() -> Sequence[bytes]:
    whole = [bytes([i]) + codec.encode(full(message)) for i, message in enumerate(TABLES)]
    update = bytes([TABLES.index(RequestUpdateModel)])
    devices = [Device(f"device-{i}", i, form=form) for i in range(4) for form in Decoder]
    return [*whole, *(update + body_of(device) for device in devices)]


def frames() -> Sequence[bytes]:
    found = []
    for i, (kind, message) in enumerate(zip(KINDS, node_messages_of(), strict=True)):
        meta = node.Meta(
            100 + NODE_MESSAGES.index(kind),
            7,
            send_node="127.0.0.1:1::2::3",
            recv_node="x",
            response_error="",
        )
        begin, data = node.encode(node.Frame(node.PayloadKind.RAW, meta, message))
        found.append(bytes([200 - 60 * (i % 4)]) + (begin + bytes(data)) * (1 + i % 2))
    sums = node.CollectiveMeta(True, "a", "b", 1, b"w", b"p", 1, 1)
    for cmd, payload in (
        (node.Command.SERVER_BROADCAST_EVENT, b"\x10\x05\x1a\x03abc"),
        (node.Command.BROADCAST_MODEL_WEIGHT, _proto_model()),
        (node.Command.ROUND_REQUEST, tables()[0]),
    ):
        meta = node.Meta(cmd, 2**63, node.NodeRole.WORKER, 1, 9, collective_meta=sums)
        begin, data = node.encode(node.Frame(node.PayloadKind.PROTOBUF, meta, payload))
        found.append(b"\xff" + begin + bytes(data))
    return found


def _proto_model() -> bytes:
    param = node.ProtoParam("w", bytes(16), (2, 2), "float32", True)
    return node.encode_model(node.ProtoModel("job", "i_1", 4, 0, (param,)))


def node_messages_of() -> list[bytes]:
    head = partial_head(SHAPE, "ab" * 16, 3)
    return [
        pack(SealPartials("i_1", 3, 1)),
        pack(ReadPartial("i_1", 3, 1, "ab" * 16, 0, 1 << 20)),
        pack(TakeLedger("i_1", 3, 1, "ab" * 16, 2, base64.b64encode(head).decode(), 4096, 8192)),
        pack(Done()),
    ]


def node_messages_seeds() -> Sequence[bytes]:
    head = partial_head(SHAPE, "ab" * 16, 3)
    offers = node_messages.pack_offers([offer_of("ab" * 16, 2, head, 4096, 8192)])
    plain = zip(KINDS, node_messages_of(), strict=True)
    return [
        *(bytes([NODE_MESSAGES.index(kind)]) + text for kind, text in plain),
        bytes([NODE_MESSAGES.index(PartialOffer)]) + offers,
    ]


@cache
def ledgers() -> Sequence[bytes]:
    """Ledgers of one epoch: empty, with updates received, accepted and merged; once as it is, once to be repaired."""
    storage = Tracing(SHAPE.size)
    ledger = Ledger.create(storage, MODEL, SHAPE)
    ledger.begin(EPOCH)
    found = [bytes(storage.content)]
    for i in range(3):
        slot = ledger.receive()
        assert slot is not None
        form = Decoder(i)
        body = body_of(Device(f"device-{i}", i, form=form))
        slot.buffer[: len(body)] = body
        slot.length = len(body)
        ledger.record(slot, f"device-{i}", 0.5, 0.5, form)
        if i < 2:
            ledger.accept(slot, read(slot.body, 7, 3, form))
        found.append(bytes(storage.content))
    ledger.merge()
    found.append(bytes(storage.content))
    return [mark + content for content in found for mark in (b"\0", b"\1")]


@cache
def models() -> Sequence[bytes]:
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.bias": np.float32(3.0).reshape(())}
    with tempfile.TemporaryDirectory() as folder:
        tensors, ckpt = Path(folder) / "m.safetensors", Path(folder) / "m.ckpt"
        write_model(tensors, weights, {"b.bias"}, {"k": "v"})
        write_ckpt(ckpt, weights)
        archive = io.BytesIO()
        np.savez(archive, **weights)
        return [b"\0" + tensors.read_bytes(), b"\1" + ckpt.read_bytes(), b"\2" + archive.getvalue()]
