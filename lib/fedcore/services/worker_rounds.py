"""The worker's rounds of hybrid training: pullWeight, pushWeight, pushMetrics, each from body to answer.

Once the updates of an iteration are summed, a worker pulls their mean (the *aggregate*), trains it further on central
data, pushes the weights and then says how good they are. Any server answers any of the rounds: the aggregate is got
from the finaliser by its digest, and the first push of an iteration counts by compare-and-set in the shared state.

Rules kept here:

* A push is taken only while the aggregate is with the worker, and becomes part of no other iteration.
* 200 to a push means: the model is on this server's disk, and the shared state names it.
* A pull that comes too early is held for a while rather than refused.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from twisted.internet import threads
from twisted.logger import Logger

from fedcore.core import admission
from fedcore.core.iteration import MADE, Phase
from fedcore.errors import ArrayError, MalformedRequest, NonFinite, StoreError
from fedcore.net.routes import Response, Route
from fedcore.observe.metrics import ServerMetrics
from fedcore.services.answers import Answer
from fedcore.services.client_api import INNER_ERROR, SmallRound
from fedcore.services.iteration_driver import IterationDriver
from fedcore.services.publication import Candidate, Found, Publication
from fedcore.store.cluster_state import OthersAwaited
from fedcore.wire import codec
from fedcore.wire.arrays import Floats, all_finite
from fedcore.wire.image import ImageSelection, ImageTemplate, ModelImage
from fedcore.wire.messages import (
    RequestPullWeight,
    RequestPushMetrics,
    RequestPushWeight,
    ResponsePullWeight,
    ResponsePushMetrics,
    ResponsePushWeight,
)

NOT_AGGREGATED = "The aggregation for the weights is not done yet."
PUSH_FAILED = "Pushing weight failed."
PUSHED = "PushWeight succeed."
PULL_LIMIT = 1 << 20  # bytes: names of weights
METRICS_LIMIT = 4096
KNOWN_S = 5.0  # longest wait until this server has seen itself what it has written in the shared state


class WorkerRounds:
    """Answers workers."""

    log = Logger()

    def __init__(
        self,
        driver: IterationDriver,
        publication: Publication,
        template: ImageTemplate,
        hold_s: float,
        reactor: Any,
    ) -> None:
        """Answer from ``driver`` and ``publication``; a pull that comes early waits for ``hold_s`` seconds."""
        self._driver = driver
        self._publication = publication
        self._template = template
        self._hold = hold_s
        self._reactor = reactor

    async def pull_weight(self, body: memoryview) -> Answer | str:
        """Hand out weights of the aggregate, in the order in which they are asked for."""
        return await self._or_safemode(self._pull_weight(body))

    async def push_weight(self, body: memoryview) -> Answer | str:
        """Take the weights that a worker has trained."""
        return await self._or_safemode(self._push_weight(body))

    async def push_metrics(self, body: memoryview, iteration: int = 0) -> Answer | str:
        """Take the worker's word for how good its model is; then that is published.

        Args:
            body: the request, which does not say of which iteration.
            iteration: what the frame around it says of that, 0 if nothing: the original's workers do not tell.
        """
        return await self._or_safemode(self._push_metrics(body, iteration))

    async def _pull_weight(self, body: memoryview) -> Answer | str:
        try:
            request = codec.decode(RequestPullWeight, body)
        except MalformedRequest:
            return self.pulled(400, admission.bad_schema("RequestPushWeight"))  # the protocol's own text
        names = [name for name in request.weight_names or () if name is not None]
        if not names:
            return self.pulled(400, "weights_names_fbs is nullptr.")
        unknown = [name for name in names if name not in self._template.layout.by_name]
        if unknown:
            return self.pulled(400, f"Parameter {unknown[0]} is not registered in server.")
        text = await self._pass_gate("pullWeight", request.iteration)
        if text is not None:
            return text
        now = self._driver.iteration
        if request.iteration != now.number:
            return self.pulled(
                201,
                f"PullWeight iteration {request.iteration} is invalid. Server current iteration: {now.number}",
            )
        aggregate = await self._aggregate()
        if aggregate is None:
            return self.pulled(201, NOT_AGGREGATED)
        reply = ResponsePullWeight(
            retcode=200,
            reason=f"Pulling weight by weight names for iteration {request.iteration} success.",
            iteration=request.iteration,
            feature_map=ImageSelection(aggregate, tuple(aggregate.tables[name] for name in names)),  # type: ignore[arg-type]
        )
        return Answer(200, Response(codec.encode_parts(reply)))

    async def _push_weight(self, body: memoryview) -> Answer | str:
        try:
            request = codec.decode(RequestPushWeight, body)
        except MalformedRequest:
            return self.pushed(201, admission.bad_schema("RequestPushWeight"))
        text = await self._pass_gate("pushWeight", request.iteration)
        if text is not None:
            return text
        now, cluster = self._driver.iteration, self._driver.joined_cluster()
        if request.iteration != now.number:
            return self.pushed(
                201,
                f"PushWeight iteration number is invalid:{request.iteration}, current iteration:{now.number}",
            )
        pairs = ((item.weight_fullname, item.data) for item in request.feature_map or ())
        weights = {name: data for name, data in pairs if name is not None and data is not None}
        if not weights:
            return self.pushed(201, "PushWeight feature map is empty.")
        aggregate = await self._aggregate()
        if aggregate is None:
            return self._came_late(now.number)
        try:
            image = await self._in_thread(lambda: _overlay(self._template, aggregate, weights))
        except ArrayError as error:
            self.log.error("weights of a worker are of no use: {error}", error=str(error))
            return self.pushed(201, PUSH_FAILED)
        if now.phase is not Phase.TRAINING and image.digest != now.digest:
            return self.pushed(200, f"Model of iteration of {now.number} has finished")
        try:
            await self._publication.save_pushed(image, now.number, cluster.keys.instance)
        except OSError as error:
            self.log.error("the model of a worker cannot be written: {error}", error=str(error))
            return self.pushed(201, PUSH_FAILED)
        try:
            done = await cluster.push_weight(now.number, now.attempt, aggregate.digest, image.digest)
        except OthersAwaited:  # one of them may bring back an earlier push
            await self._driver.held_until(lambda: self._driver.iteration.rank != now.rank, self._hold)
            return self._came_late(now.number)
        if not done:
            await self._driver.look()
            return self._came_late(now.number)
        candidate = Candidate(now.number, image)
        self._publication.hold(candidate)
        # Before it answers, this server must know what it would have to bring back to a Redis that loses it.
        self._driver.look_soon()
        known = await self._driver.until(lambda: self._knows(now.number, image.digest), KNOWN_S)
        if not known or self._driver.cluster is not cluster:
            return self._came_late(now.number)
        self.log.info(
            "a worker has trained the model of iteration {iteration}",
            iteration=now.number,
            weights=len(weights),
        )
        await self._publication.offer(candidate, await self._driver.refresh_others())
        return self.pushed(200, PUSHED)

    def _knows(self, number: int, digest: str) -> bool:
        """Tell whether this server's copy of the iteration says that a model was pushed, or that all that is over."""
        now = self._driver.iteration
        return now.number != number or now.digest == digest

    def _came_late(self, number: int) -> Answer:
        """Answer a push that is not taken: another one may have been, or this very one before."""
        seen = self._driver.iteration
        if seen.number == number and seen.digest:
            return self.pushed(200, f"Model of iteration of {number} has finished")
        return self.pushed(201, NOT_AGGREGATED)

    async def _push_metrics(self, body: memoryview, iteration: int) -> Answer | str:
        try:
            request = codec.decode(RequestPushMetrics, body)
        except MalformedRequest:
            return self.measured(400)
        if not (math.isfinite(request.loss) and math.isfinite(request.accuracy)):
            return self.measured(400)
        text = await self._pass_gate("pushMetrics", 0)
        if text is not None:
            return text
        if self._driver.iteration.phase is not Phase.TRAINED:
            await self._driver.look()
        now, cluster = self._driver.iteration, self._driver.joined_cluster()
        if iteration not in (0, now.number):
            return self.measured(300)
        done = await cluster.push_metrics(now.number, now.attempt, request.loss, request.accuracy)
        self._driver.look_soon()
        return self.measured(200 if done else 300)

    # ---- steps

    async def _or_safemode(self, round_: Awaitable[Answer | str]) -> Answer | str:
        """Refuse what cannot be done as the shared state went away meanwhile; the worker asks again."""
        try:
            return await round_
        except StoreError as error:
            self.log.info("a worker's request meets no shared state: {error}", error=str(error))
            return admission.SAFEMODE

    async def _pass_gate(self, round_name: str, wanted: int) -> str | None:
        """Wait until a worker can be served, at most for the time that requests are held; return what refuses it.

        A worker that is ahead of this server was served by another one.
        """
        driver = self._driver
        until = self._reactor.seconds() + self._hold
        if driver.iteration.number < wanted or driver.iteration.phase not in MADE:
            try:
                await driver.look()
            except StoreError:
                await driver.store_back(self._hold)

        def ready() -> bool:
            now = driver.iteration
            return driver.joined and (now.number > wanted or (now.number == wanted and now.phase in MADE))

        if (
            round_name != "pushMetrics"
            and admission.gate(
                round_name=round_name, stopping=False, running=driver.iteration.running, store_available=True
            )
            is None
        ):
            await driver.held_until(ready, max(0.0, until - self._reactor.seconds()))
        return admission.gate(
            round_name=round_name,
            stopping=driver.stopping is not None,
            running=driver.iteration.running,
            store_available=driver.joined,
        )

    async def _aggregate(self) -> ModelImage | None:
        """Return the mean of the current iteration's updates, None if there is none yet or it cannot be had now."""
        now = self._driver.iteration
        if now.phase not in MADE or not now.aggregate:
            return None
        held = self._publication.held(now.aggregate)
        if held is None:
            others = await self._driver.refresh_others()
            finaliser = now.token.partition(":")[2]
            first = sorted(others, key=lambda peer: peer != finaliser)
            if await self._publication.obtain(now.aggregate, now.number, first) is Found.HERE:
                held = self._publication.held(now.aggregate)
        return held

    async def _in_thread(self, work: Any) -> Any:
        return await threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)

    def pulled(self, code: int, reason: str) -> Answer:
        """Answer a pull without weights."""
        reply = ResponsePullWeight(
            retcode=code, reason=reason, iteration=self._driver.iteration.number, feature_map=()
        )
        return Answer(code, Response(codec.encode_parts(reply)))

    def pushed(self, code: int, reason: str) -> Answer:
        """Answer a push."""
        reply = ResponsePushWeight(retcode=code, reason=reason, iteration=self._driver.iteration.number)
        return Answer(code, Response(codec.encode_parts(reply)))

    @staticmethod
    def measured(code: int) -> Answer:
        """Answer a pushMetrics."""
        return Answer(code, Response(codec.encode_parts(ResponsePushMetrics(retcode=code))))


