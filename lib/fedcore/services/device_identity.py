"""Whether a device's request is signed by whom it names: what ``client_verify`` asks of devices.

Rules kept here:

* A request that proves nothing changes nothing in the shared state, nor in a ledger. * The key that a device has
attested is kept with its place in the iteration, in Redis: all servers know it, it lives as
  long as the place, and it is brought back with the place when Redis has lost it.
* A signature is good for one request. The same request may come again, as HTTP libraries repeat requests on their
own:
  whatever it did is not done twice. The signature of startFLJob says nothing of the iteration, so there it is good
  for the iteration in which it was first shown.
* Roots and revocation list are read again when their files change. A bad new file changes nothing, and is told.

All verifying is done on the reactor: a chain takes half a millisecond, once per device and iteration, a signature
0.05 ms. The bodies of large updates are hashed in a thread.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from twisted.logger import Logger

from fedcore.config import Settings
from fedcore.core import admission
from fedcore.core.admission import Standing, Verdict
from fedcore.errors import ConfigError
from fedcore.identity import chain, freshness, messages, pss
from fedcore.identity.pem import Untrusted, fl_id_of, pem_form, read_bare
from fedcore.identity.revocation import Revocations
from fedcore.store.cluster_state import ClusterState, Use
from fedcore.wire.messages import RequestFLJob

INIT_FAILED = "init root cert and crl failed."
_SHOWN = 2  # certificates in exchangeKeys: attestation and equipment
CLOCKS_MS = 60_000  # by so much the clocks of servers may differ

Look = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom we trust, and whom no more."""

    anchors: chain.Anchors
    revocations: Revocations


class TrustFiles:
    """The files of ``client_verify``; what is in force follows them.

    Attributes:
        problem: why the files, as they are now, are not used; "" if they are.
    """

    log = Logger()

    def __init__(
        self,
        roots: tuple[str, str],
        crl: str,
        *,
        crl_required: bool = False,
        show: Callable[[Mapping[str, float]], object] = lambda ends: None,
    ) -> None:
        """Read the files.

        Args:
            roots: paths of the first and the second root certificate, PEM; both must be there.
            crl: path of the revocation list, or "".
            crl_required: whether there must be one.
            show: is told until when each file is good, file -> seconds since the epoch, whenever they are read.

        Raises:
            ConfigError: a root is not there, or a file cannot be used.
        """
        self.problem = ""
        self._roots = tuple(map(Path, roots)) if all(roots) else ()
        self._crl = Path(crl) if crl else None
        self._required = crl_required
        self._show = show
        self._seen = self._look()
        self._trust = self._read()
        if self._crl is None or not self._crl.exists():
            self.log.warn(
                "there is no client_verify.equip_crl_path at {path!r}: no device is refused as revoked",
                path=crl,
            )

    def current(self) -> Trust:
        """Return what is in force: the files' content, if they have changed and can be used."""
        seen = self._look()
        if seen != self._seen:
            self._seen = seen
            try:
                self._trust = self._read()
            except ConfigError as fault:
                self.problem = str(fault)
                self.log.error(
                    "the devices' roots and revocations stay as they were: {why}", why=self.problem
                )
            else:
                self.problem = ""
                self.log.info("the devices' roots and revocations were read again")
        return self._trust

    def _look(self) -> Look:
        paths = (*self._roots, *(() if self._crl is None else (self._crl,)))
        return tuple(map(_identity_of_content, paths))

    def _read(self) -> Trust:
        if not self._roots:
            raise ConfigError(
                INIT_FAILED,
                hint="give client_verify.root_first_ca_path and client_verify.root_second_ca_path",
            )
        anchors, revocations = chain.Anchors([_root(path) for path in self._roots]), self._read_list()
        ends = {
            str(path): root.not_valid_after_utc.timestamp()
            for path, root in zip(self._roots, anchors.roots, strict=True)
        }
        if revocations.next_update is not None:
            ends[str(self._crl)] = revocations.next_update.timestamp()
        self._show(ends)
        return Trust(anchors, revocations)

    def _read_list(self) -> Revocations:
        path, required = self._crl, self._required
        try:
            return (
                Revocations(required=required)
                if path is None
                else Revocations.read(path.read_bytes(), required=required)
            )
        except FileNotFoundError:
            if required:
                raise ConfigError(
                    INIT_FAILED, hint=f"there is no {path}, and fedcore.device.crl_required is true"
                ) from None
            return Revocations()
        except OSError as problem:
            raise ConfigError(INIT_FAILED, hint=f"cannot read {path}: {problem.strerror}") from problem
        except ValueError as fault:
            raise ConfigError(INIT_FAILED, hint=f"{path} holds no usable revocation list: {fault}") from fault


