"""What the original device does to its weights before they leave it, written down a second time.

``strict_device`` says when a request goes out and what an answer means; here is what is in them: the keys, shares and
masks of PW_ENCRYPT with the original's weaknesses, the noise of DP_ENCRYPT, the positions of SIGNDS, and both forms
of compression. Nothing of fedclient, nor of fedcore but its messages, is used, so that this is a second opinion on
the bytes of either side; the golden vectors bind both.

``Pairwise`` is without I/O: it makes the requests of one iteration, and takes what the answers with 200 hold.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa, x25519
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from fedcore.wire.messages import (
    ClientListSign,
    ClientPublicKeys,
    ClientShare,
    CompressFeatureMap,
    DSParams,
    GetClientList,
    GetExchangeKeys,
    GetShareSecrets,
    PWParams,
    RequestAllClientListSign,
    RequestExchangeKeys,
    RequestShareSecrets,
    ReturnAllClientListSign,
    ReturnClientList,
    ReturnExchangeKeys,
    ReturnShareSecrets,
    SendClientListSign,
    SendReconstructSecret,
)

VALID_INTERVAL_MS = 600_000  # between another device's time stamp and this device's clock
KDF_ROUNDS = 10_000
ERF_STEPS = 10_000
FLOAT_MAX = np.finfo(np.float32).max

Array = npt.NDArray[np.float32]
Weights = Mapping[str, Array]
Random = Callable[[int], bytes]


class Broken(Exception):
    """The original throws an exception here, or gives up its job."""


# ---- who signs


@dataclass(frozen=True)
class KeyStore:
    """What the device's key store holds.

    Attributes:
        key: of the first certificate, RSA-2048.
        chain: PEM of key attestation, equipment, equipment CA and root.
        crl: equipCrlPath. Without it no other device is trusted; with a file that cannot be read each one is.
    """

    key: rsa.RSAPrivateKey
    chain: tuple[str, str, str, str]
    crl: Path | None = None

    def __repr__(self) -> str:
        return f"KeyStore({self.fl_id()})"

    def fl_id(self) -> str:
        return hashlib.sha256(self.chain[1].encode()).hexdigest()

    def sign(self, text: str | bytes) -> bytes:
        """SHA256withRSA/PSS with the salt that is Java's default for it."""
        message = text.encode() if isinstance(text, str) else text
        return self.key.sign(message, _PSS, hashes.SHA256())

    def bare(self) -> tuple[str, str]:
        """Return the first two certificates as exchangeKeys carries them: base64 in one line."""
        first, second = (x509.load_pem_x509_certificate(one.encode()) for one in self.chain[:2])
        return _bare(first), _bare(second)

    def check_keys(self, entry: ClientPublicKeys, iteration: int, now: int) -> None:
        """Verify the keys of a device, perhaps its own.

        Args:
            entry: of the list of keys.
            iteration: this device's.
            now: milliseconds since the epoch.
        """
        attestation, equipment = _two(entry)
        pem = equipment.public_bytes(serialization.Encoding.PEM)
        if hashlib.sha256(pem).hexdigest() != entry.fl_id:
            raise Broken("a device's id is not that of its certificate")
        authority = x509.load_pem_x509_certificate(self.chain[2].encode())
        moment = datetime.fromtimestamp(now / 1000, UTC)
        _check_issued(equipment, authority)
        _check_issued(attestation, equipment)
        for one in (attestation, equipment):
            if not one.not_valid_before_utc <= moment <= one.not_valid_after_utc:
                raise Broken("a certificate is not valid now")
        if authority.subject != equipment.issuer or _authority_key(equipment) != _subject_key(authority):
            raise Broken("a device is of another authority")
        self._check_revoked(equipment, authority)
        signed = (entry.c_pk or b"") + (entry.s_pk or b"") + f"{entry.timestamp}{iteration}".encode()
        _check_signature(attestation, entry.signature, signed)
        if abs(now - int(entry.timestamp or "")) > VALID_INTERVAL_MS:
            raise Broken("keys are too old")

    def _check_revoked(self, equipment: x509.Certificate, authority: x509.Certificate) -> None:
        if self.crl is None:
            raise Broken("equipCrlPath is not set")
        try:
            crl = x509.load_pem_x509_crl(self.crl.read_bytes())
        except (OSError, ValueError):
            return
        if not crl.is_signature_valid(authority.public_key()):  # type: ignore[arg-type]
            raise Broken("the revocation list is of another authority")
        if crl.get_revoked_certificate_by_serial_number(equipment.serial_number) is not None:
            raise Broken("a device is revoked")


