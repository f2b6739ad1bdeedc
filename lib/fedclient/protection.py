"""How trained weights become an upload under the server's plan: plain, with noise, as signs, masked, or compressed.

A ``Protection`` is what a session keeps of this from iteration to iteration: the clip bound and the account of
differential privacy, and what compression has left out. All chance of a session is here, as an argument.

=============  ===================================  ==================  =====================
encrypt type   what is sent                         mask                DIFF_SPARSE_QUANT
=============  ===================================  ==================  =====================
NOT_ENCRYPT    weights * data size                  --                  of that
DP_ENCRYPT     (clipped, with noise) * data size    --                  of that
SIGNDS         sign and positions                   --                  never
any other      weights * data size                  the session's       never
=============  ===================================  ==================  =====================

What has left the mechanism of differential privacy is only computed with further, so that compression, and what it
keeps for the next time, cost nothing more.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedclient.trainer import Weights
from fedcore.compression import mask as sparse_mask
from fedcore.compression import sparse
from fedcore.errors import ConfigError
from fedcore.privacy import gaussian, signds
from fedcore.privacy.gaussian import Random
from fedcore.secagg import shamir
from fedcore.secagg.masks import Layout as MaskLayout
from fedcore.wire.arrays import Floats, Layout, check_shapes, check_update
from fedcore.wire.messages import (
    CompressFeatureMap,
    CompressType,
    DPParams,
    DSParams,
    FeatureMap,
    PWParams,
    RequestUpdateModel,
    ResponseFLJob,
)

log = logging.getLogger("fedclient")

PLAIN, NOISE, SIGNS = "NOT_ENCRYPT", "DP_ENCRYPT", "SIGNDS"
MASKS, STABLE_MASKS = "PW_ENCRYPT", "STABLE_PW_ENCRYPT"
KNOWN = (PLAIN, NOISE, SIGNS, MASKS)

Mask = Callable[[Mapping[str, Floats]], None]
"""Adds a mask to name -> float32[n], the weights times the data size in the order received; in place."""


@dataclass(frozen=True, slots=True)
class PrivacyOptions:
    """What a device adds to the server's plan on its own; nothing of it shows on the wire.

    Attributes:
        clip_floor: DP_ENCRYPT: the clip bound never falls below; > 0.
        max_epsilon: stop before an update with which more than this would be spent; None never stops.
        error_feedback: DIFF_SPARSE_QUANT: keep what compression leaves out of an update, and add it to the next one.
        mask_layout: PW_ENCRYPT: which floats of a mask belong to which weight; the same in the whole job.
        least_threshold: PW_ENCRYPT: share no secrets unless more than this share of the members is needed to restore
            them; 0 to 1. With 0.67 a server that lies must have a third of the members on its side to read an update.

    Raises:
        ConfigError: a value is out of range.
    """

    clip_floor: float = gaussian.CLIP_FLOOR
    max_epsilon: float | None = None
    error_feedback: bool = False
    mask_layout: MaskLayout = MaskLayout.CONTIGUOUS
    least_threshold: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("clip_floor", self.clip_floor), ("max_epsilon", self.max_epsilon)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}", hint="a number above 0")
        if not 0 <= self.least_threshold < 1:
            raise ConfigError(f"least_threshold is {self.least_threshold}", hint="a share, from 0 to below 1")


@dataclass(frozen=True, slots=True)
class Terms:
    """What an answer to startFLJob says about the upload.

    Attributes:
        iteration: number of the iteration.
        encrypt_type: the job's, in the word of the protocol.
        noise: parameters of DP_ENCRYPT.
        signs: parameters of SIGNDS.
        masks: parameters of PW_ENCRYPT.
        compress_type: how the upload is to be packed, a ``CompressType``.
        sparse_rate: share of the elements that a packed upload holds.
    """

    iteration: int
    encrypt_type: str = PLAIN
    noise: DPParams = field(default_factory=DPParams)
    signs: DSParams = field(default_factory=DSParams)
    masks: PWParams = field(default_factory=PWParams)
    compress_type: int = CompressType.NO_COMPRESS
    sparse_rate: float = 1.0

    @classmethod
    def of(cls, reply: ResponseFLJob) -> Terms:
        """Read an answer; a job that names no encrypt type has none."""
        cipher = reply.fl_plan_config.cipher if reply.fl_plan_config else None
        return cls(
            reply.iteration,
            (cipher and cipher.encrypt_type) or PLAIN,
            (cipher and cipher.dp_params) or DPParams(),
            (cipher and cipher.ds_params) or DSParams(),
            (cipher and cipher.pw_params) or PWParams(),
            reply.upload_compress_type,
            reply.upload_sparse_rate,
        )

    def fault(self, known: Collection[str] = KNOWN) -> str:
        """Say why a client that knows these encrypt types cannot follow; empty if it can."""
        kind = self.encrypt_type
        faults: dict[str, bool] = {}
        if kind not in known:
            return f"the plan asks for encrypt type {kind!r}, this client knows {', '.join(known)}"
        if kind == NOISE:
            faults |= _faults_of_noise(self.noise)
        if kind == MASKS:
            faults |= _faults_of_masks(self.masks)
        if kind == SIGNS:
            faults |= _faults_of_signs(self.signs)
        if self.is_packed:
            packed, rate = self.compress_type, self.sparse_rate
            faults[f"compress type {packed}"] = packed != CompressType.DIFF_SPARSE_QUANT
            faults[f"a sparse rate of {rate}, not above 0 and at most 1"] = not 0 < rate <= 1
        named = [text for text, at_fault in faults.items() if at_fault]
        return f"with encrypt type {kind!r} the plan asks for {', '.join(named)}" if named else ""

    @property
    def is_masked(self) -> bool:
        """Whether the server is to see the sum only, so that rounds go before the upload."""
        return self.encrypt_type in (MASKS, STABLE_MASKS)

    @property
    def is_packed(self) -> bool:
        """Whether the upload is compressed: signs and masked weights cannot be, whatever the server says."""
        return self.compress_type != CompressType.NO_COMPRESS and self.encrypt_type in (PLAIN, NOISE)


def _faults_of_noise(noise: DPParams) -> dict[str, bool]:
    eps, delta, factor = noise.dp_eps, noise.dp_delta, noise.dp_norm_clip
    return {
        f"a dp_eps of {eps}, not above 0": not 0 < eps < math.inf,
        f"a dp_delta of {delta}, not between 0 and 1": not 0 < delta < 1,
        f"a dp_norm_clip of {factor}, not above 0": not 0 < factor < math.inf,
    }


def _faults_of_masks(masks: PWParams) -> dict[str, bool]:
    prime = int.from_bytes(masks.prime or b"", "big")
    return {
        f"{masks.t} shares that give a secret, not 1 or more": masks.t < 1,
        "shares in a field that is none of 264 bits": not _is_field(prime),
    }


def _is_field(prime: int) -> bool:
    """Tell whether this can be the prime of a field for secrets: 264 bits, and nothing that is easily divided."""
    if prime == shamir.PRIME:
        return True
    return prime.bit_length() == 8 * shamir.PRIME_BYTES and all(
        pow(base, prime - 1, prime) == 1 for base in (2, 3, 5, 7, 11)
    )


def _faults_of_signs(signs: DSParams) -> dict[str, bool]:
    share, eps, ratio, told = signs.sign_k, signs.sign_eps, signs.sign_thr_ratio, signs.sign_dim_out
    most = signds.MOST_POSITIONS
    return {
        f"a sign_k of {share}, not above 0 and at most 0.25": not 0 < share <= 0.25,
        f"a sign_eps of {eps}, not above 0 and at most 100": not 0 < eps <= 100,
        f"a sign_thr_ratio of {ratio}, not 0.5 to 1": not 0.5 <= ratio <= 1,
        f"a sign_dim_out of {told}, not 0 to {most}": not 0 <= told <= most,
    }


class Protection:
    """How one session's uploads are protected and packed.

    Attributes:
        spent: account of the updates of DP_ENCRYPT.
        signs_epsilon: sum over those of SIGNDS.
        clip: the clip bound.
        options: what the device adds.
        random: chance fit for keys.
    """

    def __init__(self, options: PrivacyOptions | None = None, random: Random = os.urandom) -> None:
        self.spent = gaussian.Spent()
        self.signs_epsilon = 0.0
        self.clip = gaussian.Clip()
        self.options = options or PrivacyOptions()
        self.random = random
        self._choice: tuple[tuple[int, DSParams], signds.Choice] | None = None
        self._left_out: dict[str, Floats] = {}  # by the last update that was taken
        self._to_leave_out: dict[str, Floats] = {}  # by the one that is on its way

    # -- the account

    def exhausted(self, terms: Terms) -> str:
        """Say that another update would spend too much; empty if it would not."""
        most = self.options.max_epsilon
        if most is None or terms.encrypt_type not in (NOISE, SIGNS):
            return ""
        spent, signs_epsilon = self._with_update(terms)
        total = _epsilon(spent, signs_epsilon, terms)
        if total <= most:
            return ""
        return f"another update would bring the epsilon spent to {total:.4g}, {most:g} is allowed"

    def _with_update(self, terms: Terms) -> tuple[gaussian.Spent, float]:
        """Return both accounts as they are after one update more."""
        if terms.encrypt_type == NOISE:
            return self.spent.with_update(_mu(terms.noise)), self.signs_epsilon
        return self.spent, self.signs_epsilon + terms.signs.sign_eps

    def _spend(self, terms: Terms) -> None:
        self.spent, self.signs_epsilon = self._with_update(terms)
        if terms.encrypt_type == NOISE:
            delta = terms.noise.dp_delta
            log.info(
                "privacy: %d updates have spent epsilon %.4g at delta %.3g (%.4g between any two trainings)",
                self.spent.updates,
                self.spent.epsilon(delta),
                delta,
                self.spent.epsilon_of_any(delta),
            )
            return
        log.info("privacy: updates have spent epsilon %.4g", self.signs_epsilon)

    # -- the upload

    def protect(
        self, terms: Terms, base: Weights, trained: Weights, data_size: int, mask: Mask | None = None
    ) -> RequestUpdateModel:
        """Make an upload of trained weights.

        Args:
            terms: in which there is no fault.
            base: name -> float32[n], the global weights as received.
            trained: name -> array of the weight's number of elements; any non-empty subset of the model.
            data_size: training samples.
            mask: what hides the weights of a client from the server.

        Returns:
            A request in which only the fields that carry weights are set.

        Raises:
            ShapeMismatch: an unknown weight, another size, or nothing at all.
            NonFinite: NaN or infinity, possibly from the product.
            TypeError, ValueError: not arrays of numbers.
        """
        weights = _flat(trained, base)
        if terms.encrypt_type == SIGNS:
            return self._signs(terms, base, weights)
        if terms.encrypt_type == NOISE:
            weights = self._noisy(terms, base, weights)
        factor = np.float32(data_size)
        with np.errstate(over="ignore", invalid="ignore"):
            weights = {name: values * factor for name, values in weights.items()}
        check_update(Layout.of(base), weights)
        if mask is not None:
            mask(weights)
        if terms.is_packed:
            return self._packed(terms, base, weights, data_size)
        return RequestUpdateModel(
            feature_map=tuple(FeatureMap(name, values) for name, values in weights.items())
        )

    def _noisy(self, terms: Terms, base: Weights, weights: Mapping[str, Floats]) -> dict[str, Floats]:
        check_update(Layout.of(base), weights)
        sigma = self.clip.bound / _mu(terms.noise)
        noisy = gaussian.privatise(weights, base, self.clip.bound, sigma, self.random)
        self._spend(terms)
        return noisy

    def _signs(self, terms: Terms, base: Weights, weights: Mapping[str, Floats]) -> RequestUpdateModel:
        check_update(Layout.of(base), weights)
        change = np.concatenate([values - base[name] for name, values in weights.items()])
        sign = signds.coin(self.random)
        places = signds.select(change, sign, self._choice_for(change.size, terms.signs), self.random)
        self._spend(terms)
        empty = np.empty(0, np.float32)
        return RequestUpdateModel(
            feature_map=tuple(FeatureMap(name, empty) for name in weights), sign=sign, index_array=places
        )

    def _choice_for(self, size: int, signs: DSParams) -> signds.Choice:
        """Return how positions are chosen, worked out once per model and plan."""
        if self._choice is None or self._choice[0] != (size, signs):
            if signs.sign_eps > signds.WEAK_EPSILON:
                log.warning(
                    "the server's sign_eps is %g: above %g an update tells nearly for sure which weights moved most",
                    signs.sign_eps,
                    signds.WEAK_EPSILON,
                )
            made = signds.choice_of(
                size, signs.sign_k, signs.sign_eps, signs.sign_thr_ratio, signs.sign_dim_out
            )
            self._choice = (size, signs), made
        return self._choice[1]

    def _packed(
        self, terms: Terms, base: Weights, weights: Mapping[str, Floats], data_size: int
    ) -> RequestUpdateModel:
        layers = [(name, values.size) for name, values in weights.items()]
        chosen = sparse_mask.draw(terms.iteration, terms.sparse_rate, sum(size for _, size in layers))
        pattern = sparse.pattern(layers, chosen)
        if self.options.error_feedback:
            for name, left_out in self._left_out.items():
                if name in weights:
                    np.add(weights[name], left_out, out=weights[name])
        packed = sparse.compress(pattern, weights, base, data_size)
        if self.options.error_feedback:
            self._to_leave_out = _left_out(pattern, packed, base, weights, data_size)
        return RequestUpdateModel(
            compress_feature_map=packed,
            upload_compress_type=CompressType.DIFF_SPARSE_QUANT,
            upload_sparse_rate=terms.sparse_rate,
            name_vec=pattern.names,
        )

    # -- what follows

    def taken(self) -> None:
        """Note that the server has taken the last update: what it left out is now due."""
        self._left_out, self._to_leave_out = self._to_leave_out, {}

    def completed(self, terms: Terms, base: Weights, model: Weights) -> None:
        """Note the model that an iteration has made of its base."""
        if terms.encrypt_type == NOISE:
            moved = gaussian.distance(model, base)
            self.clip = self.clip.after(
                terms.iteration, terms.noise.dp_norm_clip, moved, self.options.clip_floor
            )


def _epsilon(spent: gaussian.Spent, signs_epsilon: float, terms: Terms) -> float:
    return signs_epsilon + (spent.epsilon(terms.noise.dp_delta) if spent.updates else 0.0)


def _mu(noise: DPParams) -> float:
    return gaussian.mu_of(noise.dp_eps, noise.dp_delta)


def _flat(trained: Mapping[str, Any], base: Weights) -> dict[str, Floats]:
    """Return trained weights flat, in float32 and in the order received.

    Raises:
        ShapeMismatch, TypeError, ValueError: as ``Protection.protect``.
    """
    flat: dict[str, Floats] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for name, values in trained.items():
            flat[name] = np.asarray(values).reshape(-1).astype(np.float32, casting="same_kind", copy=False)
    check_shapes(Layout.of(base), flat)
    return {name: flat[name] for name in base if name in flat}


def _left_out(
    pattern: sparse.Pattern,
    packed: tuple[CompressFeatureMap, ...],
    base: Weights,
    weights: Mapping[str, Floats],
    data_size: int,
) -> dict[str, Floats]:
    """Return what an update should have said and its packed form does not, times the data size."""
    missing = {}
    for item, (name, places) in zip(packed, pattern.places.items(), strict=True):
        missing[name] = weights[name] - base[name] * np.float32(data_size)
        missing[name][places] -= sparse.restore(item)
    return missing