def _overlay(template: ImageTemplate, aggregate: ModelImage, weights: Mapping[str, Floats]) -> ModelImage:
    """Return the aggregate with some of its weights replaced, its digest computed; unknown names are skipped.

    Raises:
        ArrayError: a weight has another size than the model's, or holds NaN or infinity.
    """
    known = {name: values for name, values in weights.items() if name in template.layout.by_name}
    for name, values in known.items():
        if not all_finite(values):
            raise NonFinite(f"weight {name!r} holds NaN or infinity")
    image = template.image({**aggregate.arrays, **known})
    assert image.digest
    return image


def worker_routes(
    rounds: WorkerRounds, prefix: str, longest_push: int, metrics: ServerMetrics, clock: Callable[[], float]
) -> dict[bytes, Route]:
    """Return path -> route of the worker's rounds over HTTP."""
    small: list[Route] = [
        SmallRound(
            "pullWeight",
            rounds.pull_weight,
            lambda: rounds.pulled(500, INNER_ERROR),
            PULL_LIMIT,
            metrics,
            clock,
        ),
        SmallRound(
            "pushWeight",
            rounds.push_weight,
            lambda: rounds.pushed(500, INNER_ERROR),
            longest_push,
            metrics,
            clock,
        ),
        SmallRound(
            "pushMetrics", rounds.push_metrics, lambda: rounds.measured(500), METRICS_LIMIT, metrics, clock
        ),
    ]
    return {((prefix or "/") + round_.name).encode(): round_ for round_ in small}