_PSS = padding.PSS(padding.MGF1(hashes.SHA256()), 32)


def _bare(certificate: x509.Certificate) -> str:
    return base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()


def _two(entry: ClientPublicKeys) -> tuple[x509.Certificate, x509.Certificate]:
    chain = entry.certificate_chain or ()
    if len(chain) < 2:
        raise Broken("keys without certificates")
    try:
        first, second = (x509.load_der_x509_certificate(base64.b64decode(one)) for one in chain[:2])
    except ValueError as error:
        raise Broken(f"not a certificate: {error}") from error
    return first, second


def _check_issued(certificate: x509.Certificate, by: x509.Certificate) -> None:
    """Verify a certificate's signature; names do not matter."""
    key: Any = by.public_key()
    scheme: Any = certificate.signature_algorithm_parameters
    hashed = (certificate.signature_hash_algorithm,) if isinstance(key, rsa.RSAPublicKey) else ()
    try:
        key.verify(certificate.signature, certificate.tbs_certificate_bytes, scheme, *hashed)
    except InvalidSignature as error:
        raise Broken("a certificate is of another authority") from error


def _check_signature(certificate: x509.Certificate, signature: bytes | None, message: bytes) -> None:
    key = certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey) or not signature:
        raise Broken("no signature, or of no RSA key")
    try:
        key.verify(signature, message, _PSS, hashes.SHA256())
    except InvalidSignature as error:
        raise Broken("a signature is wrong") from error


def _authority_key(certificate: x509.Certificate) -> bytes | None:
    found = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    return found.value.key_identifier


def _subject_key(certificate: x509.Certificate) -> bytes:
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


# ---- keys, streams and shares of PW_ENCRYPT


def clamped(drawn: bytes) -> bytes:
    """Return an X25519 key in the form in which it is kept and shared."""
    return bytes([drawn[0] & 0xF8, *drawn[1:31], drawn[31] & 0x7F | 0x40])


def public_of(private: bytes) -> bytes:
    return x25519.X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes, salt: bytes = b"") -> bytes:
    """Return the key of two devices; it does not mind a point with which all agree on zero."""
    try:
        peer = x25519.X25519PublicKey.from_public_bytes(public)
    except ValueError as error:
        raise Broken(f"a public key: {error}") from error
    try:
        secret = x25519.X25519PrivateKey.from_private_bytes(private).exchange(peer)
    except ValueError:
        secret = bytes(32)
    return hashlib.pbkdf2_hmac("sha256", secret, salt, KDF_ROUNDS, 32)


def stream(key: bytes, iv: bytes, count: int) -> Array:
    """Return float32[count] in [-1, 1]; give up on a word of 32 ones, as the original does."""
    made = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update(bytes(4 * count))
    words = np.frombuffer(made, "<i4")
    if (words == -1).any():
        raise Broken("a word of the stream is -1")
    return words.astype(np.float32) / np.float32(2147483648.0)


def sealed(key: bytes, iv: bytes, plain: bytes) -> bytes:
    padder = PKCS7(128).padder()
    padded = padder.update(plain) + padder.finalize()
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    return iv + encryptor.update(padded) + encryptor.finalize()


def opened(key: bytes, wire: bytes) -> bytes:
    try:
        decryptor = Cipher(algorithms.AES(key), modes.CBC(wire[:16])).decryptor()
        padded = decryptor.update(wire[16:]) + decryptor.finalize()
        unpadder = PKCS7(128).unpadder()
        return unpadder.update(padded) + unpadder.finalize()
    except ValueError as error:
        raise Broken(f"a share cannot be opened: {error}") from error


def number_bytes(number: int) -> bytes:
    """Return big-endian bytes without zeros at the front; nothing for 0."""
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def share_of(secret: bytes, coefficients: Sequence[int], index: int, prime: int) -> bytes:
    """Return the share number ``index``, from 1, of a secret: its polynomial's value there."""
    value = int.from_bytes(secret, "big")
    return number_bytes((value + sum(a * index**j for j, a in enumerate(coefficients, 1))) % prime)


