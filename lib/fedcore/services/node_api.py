"""What this server does for other nodes over the node channel.

Rules kept here:

* Only servers that are registered in the shared state are served; rounds and models also go to the hosts of
  ``fedcore.node.allow``, for workers. Without TLS a node id is only a name, so this keeps out accidents, not forgers.
* A sum is only shown while the iteration is sealed, in the attempt that it was sealed in.
* What a peer says about the iteration is never believed: the shared state is looked at.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from twisted.logger import Logger

from fedcore.errors import LocalError, PeerError, StoreError, StoreUnavailable
from fedcore.ledger.ledger import Partial
from fedcore.net.networks import Networks
from fedcore.net.node_listener import Handler, Reply, Request
from fedcore.services.answers import Answer
from fedcore.services.client_api import ClientApi
from fedcore.services.iteration_driver import IterationDriver
from fedcore.services.ledgers import Ledgers
from fedcore.services.peers import Peers, offer_of
from fedcore.services.publication import Found, Publication
from fedcore.services.update_intake import UpdateIntake
from fedcore.services.worker_rounds import WorkerRounds
from fedcore.wire import node_messages as messages
from fedcore.wire.image import ModelImage
from fedcore.wire.node import Command, PayloadKind, ProtoModel, ProtoParam, encode_model

PUSH_METRICS = 5  # user_cmd of a ROUND_REQUEST
NAMED_S = 1.0  # longest wait until this server has seen what the one that offers a model has


class Unserved(PeerError):
    """A node asked for something that it cannot have, or not now."""


class NodeApi:
    """Answers other nodes."""

    log = Logger()

    def __init__(
        self,
        driver: IterationDriver,
        api: ClientApi,
        intake: UpdateIntake,
        ledgers: Ledgers,
        publication: Publication,
        peers: Peers,
        allowed: Networks,
        workers: WorkerRounds | None = None,
    ) -> None:
        """Answer from the parts of a server; hosts in ``allowed`` may be workers, ``workers`` are their rounds."""
        self._driver = driver
        self._api = api
        self._intake = intake
        self._ledgers = ledgers
        self._publication = publication
        self._peers = peers
        self._shown: tuple[tuple[str, int, int], dict[str, Partial]] = (("", 0, 0), {})
        self._rounds: dict[int, Callable[[memoryview], Awaitable[Answer | str]]] = {  # by user_cmd
            2: api.start_fl_job,
            3: self._update_model,
            4: api.get_model,
        }
        if workers is not None:
            self._rounds |= {0: workers.pull_weight, 1: workers.push_weight}
        self._workers = workers
        self._allowed = allowed

    def handlers(self) -> dict[int, Handler]:
        """Return command -> what it does."""
        return {
            Command.ROUND_REQUEST: self._for_workers(self.round_request),
            Command.COLLECTIVE_SEND_DATA: self._for_servers(self.acknowledge),
            Command.SERVER_BROADCAST_EVENT: self._for_servers(self.acknowledge),
            Command.SERVER_PING: self._for_servers(self.acknowledge),
            Command.SERVER_PONG: self._for_servers(self.acknowledge),
            Command.GET_MODEL_WEIGHT: self._for_workers(self.get_model_weight),
            Command.BROADCAST_MODEL_WEIGHT: self._for_servers(self.acknowledge),
            Command.LOCATE_LEDGER: self._for_servers(self.locate_ledger),
            Command.SEAL_PARTIAL: self._for_servers(self.seal_partials),
            Command.READ_PARTIAL: self._for_servers(self.read_partial),
            Command.TAKE_LEDGER: self._for_servers(self.take_ledger),
            Command.OFFER_MODEL: self._for_servers(self.offer_model),
            Command.DESCRIBE_MODEL: self._for_servers(self.describe_model),
            Command.READ_MODEL: self._for_servers(self.read_model),
        }

    # ---- who may ask

    def _for_servers(self, handler: Handler) -> Handler:
        async def checked(request: Request) -> Reply:
            if not await self._registered(request.meta.send_node):
                raise Unserved(f"{request.meta.send_node!r} is not registered as a server of this job")
            return await handler(request)

        return checked

    def _for_workers(self, handler: Handler) -> Handler:
        async def checked(request: Request) -> Reply:
            if request.peer not in self._allowed and not await self._registered(request.meta.send_node):
                raise Unserved(f"{request.peer} is not in fedcore.node.allow")
            return await handler(request)

        return checked

    async def _registered(self, node_id: str) -> bool:
        if node_id in self._driver.others:
            return True
        try:
            return node_id in await self._driver.refresh_others()
        except StoreError:
            return False

    # ---- the protocol's commands

    async def acknowledge(self, request: Request) -> Reply:
        """Answer what needs no more than an acknowledgement; a model that is pushed at this server is not taken."""
        return Reply()

    async def round_request(self, request: Request) -> Reply:
        """Serve a round to a worker as a device would be served."""
        number = request.meta.user_cmd
        body, workers = memoryview(request.data), self._workers
        if number == PUSH_METRICS and workers is not None:  # its table does not name the iteration
            answer = await workers.push_metrics(body, request.meta.iteration_num)
        elif number in self._rounds:
            answer = await self._rounds[number](body)
        else:
            raise Unserved(f"Tcp server doesn't support command {number}")
        if isinstance(answer, str):
            return Reply(answer.encode())
        return Reply(b"".join(answer.response.parts), PayloadKind.FLATBUFFERS)

    async def _update_model(self, body: memoryview) -> Answer | str:
        if len(body) > self._api.longest_update:
            raise Unserved(f"an update of {len(body)} bytes is longer than the model allows")
        room = self._intake.receive(len(body))
        room.buffer[: len(body)] = body
        room.length = len(body)
        return await self._api.update_model(room)

    async def get_model_weight(self, request: Request) -> Reply:
        """Give the model of an iteration."""
        number = request.meta.iteration_num
        image = self._driver.models.get(number)
        if image is None:
            raise Unserved(f"Failed to get model of iteration {number}")
        cluster = self._driver.cluster
        instance = "" if cluster is None else cluster.keys.instance
        model = proto_model(image, self._driver.settings.fl_name, instance, number)
        return Reply(encode_model(model), PayloadKind.PROTOBUF)

    # ---- ledgers

    async def locate_ledger(self, request: Request) -> Reply:
        """Tell what this host knows of a ledger."""
        ledger_id = messages.unpack(messages.LocateLedger, request.data).ledger
        return Reply(messages.pack(messages.Located(self._ledgers.locate(ledger_id).value)))

    async def seal_partials(self, request: Request) -> Reply:
        """Close what this server holds of a sealed iteration and describe it."""
        asked = messages.unpack(messages.SealPartials, request.data)
        try:
            partials = await self._sealed(asked.instance, asked.iteration, asked.attempt)
        except LocalError as error:
            self.log.error("the sum of this server is unusable: {error}", error=str(error))
            return Reply(messages.pack_offers(self._broken()))
        return Reply(messages.pack_offers([offer_of(partial) for partial in partials]))

    async def read_partial(self, request: Request) -> Reply:
        """Give bytes of a sealed sum."""
        asked = messages.unpack(messages.ReadPartial, request.data)
        where = (asked.instance, asked.iteration, asked.attempt)
        # What was shown is not asked for again with each chunk, but more may have been adopted since.
        if self._shown[0] != where or asked.ledger not in self._shown[1] or not self._is_at(*where):
            sealed = await self._sealed(*where)
            self._shown = where, {partial.ledger_id: partial for partial in sealed}
        partial = self._shown[1].get(asked.ledger)
        if partial is None:
            raise Unserved("this server does not hold that ledger")
        return Reply(_part(partial.content, asked.offset, asked.length))

    def _is_at(self, instance: str, iteration: int, attempt: int) -> bool:
        """Tell whether this server sees the iteration sealed in that attempt."""
        now, cluster = self._driver.iteration, self._driver.cluster
        same = cluster is not None and cluster.keys.instance == instance
        return same and (now.number, now.attempt) == (iteration, attempt) and now.changing

    async def _sealed(self, instance: str, iteration: int, attempt: int) -> list[Partial]:
        """Return the sums of an iteration, all of them closed.

        Raises:
            Unserved: the iteration is not sealed in that attempt.
        """
        driver = self._driver
        stopping = driver.stopping
        if stopping is not None and stopping.where == (instance, iteration, attempt):
            return list(stopping.partials)
        if not self._is_at(instance, iteration, attempt):
            await driver.look()
        if not self._is_at(instance, iteration, attempt):
            raise Unserved(f"iteration {iteration} is not sealed in attempt {attempt} here")
        own = await self._intake.seal(iteration, attempt)
        here = [p for p in self._ledgers.adopted.values() if p.iteration == iteration]
        return here if own is None else [*here, own]

    def _broken(self) -> list[messages.PartialOffer]:
        """Describe the own ledger after its sum went wrong: there, and of no use."""
        own = self._ledgers.own
        return [] if own is None else [messages.offer_of(own.id, 0, b"", 0, 0)]

    async def take_ledger(self, request: Request) -> Reply:
        """Take over the sealed sum of a server that is about to stop."""
        asked = messages.unpack(messages.TakeLedger, request.data)
        driver, cluster = self._driver, self._driver.cluster
        if cluster is None or self._api.stopping:
            raise StoreUnavailable("this server cannot take a ledger now")
        if asked.iteration != driver.iteration.number:
            await driver.look()
        epoch = driver.epoch()
        if (epoch.instance, epoch.iteration) != (asked.instance, asked.iteration):
            raise Unserved(f"iteration {asked.iteration} is not under way here")
        copy = self._ledgers.copy(asked.offer.head_bytes(), asked.start, asked.length)
        try:
            await self._peers.copy_partial(
                request.meta.send_node, asked.offer, asked.instance, asked.iteration, asked.attempt, copy
            )
        except BaseException:
            copy.file.remove()
            raise
        giver = request.meta.send_node
        partial = await self._ledgers.keep(copy, epoch, cluster, giver, driver.node_id)
        if partial is not None:
            self.log.info(
                "took over {updates} updates of iteration {iteration} from {peer}, which stops",
                updates=partial.totals.count,
                iteration=partial.iteration,
                peer=request.meta.send_node,
            )
        driver.look_soon()
        return Reply(messages.pack(messages.Done()))

    # ---- models

    async def offer_model(self, request: Request) -> Reply:
        """Read a new model from the server that made it."""
        asked = messages.unpack(messages.OfferModel, request.data)
        if self._driver.busy and not self._is_named(asked):  # it looks once its effect is done
            self._driver.look_soon()
            await self._driver.until(lambda: self._is_named(asked), NAMED_S)
        elif not self._is_named(asked):
            await self._driver.look()
        if not self._is_named(asked):
            raise Unserved("the shared state names no such model")
        found = await self._publication.obtain(asked.digest, asked.iteration, [request.meta.send_node])
        if found is not Found.HERE:
            raise Unserved("the model that was offered cannot be had")
        return Reply(messages.pack(messages.Done()))

    def _is_named(self, asked: messages.OfferModel) -> bool:
        """Tell whether this server has seen the shared state name a model that is offered."""
        now = self._driver.iteration
        return now.number == asked.iteration and asked.digest in (now.aggregate, now.digest)

    async def describe_model(self, request: Request) -> Reply:
        """Tell how long a model is."""
        asked = messages.unpack(messages.DescribeModel, request.data)
        now = self._driver.iteration
        if asked.digest and asked.digest in (now.aggregate, now.digest):
            # After a restart it may only be on the disk. No other server is waited for: that one may be asking here.
            await self._publication.recall(asked.digest, now.number)
        return Reply(messages.pack(messages.ModelOffer(asked.digest, len(self._model(asked.digest).tail))))

    async def read_model(self, request: Request) -> Reply:
        """Give bytes of a model."""
        asked = messages.unpack(messages.ReadModel, request.data)
        return Reply(_part(memoryview(self._model(asked.digest).tail), asked.offset, asked.length))

    def _model(self, digest: str) -> ModelImage:
        image = self._publication.held(digest)
        if image is None:
            raise Unserved("this server does not hold that model")
        return image


def _part(content: memoryview, offset: int, length: int) -> memoryview:
    if not 0 < length <= messages.CHUNK or offset + length > len(content):
        raise Unserved(f"there are no {length} bytes at {offset} of {len(content)}")
    return content[offset : offset + length]


def proto_model(image: ModelImage, fl_name: str, instance: str, number: int) -> ProtoModel:
    """Return a model as the protocol's servers exchange it."""
    params = tuple(
        ProtoParam(
            weight.name,
            image.arrays[weight.name].tobytes(),
            tuple(weight.shape),
            "fp32",
            weight.aggregated,
        )
        for weight in image.layout
    )
    return ProtoModel(fl_name, instance, number, 0, params)
