"""What ``fl state --watch`` takes note of, how it reads figures, and how it shows both."""

import io
import threading
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import click
import pytest
from rich.console import Console

from fedcore.config import Address
from fedcore.core.iteration import Phase
from fedcore.observe.metrics import CommonMetrics, ServerMetrics
from fedctl import watch
from fedctl.processes import free_ports
from fedctl.watch import Board, Figures, LocalServers, Look, Member, Node, PlainView, TerminalView, note

NOW = datetime(2026, 1, 2, 3, 4, 5)
LATER = NOW + timedelta(seconds=2)
A = Node("10.0.0.7:6766::1", "SERVER", "10.0.0.7:6766")
B = Node("10.0.0.7:6767::2", "SERVER", "10.0.0.7:6767")
FIGURES = Figures(4, "collecting", {"startFLJob": (7, 10), "updateModel": (3, 8)}, 2, 1)
TOLD = "serverd-0: iteration 4 collecting, startFLJob 7 of 10, updateModel 3 of 8; 2 valid, 1 failed"


def board_after(*looks):
    board = Board()
    for look in looks:
        board, _ = note(board, look, NOW)
    return board


# ---- changes


def test_the_first_look_tells_all():
    board, changes = note(Board(), Look("", "CLUSTER_READY", (A,), {0: FIGURES}), NOW)
    assert changes == ["CLUSTER_READY", f"here: {A}", TOLD]
    assert str(A) == "SERVER 10.0.0.7:6766 (10.0.0.7:6766::1)"
    assert board.members == (Member(A, None),)


def test_the_same_again_is_no_change():
    look = Look("", "CLUSTER_READY", (A,), {0: FIGURES})
    board = board_after(look)
    assert note(board, look, LATER) == (board, [])


def test_coming_and_going():
    board = board_after(Look("", "CLUSTER_READY", (A,)))
    board, changes = note(board, Look("", "CLUSTER_READY", (B,)), LATER)
    assert changes == [f"joined: {B}", f"gone: {A}"]
    assert board.members == (Member(A, None, LATER), Member(B, LATER))
    assert board.alive == (B,)
    assert note(board, Look("", "CLUSTER_READY", (B,)), LATER) == (board, [])


def test_who_comes_back_is_told_again():
    board = board_after(Look("", "S", (A,)), Look("", "S"))
    board, changes = note(board, Look("", "S", (A,)), LATER)
    assert changes == [f"joined: {A}"]
    assert board.members == (Member(A, None, NOW), Member(A, LATER))
    board, changes = note(board, Look("", "S"), LATER)
    assert changes == [f"gone: {A}"]
    assert board.members == (Member(A, None, NOW), Member(A, LATER, LATER))


def test_only_the_last_that_left_are_remembered():
    board = Board()
    for k in range(20):
        board, _ = note(board, Look("", "S", (Node(str(k), "SERVER", ""),)), NOW)
    assert [member.node.node_id for member in board.members] == ["14", "15", "16", "17", "18", "19"]


def test_in_trouble_the_old_stays_and_servers_are_followed():
    board = board_after(Look("", "CLUSTER_READY", (A,), {0: FIGURES}))
    board, changes = note(board, Look("away", servers={0: FIGURES}), LATER)
    assert changes == ["away"]
    assert (board.state, board.alive, board.trouble) == ("CLUSTER_READY", (A,), "away")
    board, changes = note(board, Look("away"), LATER)
    assert changes == ["serverd-0: no answer"]
    board, changes = note(board, Look("", "CLUSTER_FINISH", (A,)), LATER)
    assert changes == ["the scheduler answers again", "CLUSTER_FINISH"]


def test_nodes_found_after_a_trouble_at_the_start_were_there_before():
    board = board_after(Look("away"), Look("", "S", (A,)))
    assert board.members == (Member(A, None),)


def test_a_server_before_its_first_iteration():
    none = Figures(0, "", {"startFLJob": (0, 0), "updateModel": (0, 0)}, 0, 0)
    assert note(board_after(Look()), Look(servers={1: none}), NOW)[1] == [
        "serverd-1: has not joined the job yet"
    ]


def test_a_server_whose_phase_is_not_known():
    figures = Figures(1, "", FIGURES.counts, 0, 0)
    assert str(figures).startswith("iteration 1, startFLJob 7 of 10")


# ---- figures


def metrics():
    """The metrics of a real server."""
    own = ServerMetrics()
    own.iteration.set(4)
    own.show_phase(Phase.COLLECTING)
    for asked, counted, needed in (("startFLJob", 7, 10), ("updateModel", 3, 8)):
        own.counts.labels(asked).set(counted)
        own.quorums.labels(asked).set(needed)
    own.iterations.labels("valid").inc(2)
    own.iterations.labels("failed").inc()
    return own