def record_of(s_share: bytes, b_share: bytes, index: int) -> bytes:
    """Return the plain record of a pair of shares."""
    place = number_bytes(index)
    parts = (s_share, b_share, place, place)
    return bytes(map(len, parts)) + place + place + s_share + b_share


def read_record(record: bytes) -> tuple[bytes, bytes, int, int]:
    """Return share of s, share of b, and their numbers; lengths are signed bytes."""
    if len(record) < 4 or max(record[:4]) > 127 or len(record) != 4 + sum(record[:4]):
        raise Broken("a record of shares whose lengths do not fit")
    s, b, s_place, b_place = record[:4]
    at = 4
    parts = []
    for length in (s_place, b_place, s, b):
        parts.append(record[at : at + length])
        at += length
    return parts[2], parts[3], int.from_bytes(parts[0], "big"), int.from_bytes(parts[1], "big")


def comes_after(one: str, other: str) -> bool:
    """Compare two strings as Java does: by their UTF-16 units."""
    return one.encode("utf-16-be") > other.encode("utf-16-be")


class Pairwise:
    """One iteration of PW_ENCRYPT on one device.

    Args:
        fl_id: of the device.
        iteration: its number.
        params: of the plan.
        keystore: if devices sign.
        random: makes so many random bytes.
    """

    def __init__(
        self,
        fl_id: str,
        iteration: int,
        params: PWParams,
        keystore: KeyStore | None = None,
        random: Random = os.urandom,
    ) -> None:
        self.fl_id, self.iteration, self.keystore, self._random = fl_id, iteration, keystore, random
        self.t, self.prime = params.t, int.from_bytes(params.prime or b"", "big")
        self.c, self.s = clamped(random(32)), clamped(random(32))
        self.b, self.ind_iv, self.pw_iv, self.pw_salt = random(32), random(16), random(16), random(32)
        self.members: dict[str, ClientPublicKeys] = {}  # U1, in the order received, itself among them
        self.received: dict[str, bytes] = {}  # U2: whose secrets -> sealed record, in the order received
        self.clients: tuple[str, ...] = ()
        self._agreed: dict[str, bytes] = {}  # other device -> key of what the two seal for each other
        self._secrets: list[tuple[str, bytes, bytes, int, int]] = []

    # ---- requests, each with a new time stamp

    def exchange_keys(self, stamp: str) -> RequestExchangeKeys:
        request = RequestExchangeKeys(
            self.fl_id, public_of(self.c), public_of(self.s), self.iteration, stamp,
            self.ind_iv, self.pw_iv, self.pw_salt,
        )  # fmt: skip
        if self.keystore is None:
            return request
        signed = public_of(self.c) + public_of(self.s) + f"{stamp}{self.iteration}".encode()
        return replace(request, signature=self.keystore.sign(signed), certificate_chain=self.keystore.bare())

    def get_keys(self, stamp: str) -> GetExchangeKeys:
        return GetExchangeKeys(self.fl_id, self.iteration, stamp, self._signature(stamp))

    def share_secrets(self, stamp: str) -> RequestShareSecrets:
        others = [one for one in self.members if one != self.fl_id]
        if not others or not 0 < self.t <= len(others):
            raise Broken(f"{len(others)} shares, of which {self.t} are to give a secret")
        of_s, of_b = self._coefficients(), self._coefficients()
        shares = []
        for index, other in enumerate(others, 1):
            record = record_of(
                share_of(self.s, of_s, index, self.prime), share_of(self.b, of_b, index, self.prime), index
            )
            shares.append(ClientShare(other, sealed(self._key_with(other), self._random(16), record)))
        return RequestShareSecrets(self.fl_id, tuple(shares), self.iteration, stamp, self._signature(stamp))

    def get_secrets(self, stamp: str) -> GetShareSecrets:
        return GetShareSecrets(self.fl_id, self.iteration, stamp, self._signature(stamp))

    def get_client_list(self, stamp: str) -> GetClientList:
        return GetClientList(self.fl_id, self.iteration, stamp, self._signature(stamp))

    def push_list_sign(self, stamp: str) -> SendClientListSign:
        assert self.keystore is not None
        signature = self.keystore.sign(self._list_digest())
        return SendClientListSign(self.fl_id, self.iteration, stamp, signature, self._signature(stamp))

    def get_list_sign(self, stamp: str) -> RequestAllClientListSign:
        return RequestAllClientListSign(self.fl_id, self.iteration, stamp, self._signature(stamp))

    def reconstruct_secrets(self, stamp: str) -> SendReconstructSecret:
        """Of each owner, the share of b if it is in the list, else that of its s key; nothing is checked."""
        told = []
        for owner, s_share, b_share, s_index, b_index in self._secrets:
            listed = owner in self.clients
            told.append(ClientShare(owner, b_share if listed else s_share, b_index if listed else s_index))
        return SendReconstructSecret(self.fl_id, tuple(told), self.iteration, stamp, self._signature(stamp))

    def _signature(self, stamp: str) -> bytes | None:
        return self.keystore.sign(f"{stamp}{self.iteration}") if self.keystore else None

    def _coefficients(self) -> list[int]:
        """Draw what belongs to x, x^2, ...: from 1 to prime - 1."""
        return [1 + int.from_bytes(self._random(48), "big") % (self.prime - 1) for _ in range(self.t - 1)]

    def _key_with(self, other: str) -> bytes:
        if other not in self.members:
            raise Broken(f"no key of {other!r}")
        if other not in self._agreed:
            self._agreed[other] = agreed(self.c, self.members[other].c_pk or b"")
        return self._agreed[other]

    def _list_digest(self) -> bytes:
        return hashlib.sha256("".join(self.clients).encode()).digest()

    # ---- answers with 200

    def take_keys(self, reply: ReturnExchangeKeys, now: int) -> None:
        for entry in _vector(reply.remote_publickeys):
            if entry.fl_id is None or not entry.c_pk or not entry.s_pk:
                raise Broken("an entry of the list of keys without id or keys")
            if self.keystore is not None:
                self.keystore.check_keys(entry, self.iteration, now)
            self.members[entry.fl_id] = entry
        if self.keystore is not None and reply.iteration != self.iteration:
            raise Broken(f"keys of iteration {reply.iteration}")

    def take_shares(self, reply: ReturnShareSecrets, now: int) -> None:
        for item in _vector(reply.encrypted_shares):
            if item.fl_id is None or item.share is None:
                raise Broken("a share without owner or bytes")
            self.received[item.fl_id] = bytes(item.share)

    def take_list(self, reply: ReturnClientList, now: int) -> None:
        """Open all shares too."""
        self.clients = tuple(_vector(reply.clients))
        if not self.received:
            raise Broken("nobody has shared a secret with this device")
        self._secrets = [
            (owner, *read_record(opened(self._key_with(owner), wire)))
            for owner, wire in self.received.items()
        ]

    def take_list_signs(self, reply: ReturnAllClientListSign, now: int) -> None:
        """Verify the others' signatures under this device's list; how many there are does not matter."""
        items: Sequence[ClientListSign] = reply.client_list_sign or ()
        for item in items:
            if item.fl_id == self.fl_id:
                continue
            if item.fl_id not in self.members:
                raise Broken(f"the list is signed by {item.fl_id!r}, who has no keys")
            _check_signature(_two(self.members[item.fl_id])[0], item.signature, self._list_digest())

    # ---- the mask

    def mask(self, count: int) -> Array:
        """Return float32[count]: the streams with all whose shares were received, and its own."""
        made = np.zeros(count, np.float32)
        for other in self.received:
            if other == self.fl_id:
                continue
            if other not in self.members:
                raise Broken(f"no key of {other!r}")
            entry, greater = self.members[other], comes_after(self.fl_id, other)
            iv, salt = (entry.pw_iv, entry.pw_salt) if greater else (self.pw_iv, self.pw_salt)
            shared = stream(agreed(self.s, entry.s_pk or b"", salt or b""), iv or b"", count)
            made += shared if greater else -shared
        made += stream(self.b, self.ind_iv, count)
        return made


