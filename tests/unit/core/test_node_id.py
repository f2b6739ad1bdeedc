"""What a node's id tells of others at its address."""

from fedcore.core.node_id import replaced

ME = "10.0.0.1:6000::2026-01-02-00:00:00.000.000::10002"
BEFORE = "10.0.0.1:6000::2026-01-01-00:00:00.000.000::10001"
NEIGHBOUR = "10.0.0.1:6001::2026-01-01-00:00:00.000.000::10001"
ELSEWHERE = "10.0.0.2:6000::2026-01-01-00:00:00.000.000::10001"


def test_who_listened_at_a_nodes_address_before_it_is_gone() -> None:
    assert replaced([ME, BEFORE, NEIGHBOUR, ELSEWHERE, ""], [ME]) == {BEFORE}


def test_a_node_whose_id_tells_no_address_has_none() -> None:
    assert replaced(["", "worker-1"], ["worker-2", ""]) == set()
