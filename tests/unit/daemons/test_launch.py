"""What all daemons share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from fldaemons import launch


@pytest.fixture
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_garbage_collections_pass_over_what_stays(as_before: None) -> None:
    """That makes them short: they hold up the reactor."""
    stays: list[object] = []
    launch.set_apart_what_stays()
    comes: list[object] = []
    looked_through = gc.get_objects()
    assert not any(one is stays for one in looked_through)
    assert any(one is comes for one in looked_through)
    assert len(looked_through) < gc.get_freeze_count() / 10