def masked(layers: Weights, data_size: int, mask: Array) -> dict[str, Array]:
    """Return weights x data size + mask; each layer begins at the mask's start, which is the original's fault."""
    return {name: values * np.float32(data_size) + mask[: values.size] for name, values in layers.items()}


def _vector(values: Sequence[Any] | None) -> Sequence[Any]:
    if values is None:
        raise Broken("an answer without its list")
    return values


# ---- compression


def restored(item: CompressFeatureMap) -> Array:
    """Return a weight that came as QUANT."""
    assert item.compress_data is not None
    low, high = np.float32(item.min_val), np.float32(item.max_val)
    step = np.float32(float((high - low) / np.float32(255)) + 1e-10)
    return (item.compress_data.astype(np.float32) + np.float32(128)) * step + low


def sparse_mask(seed: int, count: int, rate: float) -> npt.NDArray[np.bool_]:
    """Return which of all elements are uploaded; int32 arithmetic that wraps, and remainders with a sign."""
    keep = int(np.float32(count) * np.float32(rate))
    chosen = [True] * keep + [False] * (count - keep)
    state = _remainder(_wrapped(_wrapped(seed + 2147483647) * 48271))
    for i in range(count):
        part = float(state) / 4294967294.0 + 0.5
        state = _remainder(_wrapped(state * 48271))
        j = int(part * float(count - i)) + i
        chosen[i], chosen[j] = chosen[j], chosen[i]
    return np.array(chosen, np.bool_)


