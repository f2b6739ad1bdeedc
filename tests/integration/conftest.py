"""What the tests against a real Redis share; see redis_fixture.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from integration.redis_fixture import PrivateRedis, ReactorThread, private_redis, redis_client

from fedcore.store.redis import Redis


@pytest.fixture(scope="session")
def loop() -> ReactorThread:
    """The reactor of this process."""
    return ReactorThread()


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    """A redis-server for all tests that do it no harm; each uses keys of its own."""
    with private_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def redis(loop: ReactorThread, shared_server: PrivateRedis) -> Iterator[Redis]:
    """A connection to the shared redis-server."""
    with redis_client(loop, shared_server.port) as redis:
        loop.run(redis.connected())
        yield redis


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    """A redis-server for one test, which may do with it what it likes."""
    with private_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server
