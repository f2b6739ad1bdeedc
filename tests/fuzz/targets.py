"""What reads strangers' bytes, and which exceptions it may answer with; any other one is a finding.

A target is called with one input. It makes of it what the daemons would: what was read is also used, as far as that
happens before anybody has proved who he is.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from cryptography import x509
from fuzz import samples
from fuzz.samples import EPOCH, MODEL, NODE_MESSAGES, TABLES
from unit.ledger.histories import read as read_update
from unit.ledger.histories import reading_of
from unit.ledger.tracing import Held
from unit.net.rig import Rig

from fedcore.aggregation.bounds import Sent, distance
from fedcore.config.hyper import BadRequest, merge
from fedcore.core.admission import data_size_fault
from fedcore.errors import ArrayError, ConfigError, MalformedRequest, PeerError
from fedcore.identity import pem as identity_pem
from fedcore.identity.chain import Anchors, Chain, signing_key
from fedcore.identity.pem import Untrusted
from fedcore.identity.revocation import Revocations
from fedcore.ledger import layout
from fedcore.ledger.decoding import Decoder
from fedcore.ledger.layout import Damaged
from fedcore.ledger.ledger import Ledger
from fedcore.models.formats import read_model
from fedcore.net.http_head import ChunkedBody, HeadFault, RequestHead, parse_head
from fedcore.net.parties import party_of
from fedcore.net.proxy import read_header
from fedcore.net.tls import files
from fedcore.pki.revocation import read_lists
from fedcore.services.operator_api import Body, Refusal, requested_values
from fedcore.services.update_forms import weights_of
from fedcore.wire import codec, node
from fedcore.wire.arrays import check_update
from fedcore.wire.messages import RequestFLJob, RequestUpdateModel
from fedcore.wire.node_messages import PartialOffer, unpack, unpack_offers

SEEDS = Path(__file__).with_name("seeds")


@dataclass(frozen=True)
class Target:
    """One reader of bytes.

    Attributes:
        name: of the target and its folder of seeds.
        run: reads one input.
        allowed: exceptions that are answers.
        made: seeds that are made, beside those in files.
        words: bytes that mean something here.
        share: how many inputs it gets, compared with the others.
    """

    name: str
    run: Callable[[bytes], Any]
    allowed: tuple[type[Exception], ...]
    made: Callable[[], Sequence[bytes]] = tuple
    words: Sequence[bytes] = ()
    share: float = 1.0

    @property
    def seeds(self) -> list[bytes]:
        """Return the good inputs, and the bad ones that were findings."""
        files = sorted((SEEDS / self.name).glob("*.bin"))
        return [*self.made(), *(file.read_bytes() for file in files)]


# ---- HTTP


def head(data: bytes) -> None:
    """A request's head, once its end is there."""
    end = data.find(b"\r\n\r\n")
    found = parse_head.__wrapped__(data if end < 0 else data[: end + 4])
    assert isinstance(found, RequestHead | HeadFault)
    if isinstance(found, RequestHead):
        assert found.length >= 0


def chunks(data: bytes) -> None:
    """A body in chunks, in pieces of the size that the first byte says."""
    buffer = bytearray(4096)
    body = ChunkedBody(memoryview(buffer), 4096)
    step = 1 + data[0] if data else 1
    for start in range(1, len(data), step):
        body.feed(data[start : start + step])
        assert body.length <= 4096
        if body.complete:
            return


@cache
def _rig() -> Rig:
    rig = Rig(max_connections=4)
    rig.__enter__()
    return rig


def stream(data: bytes) -> None:
    """A whole connection of a device, in memory; what fails inside would be logged."""
    rig = _rig()
    peer = rig.connect()
    half = len(data) // 2
    peer.send(data[:half], data[half:]).end()
    rig.reactor.advance(100.0)
    peer.pump()
    rig.peers.clear()
    rig.route.handled.clear()
    rig.route.handed.clear()
    rig.route.discarded.clear()
    assert not rig.failures, rig.failures
    assert not rig.site.connections