def test_figures_of_a_server():
    assert watch.figures_of(metrics().render().decode()) == FIGURES
    assert watch.figures_of(ServerMetrics().render().decode()) == Figures(
        0, "", {"startFLJob": (0, 0), "updateModel": (0, 0)}, 0, 0
    )


def test_others_have_no_figures():
    assert watch.figures_of(CommonMetrics("schedulerd").render().decode()) is None
    with pytest.raises(ValueError):
        watch.figures_of("<html>\n")


@contextmanager
def admin_listener(body):
    """An admin listener that gives metrics."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/metrics"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_servers_of_this_host_are_found_by_their_node_ports():
    others = (
        Node("w", "WORKER", "10.0.0.7:6767"),
        Node("x", "SERVER", ""),
        Node("y", "SERVER", "10.0.0.7:9999"),
    )
    with admin_listener(metrics().render()) as port:
        local = LocalServers(6766, Address("127.0.0.1", port - 1))  # so that instance 1 answers
        assert local.ask((B, *others)) == {1: FIGURES}
        assert LocalServers(6766, Address("127.0.0.1", port)).ask((A,)) == {0: FIGURES}
        assert local.ask(others) == local.ask(()) == {}
        assert LocalServers(6766, Address("127.0.0.1", 65535)).ask((B,)) == {}  # there is no such port


@pytest.mark.parametrize("body", [b"<html>", b"\xff", b""])
def test_who_gives_no_metrics_is_no_server(body):
    with admin_listener(body) as port:
        assert LocalServers(6766, Address("127.0.0.1", port)).ask((A,)) == {}


def test_nobody_answers():
    assert LocalServers(6766, Address("127.0.0.1", free_ports(1)[0])).ask((A,)) == {}


# ---- showing


def test_plain_lines(capsys):
    with PlainView() as view:
        view.show(Board(), ["one", "two"], NOW)
        view.show(Board(), [], LATER)
        view.show(Board(), ["three"], LATER)
    assert capsys.readouterr().out == "03:04:05 one\n03:04:05 two\n03:04:07 three\n"


def test_a_terminal():
    board = board_after(Look("", "CLUSTER_READY", (A, B), {0: FIGURES}))
    board, _ = note(board, Look("the scheduler [is] away"), NOW)
    board, _ = note(board, Look("", "CLUSTER_READY", (B,), {0: FIGURES}), LATER)
    board, changes = note(board, Look("the scheduler [is] away", servers={0: FIGURES}), LATER)
    console = Console(force_terminal=True, width=120, height=40, record=True, file=io.StringIO())
    with TerminalView(console) as view:
        view.show(Board(), [], NOW)
        view.show(board_after(Look("", "CLUSTER_READY")), [], NOW)
        view.show(board, changes, LATER)
    text = console.export_text()
    assert "no node is alive" in text
    last = text[text.rindex("03:04:07  CLUSTER_READY") :]
    assert "the scheduler [is] away" in last
    gone, there = (next(row for row in last.splitlines() if node.node_id in row) for node in (A, B))
    assert gone.split("│")[4:6] == [" before ", " 03:04:07 "]
    assert there.split("│")[4:6] == [" before ", "          "]
    assert "serverd-0" in last and "7 of 10" in last and "collecting" in last


def test_a_pipe_gets_plain_lines():
    assert isinstance(watch.view_for(Console(file=io.StringIO())), PlainView)
    assert isinstance(watch.view_for(Console(force_terminal=True, file=io.StringIO())), TerminalView)


# ---- the loop


class Recording:
    """A view that keeps what it is shown and ends the watch as Ctrl-C does."""

    def __init__(self, looks):
        self.left, self.changes = looks, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.left = None

    def show(self, board, changes, now):
        self.changes.append(changes)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_watch_goes_on_without_the_scheduler_and_ends_quietly():
    answers = iter([{"cluster_state": "S", "nodes": [{"node_id": "n", "role": "SERVER"}]}, None, {}])

    def ask():
        answer = next(answers)
        if answer is None:
            raise click.ClickException("away")
        return answer

    view = Recording(3)
    watch.watch(ask, None, 0.001, view)
    assert view.changes == [
        ["S", "here: SERVER - (n)"],
        ["away"],
        ["the scheduler answers again", "the state is unknown", "gone: SERVER - (n)"],
    ]
    assert view.left is None


def test_figures_are_asked_for_while_the_scheduler_is_away():
    def away():
        raise click.ClickException("away")

    answers = iter([{"nodes": [{"node_id": A.node_id, "role": "SERVER", "tcp_address": A.address}]}])
    with admin_listener(metrics().render()) as port:
        view = Recording(2)
        local = LocalServers(6766, Address("127.0.0.1", port))
        watch.watch(lambda: next(answers, None) or away(), local, 0.001, view)
    assert view.changes == [["the state is unknown", f"here: {A}", TOLD], ["away"]]