def _wrapped(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _remainder(value: int) -> int:
    return int(math.fmod(value, 2147483647))


def packed_update(
    values: Weights, base: Weights, data_size: int, mask: npt.NDArray[np.bool_]
) -> tuple[CompressFeatureMap, ...]:
    """Return DIFF_SPARSE_QUANT's layers.

    Args:
        values: already multiplied by the data size.
        base: the weights that were received.
        data_size: samples.
        mask: over all layers, one behind the other.
    """
    layers, at = [], 0
    for name, array in values.items():
        difference = array - base[name] * np.float32(data_size)
        layers.append(_packed(name, difference[mask[at : at + array.size]]))
        at += array.size
    return tuple(layers)


def _packed(name: str, chosen: Array) -> CompressFeatureMap:
    if not chosen.size:
        return CompressFeatureMap(name, np.zeros(0, np.int8), float(FLOAT_MAX), float(-FLOAT_MAX))
    low, high = chosen.min(), chosen.max()
    step = (high - low) / np.float32(255) + np.float32(1e-10)
    steps = np.floor(((chosen - low) / step - np.float32(128)).astype(np.float64) + 0.5)
    return CompressFeatureMap(name, steps.astype(np.int8), float(low), float(high))


# ---- DP_ENCRYPT


def sigma(epsilon: float, delta: float, clip: float) -> float:
    """Return the noise's standard deviation; epsilon and delta are float32 values."""
    at_zero = _gap(epsilon, 0.0, 1)
    if delta == at_zero:
        factor = 1.0
    else:
        side = 1 if delta > at_zero else -1
        s = _calibrated(epsilon, delta, side)
        factor = math.sqrt(1 + s / 2) - side * math.sqrt(s / 2)
    return factor * clip / math.sqrt(2 * epsilon)


def _calibrated(epsilon: float, delta: float, side: int) -> float:
    """Bisect for the s whose gap is delta, at most 1e-6 below it."""
    low, high = 0.0, 1.0
    while _gap(epsilon, high, 1) <= delta if side > 0 else _gap(epsilon, high, -1) > delta:
        low, high = high, 2 * high
    middle = low + (high - low) / 2
    for _ in range(1001):
        gap = _gap(epsilon, middle, side)
        if gap <= delta and delta - gap <= 1e-6:
            break
        if (gap <= delta) == (side > 0):
            low = middle
        else:
            high = middle
        middle = low + (high - low) / 2
    return middle


def _gap(epsilon: float, s: float, side: int) -> float:
    upper = _normal(-math.sqrt(epsilon * (s + 2)))
    return _normal(side * math.sqrt(epsilon * s)) - math.exp(epsilon) * upper


def _normal(x: float) -> float:
    return 0.5 * (1 + _erf(x / math.sqrt(2)))


def _erf(x: float) -> float:
    step = x / ERF_STEPS
    inner = np.exp(-((step * np.arange(1, ERF_STEPS)) ** 2)).sum()
    total = 1 + 2 * float(inner) + math.exp(-((ERF_STEPS * step) ** 2))
    return float(np.float32(total * step / math.sqrt(math.pi)))


def noisy(
    trained: Weights, base: Weights, data_size: int, clip: float, deviation: float, draw: Callable[[int], Any]
) -> dict[str, Array]:
    """Return the updates, cut to ``clip`` and with noise, on top of the received weights, x data size.

    Args:
        trained: after the training.
        base: as received.
        data_size: samples.
        clip: bound of the update's norm.
        deviation: of the noise.
        draw: makes so many normal float64 values of deviation 1.
    """
    difference = {name: trained[name] - base[name] for name in trained}
    norm = math.sqrt(sum(float((one**2).astype(np.float64).sum()) for one in difference.values()))
    cut = min(1.0, clip / norm) if norm else 0.0
    made = {}
    for name, values in difference.items():
        kept = (values.astype(np.float64) * cut).astype(np.float32)
        moved = (kept + deviation * np.asarray(draw(values.size))).astype(np.float32)
        made[name] = (base[name] + moved) * np.float32(data_size)
    return made


def norm_of_step(base: Weights, new: Weights) -> float:
    """Return how far the global model has moved, in float32."""
    total = np.float32(0)
    for name, values in base.items():
        for one in (values - new[name]) ** 2:
            total += one
    return float(np.sqrt(total))


# ---- SIGNDS


def dimensions(params: DSParams, count: int) -> tuple[int, int, int]:
    """Return k, how many positions are told, and how many of them at least are of the top k."""
    top = int(np.float32(params.sign_k) * np.float32(count))
    epsilon = float(np.float32(params.sign_eps))
    told = params.sign_dim_out
    if not told:
        told = 1
        while _expected(top, count, told, _threshold(top, count, told, epsilon), epsilon) / told >= float(
            np.float32(params.sign_thr_ratio)
        ):
            told += 1
        told = max(1, told - 1)
    return top, told, _threshold(top, count, told, epsilon)


def chances(top: int, count: int, told: int, threshold: int, epsilon: float) -> list[float]:
    """Return how probable it is that 0, 1, ..., ``told`` of the positions are of the top."""
    lift = math.exp(epsilon)
    ways = _ways(top, count, told)
    weights = [one * lift if v >= threshold else one for v, one in enumerate(ways)]
    total = sum(weights)
    return [one / total for one in weights] if total else []


def positions(
    difference: Array, sign: int, params: DSParams, uniform: Callable[[], float], below: Callable[[int], int]
) -> npt.NDArray[np.int32]:
    """Return the positions to tell, ascending.

    Args:
        difference: float32[n], trained - received, over all weights.
        sign: +1: the greatest are the top; -1: the smallest.
        params: of the plan.
        uniform: draws from [0, 1).
        below: draws an integer from [0, n).
    """
    top, told, threshold = dimensions(params, difference.size)
    odds = chances(top, difference.size, told, threshold, float(np.float32(params.sign_eps)))
    if not odds:
        raise Broken("SIGNDS: no number of positions is possible")
    drawn, reached = uniform(), np.cumsum(odds)
    from_top = min(int(np.searchsorted(reached, drawn)), told)
    order = np.argsort(-difference if sign > 0 else difference, kind="stable").tolist()
    if top < from_top:
        raise Broken("SIGNDS: fewer top positions than are to be told")
    chosen = _sample(order[:top], from_top, below) + _sample(order[top:], told - from_top, below)
    return np.array(sorted(chosen), np.int32)


def _sample(items: list[int], count: int, below: Callable[[int], int]) -> list[int]:
    items, taken = list(items), []
    for i in range(len(items), len(items) - count, -1):
        r = below(i)
        taken.append(items[r])
        items[r], items[i - 1] = items[i - 1], items[r]
    return taken


def _threshold(top: int, count: int, told: int, epsilon: float) -> int:
    best, reached = 1, -math.inf
    for t in range(1, told + 1):
        expected = _expected(top, count, told, t, epsilon)
        if not expected > reached:
            break
        best, reached = t, expected
    return best


def _expected(top: int, count: int, told: int, threshold: int, epsilon: float) -> float:
    odds = chances(top, count, told, threshold, epsilon)
    return sum(v * odd for v, odd in enumerate(odds))


@cache
def _ways(top: int, count: int, told: int) -> list[float]:
    """Return in how many ways 0, 1, ..., ``told`` of the positions can be of the top."""
    return [_choices(top, v) * _choices(count - top, told - v) for v in range(told + 1)]


def _choices(n: int, r: int) -> float:
    if r < 0 or r > n:
        return 0.0
    made = 1.0
    for i in range(1, min(r, n - r) + 1):
        made *= (n + 1 - i) / i
    return made