def proxy(data: bytes) -> None:
    """The header of a load balancer."""
    found = read_header(data)
    if found is not None:
        assert found.length <= len(data)
        if found.host is not None:
            party_of(found.host)


def operator_body(data: bytes) -> None:
    """What newInstance sends."""
    merge(samples.HYPER, requested_values(Body(len(data), data)))


# ---- tables


def tables(data: bytes) -> None:
    """A FlatBuffer; the first byte says which table it should be."""
    if not data:
        return
    message = codec.decode(TABLES[data[0] % len(TABLES)], data[1:])
    if isinstance(message, RequestFLJob):
        data_size_fault(message.data_size)
    if isinstance(message, RequestUpdateModel):
        for decoder in (Decoder.SPARSE, Decoder.SIGN):
            _decoded(message, decoder)
        weights = weights_of(message)
        check_update(MODEL, weights)
        aggregated = {name: values for name, values in weights.items() if MODEL.by_name[name].aggregated}
        previous = {weight.name: samples.ZEROS[: weight.size] for weight in MODEL}
        assert math.isfinite(distance(aggregated, previous, lambda name: Sent.PRODUCT, 7))


def _decoded(message: RequestUpdateModel, decoder: Decoder) -> None:
    """An update that is not plain: it is refused, or all that it decodes to is finite."""
    with contextlib.suppress(ArrayError):
        for values in reading_of(message, decoder).weights(65535).values():
            assert np.isfinite(values[0 : values.size]).all()


# ---- between nodes


def frames(data: bytes) -> None:
    """A stream of frames, in pieces of the size that the first byte says, and what is in them."""
    reader = node.FrameReader(1 << 16)
    step = 1 + data[0] if data else 1
    for start in range(1, len(data), step):
        reader.receive(data[start : start + step])
        while (frame := reader.next_frame()) is not None:
            node.encode_meta(node.reply_meta(frame.meta, "no"))
            _payload(frame.meta.cmd, frame.data)


def _payload(cmd: int, data: bytes | memoryview) -> None:
    if cmd == node.Command.SERVER_BROADCAST_EVENT:
        node.decode_broadcast(data)
    elif cmd in (node.Command.BROADCAST_MODEL_WEIGHT, node.Command.GET_MODEL_WEIGHT):
        node.decode_model(data)
    elif cmd >= 100:
        node_message(bytes([(cmd - 100) % len(NODE_MESSAGES)]) + bytes(data))


def node_message(data: bytes) -> None:
    """What servers say to each other; the first byte says what it should be."""
    if not data:
        return
    kind = NODE_MESSAGES[data[0] % len(NODE_MESSAGES)]
    message = unpack(kind, data[1:]) if kind is not PartialOffer else unpack_offers(data[1:])
    for offer in message if isinstance(message, list) else ():
        layout.shape_of(offer.head_bytes())


# ---- files


def ledger(data: bytes) -> None:
    """A ledger after a crash; its checksums are made right again, or damage would end at the first of them."""
    content = bytearray(data[1:])
    if data and data[0] & 3:
        _repair(content)
    storage = Held(content)
    found, pending = Ledger.recover(storage, MODEL, EPOCH)
    if found.shape not in samples.SHAPES:
        return  # whoever adopts a ledger compares first
    counted = {entry.record.fl_id: (7, 3) for entry in pending}
    found.settle(pending, counted, read_update)
    while found.unmerged:
        found.merge()
    found.seal()