def _root(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as problem:
        raise ConfigError(INIT_FAILED, hint=f"cannot read {path}: {problem.strerror}") from problem
    except ValueError as fault:
        raise ConfigError(INIT_FAILED, hint=f"{path} holds no certificate in PEM form: {fault}") from fault


def _identity_of_content(path: Path) -> tuple[int, int, int]:
    """Return what tells one content of a file from another; zeros if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(slots=True)
class Entry:
    """What a startFLJob has proved.

    Attributes:
        key: to be kept with the place, "" if nothing is proved.
        refusal: why it gets no place, or None.
        scope: where a repetition of it is one; "" until it was shown to the shared state.
    """

    key: str
    refusal: Verdict | None
    scope: str = ""


@dataclass(frozen=True, slots=True)
class Signed:
    """A signed request.

    Attributes:
        path: name of the round.
        fl_id: the client that it names.
        iteration: the one that it names.
        timestamp: as it is in the request.
        signature: as it is in the request.
        message: the bytes that are signed, see ``identity.messages``.
        digest: of its body, see ``freshness.digest_of``.
    """

    path: str
    fl_id: str | None
    iteration: int
    timestamp: str | None
    signature: bytes | None
    message: bytes
    digest: bytes


def is_provable(request: RequestFLJob) -> bool:
    """Tell whether a startFLJob has all the parts that prove who sends it, whatever is in them."""
    parts = request.key_attestation, request.equip_cert, request.equip_ca_cert, request.sign_data
    return all(part is not None for part in parts)


class DeviceIdentity:
    """Judges the signatures of devices."""

    log = Logger()

    def __init__(self, files: TrustFiles, window_ms: int, now_ms: Callable[[], int]) -> None:
        """Trust what is in the files; time stamps may be so far from now, to either side."""
        self.files = files
        self._window_ms = window_ms
        self._now_ms = now_ms

    # ---- startFLJob

    def enter(self, request: RequestFLJob) -> Entry:
        """Judge certificates and signature of a startFLJob that has all its parts."""
        if not request.sign_data:
            return Entry("", Verdict(400, admission.SIGN_DATA_EMPTY))
        try:
            return Entry(
                base64.b64encode(pss.pack_key(self._attested(request, request.sign_data))).decode(), None
            )
        except Untrusted as why:
            self.log.debug("a startFLJob proves nothing: {why}", why=str(why))
            return Entry("", Verdict(400, admission.START_UNPROVEN))

    def _attested(self, request: RequestFLJob, signature: bytes) -> rsa.RSAPublicKey:
        assert request.fl_id is not None and request.timestamp is not None
        assert request.key_attestation is not None and request.equip_cert is not None
        assert request.equip_ca_cert is not None
        # What costs least is looked at first; it makes no difference to the answer.
        now_ms, stamp = self._now_ms(), freshness.read_stamp(request.timestamp)
        if stamp is None or not freshness.is_fresh(stamp, now_ms, self._window_ms):
            raise Untrusted("the time stamp is not of now")
        shown = chain.Chain.read(
            request.fl_id, request.key_attestation, request.equip_cert, request.equip_ca_cert
        )
        if not pss.verify(shown.key(), signature, messages.of_start(request.fl_id, request.timestamp)):
            raise Untrusted("the signature is not that of the attested key")
        trust, now = self.files.current(), datetime.fromtimestamp(now_ms / 1000, UTC)
        key = chain.signing_key(shown, trust.anchors, trust.revocations, now)
        return key

    async def refusal(
        self,
        cluster: ClusterState,
        number: int,
        places: int,
        entry: Entry,
        request: RequestFLJob,
        body: memoryview,
    ) -> Verdict | None:
        """Return why a startFLJob may not even ask for a place, or None.

        Args:
            cluster: the shared state.
            number: the iteration that is served.
            places: in an iteration.
            entry: what the request has proved.
            request: itself.
            body: its bytes.

        Raises:
            StoreError: the shared state cannot be asked.
        """
        if entry.refusal is not None:  # whoever comes too late is told so first
            full = await cluster.places_taken(number) >= places
            return Verdict(300, admission.START_FULL) if full else entry.refusal
        entry.scope = entry.scope or f"{cluster.keys.instance}:{number}"
        assert request.fl_id is not None and request.sign_data is not None and request.timestamp is not None
        mark = freshness.mark_of_request(entry.scope, "startFLJob", freshness.digest_of(body))
        stamp = int(request.timestamp)
        used = await self._use(cluster, request.fl_id, request.sign_data, stamp, mark)
        return Verdict(300, admission.KEY_KNOWN) if used is Use.USED else None

    # ---- all other rounds

    async def standing(self, cluster: ClusterState, call: Signed) -> Standing:
        """Judge the signature under a request other than startFLJob.

        Raises:
            StoreError: the shared state cannot be asked.
        """
        if call.signature is None or call.fl_id is None or call.timestamp is None:
            return Standing.FAILED
        key = await self.key_of(cluster, call.iteration, call.fl_id)
        if key is None:
            return Standing.UNKNOWN
        stamp = freshness.read_stamp(call.timestamp)
        if stamp is None or not pss.verify(key, call.signature, call.message):
            return Standing.FAILED
        if not freshness.is_fresh(stamp, self._now_ms(), self._window_ms):
            return Standing.STALE
        mark = freshness.mark_of_request(cluster.keys.instance, call.path, call.digest)
        used = await self._use(cluster, call.fl_id, call.signature, stamp, mark)
        return Standing.STALE if used is Use.USED else Standing.PASSED

    async def key_of(self, cluster: ClusterState, iteration: int, fl_id: str) -> rsa.RSAPublicKey | None:
        """Return the key that a client has attested for an iteration, None if it has no place there.

        Raises:
            StoreError: the shared state cannot be asked.
        """
        meta = await cluster.client_meta(iteration, fl_id)
        return pss.unpack_key(base64.b64decode(meta.key)) if meta is not None and meta.key else None

    async def owns(
        self, cluster: ClusterState, iteration: int, fl_id: str, chain_shown: Sequence[str] | None
    ) -> bool:
        """Tell whether a chain, as exchangeKeys carries it, is that of the key that a client has attested.

        Other devices look at it, and an unmodified one ends its job over a bad one.

        Raises:
            StoreError: the shared state cannot be asked.
        """
        key = await self.key_of(cluster, iteration, fl_id)
        if key is None or chain_shown is None or len(chain_shown) != _SHOWN:
            return False
        try:
            attestation, equipment = map(read_bare, chain_shown)
        except Untrusted:
            return False
        return attestation.public_key() == key and fl_id_of(pem_form(equipment)) == fl_id

    async def _use(self, cluster: ClusterState, fl_id: str, signature: bytes, stamp: int, mark: bytes) -> Use:
        return await cluster.use_signature(
            fl_id,
            freshness.mark_of_signature(signature),
            mark,
            stamp=stamp,
            oldest=self._now_ms() - self._window_ms - CLOCKS_MS,
            lifetime_ms=2 * (self._window_ms + CLOCKS_MS),
        )


def device_identity_of(
    settings: Settings, now_ms: Callable[[], int], show: Callable[[Mapping[str, float]], object]
) -> DeviceIdentity | None:
    """Build what judges devices' signatures; None while devices need not sign. For ``show`` see TrustFiles.

    Raises:
        ConfigError: a file of ``client_verify`` is missing or cannot be used.
    """
    asked = settings.client_verify
    if not asked.pki_verify:
        return None
    files = TrustFiles(
        (asked.root_first_ca_path, asked.root_second_ca_path),
        asked.equip_crl_path,
        crl_required=settings.fedcore.device.crl_required,
        show=show,
    )
    return DeviceIdentity(files, asked.replay_attack_time_diff, now_ms)