def _repair(content: bytearray) -> None:
    """Make the checksums of header, live trailer and entries right."""
    fixed = layout._HEADER.size
    if len(content) < layout.PAGE:
        return
    _sign(content, 0, fixed)
    try:
        _, shape = layout.read_shape(memoryview(content))
        generation = layout.read_generation(memoryview(content))
    except Damaged:
        return
    if max(shape.slots, shape.weights, shape.clients) > 64:
        return
    start = shape.accumulator_at(generation)
    trailer = layout._TRAILER.size
    count = min(int.from_bytes(content[start + 64 : start + 72], "little"), shape.clients)
    sizes = content[start + shape.sizes_at :][: 8 * shape.weights]
    clients = content[start + shape.clients_at :][: layout.CLIENT_SIZE * count]
    total = xxhash.xxh3_64(bytes(content[start : start + trailer]) + bytes(sizes) + bytes(clients))
    content[start + trailer : start + trailer + 8] = total.intdigest().to_bytes(8, "little")
    for slot in range(shape.slots):
        at = shape.entry_at(slot)
        _sign(content, at + layout.PAYLOAD, layout._ENTRY_END - layout.PAYLOAD)


def _sign(content: bytearray, at: int, size: int) -> None:
    checksum = layout.checksum(bytes(content[at : at + size]))
    content[at + size : at + size + 8] = checksum.to_bytes(8, "little")


@cache
def _folder() -> Path:
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if os.access(shared, os.W_OK) else None))


def model(data: bytes) -> None:
    """A model file; the first byte says of which format."""
    if not data:
        return
    path = _folder() / f"{os.getpid()}{samples.FORMATS[data[0] % len(samples.FORMATS)]}"
    path.write_bytes(data[1:])
    read_model(path)


# ---- certificates


def certificate(data: bytes) -> None:
    """One certificate of a device's chain, in DER; the first byte says which. The others are good."""
    if not data:
        return
    shown = [identity_pem.pem_form(one) for one in samples.device().chain[:3]]
    body = base64.encodebytes(data[1:]).decode()
    which = data[0] % 3
    shown[which] = f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n"
    with contextlib.suppress(*identity_pem.UNUSABLE):
        shown[which] = identity_pem.pem_form(x509.load_der_x509_certificate(data[1:]))  # as OpenSSL writes it
    chain = Chain.read(identity_pem.fl_id_of(shown[1]), *shown)
    signing_key(chain, Anchors([samples.device().chain[3]]), Revocations(()), samples.NOW)


def pki_file(data: bytes) -> None:
    """A file of TLS; the first byte says of which kind."""
    if not data:
        return
    path = _folder() / f"{os.getpid()}.pki"
    path.write_bytes(data[1:])
    match data[0] % 3:
        case 0:
            files.read_identity(path, samples.PASSWORD, "server")
        case 1:
            files.read_authorities(path)
        case 2:
            read_lists(data[1:], [samples.authority().certificate], samples.NOW)


TARGETS: dict[str, Target] = {
    each.name: each
    for each in (
        Target("head", head, (), samples.heads, samples.HTTP_WORDS, 3),
        Target("chunks", chunks, (PeerError,), samples.chunks, samples.HTTP_WORDS, 2),
        Target("stream", stream, (), samples.streams, samples.HTTP_WORDS, 0.5),
        Target("proxy", proxy, (PeerError,), samples.proxies, samples.PROXY_WORDS, 2),
        Target(
            "operator_body",
            operator_body,
            (Refusal, BadRequest),
            samples.operator_bodies,
            samples.JSON_WORDS,
            1,
        ),
        Target("tables", tables, (MalformedRequest, ArrayError), samples.tables, (), 5),
        Target("frames", frames, (PeerError, Damaged), samples.frames, samples.JSON_WORDS, 2),
        Target(
            "node_message",
            node_message,
            (PeerError, Damaged),
            samples.node_messages_seeds,
            samples.JSON_WORDS,
            1,
        ),
        Target("ledger", ledger, (Damaged,), samples.ledgers, (), 0.5),
        Target("certificate", certificate, (Untrusted,), samples.certificates, samples.DER_WORDS, 0.5),
        Target("pki_file", pki_file, (ConfigError,), samples.pki_files, samples.DER_WORDS, 0.2),
        Target("model", model, (ConfigError,), samples.models, samples.JSON_WORDS, 0.2),
    )
}
