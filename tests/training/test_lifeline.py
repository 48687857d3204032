"""The line between ranks: the first cause reaches all, one tells it, and nobody is left waiting. Here with threads for ranks."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest

from dlmconvert import __version__
from dlmconvert.errors import EXIT_SAVED_RUN_AGAIN, Outcome, Told, UserError
from dlmconvert.runs.follow import refusal_by
from dlmconvert.training import lifeline
from dlmconvert.training.lifeline import Hub, Spoke

VERSIONS = {"dlmconvert": __version__, "torch": "2.9.0"}
ME = {"versions": VERSIONS, "recipe": {"train.steps": 8, "train.seed": 0}}
FULL = Outcome(1, "the disk is full", "why", "next")
LOST = Outcome(1, "another rank has gone: Connection closed by peer", lost_peer=True)


@pytest.fixture(autouse=True)
def nobody_ends_this_process(monkeypatch):
    monkeypatch.setattr(lifeline.os, "kill", lambda pid, number: None)
    monkeypatch.setattr(lifeline, "FAREWELL_SECONDS", 0.1)
    monkeypatch.setattr(lifeline, "LATECOMERS_SECONDS", 2.0)
    yield
    for line in list(lifeline._lines):
        line._leaving = True  # else it makes an end, ten seconds later


@pytest.fixture
def line():
    """(hub, spokes) of so many ranks that have met."""
    made = []

    def connect(count, abouts=None, meet=True, seconds=10.0):
        hub = Hub(count, "127.0.0.1", "token")
        spokes = [Spoke(rank, count, hub.address, "token", (abouts or {}).get(rank, ME)) for rank in range(1, count)]
        for one in (hub, *spokes):
            one.leave = lambda outcome: None
        made.extend([*spokes, hub])
        if meet:
            hub.gather(refusal_by(ME, count), seconds)
            for spoke in spokes:
                spoke.join(10)
        return hub, spokes

    yield connect
    for one in made:
        one.close()


def test_the_address_by_which_machines_see_each_other(line, monkeypatch):
    """A host's name may mean the loopback on the host itself: what counts is where a connection from elsewhere arrived."""
    hub = Hub(3, "localhost.", "token")  # not literally the loopback: it listens on all interfaces, for both kinds of address
    port = hub.address.split()[1]
    far = Spoke(1, 3, f"127.0.0.1 {port}", "token", ME)
    monkeypatch.setattr(lifeline._Peer, "is_here", property(lambda peer: peer.rank == 2))
    near = Spoke(2, 3, f"127.0.0.3 {port}", "token", ME)
    hub.gather(refusal_by(ME, 3), 10)
    far.join(10), near.join(10)
    assert hub.own_address == far.own_address == near.own_address == "127.0.0.1"
    for end in (far, near, hub):
        end.close()


def eventually(seen, seconds=10.0):
    until = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_orders_come_in_order_and_all_leave_quietly(line):
    hub, spokes = line(3)
    for number in range(50):
        hub.order({"number": number})
    assert all([spoke.next_order()["number"] for _ in range(50)] == list(range(50)) for spoke in spokes)
    for end in (*spokes, hub):
        end.close()
    assert hub.news is None and all(spoke.news is None for spoke in spokes)


def test_the_cause_is_told_once_with_its_rank(line):
    """Rank 2 fails; what ranks 0 and 1 notice of it (a lost peer) is not what is told."""
    hub, (one, two) = line(3)
    told = {}
    threads = [threading.Thread(target=lambda rank, end: told.update({rank: end.failed(LOST)}), args=pair) for pair in ((0, hub), (1, one))]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    told[2] = two.failed(FULL)
    for thread in threads:
        thread.join()
    what = f"rank 2 of 3 on {socket.gethostname()}: the disk is full"
    assert told[0].what == what and (told[0].why, told[0].next_step, told[0].told) == ("why", "next", False)
    assert told[1].what == what and told[1].told and told[2].told


@pytest.mark.parametrize("count", [2, 4])
def test_a_rank_that_vanishes(line, count):
    """No farewell: its connection says it, although everybody else only waits."""
    hub, spokes = line(count)
    spokes[-1]._socket.shutdown(socket.SHUT_RDWR)
    eventually(lambda: hub.news)
    assert f"rank {count - 1} of {count} on" in hub.news.what and "ended without a word" in hub.news.what
    for spoke in spokes[:-1]:
        with pytest.raises(Told) as caught:
            spoke.next_order()
        assert caught.value.outcome.told
    with pytest.raises(Told):
        hub.check()


def test_rank_0_vanishes_and_one_of_the_others_speaks(line):
    hub, spokes = line(4)
    hub._leaving = True  # it says nothing more
    for peer in hub._peers.values():
        peer.socket.shutdown(socket.SHUT_RDWR)
    told = [spoke.failed(LOST) for spoke in spokes]
    assert all("rank 0 of 4 ended without a word" in outcome.what for outcome in told)
    assert [outcome.told for outcome in told] == [False, True, True]


def test_leaving_as_asked_is_no_failure(line):
    hub, (spoke,) = line(2)
    saved = Outcome(EXIT_SAVED_RUN_AGAIN, "SIGTERM: saved at step 3 and left")
    assert spoke.failed(saved).told
    assert hub.failed(saved) == saved


def test_who_does_not_leave_is_made_to(line, monkeypatch):
    """A collective operation that hears nothing: first a signal, then the end."""
    monkeypatch.setattr(lifeline, "LEAVE_AFTER_FAILURE", 0.2)
    signals, ends = [], []
    monkeypatch.setattr(lifeline.os, "kill", lambda pid, number: signals.append((pid, number)))
    hub, (spoke,) = line(2)
    hub.leave = ends.append
    spoke.failed(FULL)
    eventually(lambda: ends)
    assert signals[0] == (os.getpid(), signal.SIGTERM) and "the disk is full" in ends[0].what


@pytest.mark.parametrize(
    ("theirs", "what", "why"),
    [
        (ME | {"versions": VERSIONS | {"torch": "2.8.1"}}, "was started with torch 2.8.1, rank 0 with torch 2.9.0", ""),
        (ME | {"versions": VERSIONS | {"dlmconvert": "0.0.9"}}, f"dlmconvert 0.0.9, rank 0 with dlmconvert {__version__}", ""),
        (ME | {"recipe": {"train.steps": 9, "train.seed": 0}}, "another recipe than rank 0", "train.steps: 9 there, 8 at rank 0"),
        ({"failed": {"code": 2, "what": "no such recipe file: a.yaml"}}, "no such recipe file: a.yaml", ""),
    ],
)
def test_another_recipe_or_version_is_refused_by_its_rank(line, theirs, what, why):
    hub, spokes = line(3, {2: theirs}, meet=False)
    with pytest.raises(Told) as caught:
        hub.gather(refusal_by(ME, 3), 10)
    assert caught.value.outcome.what.startswith("rank 2 of 3 on ") and what in caught.value.outcome.what and why in caught.value.outcome.why
    for spoke in spokes:
        with pytest.raises(Told) as caught:
            spoke.join(10)
        assert caught.value.outcome.told and what in caught.value.outcome.what


def test_those_who_do_not_come_are_named(line):
    hub, spokes = line(3, meet=False)
    spokes[0].close()
    hub = Hub(4, "127.0.0.1", "token")
    here = Spoke(2, 4, hub.address, "token", ME)
    with pytest.raises(UserError, match="ranks 1, 3 of 4 did not come"):
        hub.gather(refusal_by(ME, 4), 0.3)
    with pytest.raises(Told, match="did not come"):
        here.join(10)


def test_rank_0_stays_to_tell_those_who_come_late():
    hub = Hub(2, "127.0.0.1", "token")
    told = []
    thread = threading.Thread(target=lambda: told.append(hub.failed(FULL)))
    thread.start()
    time.sleep(0.1)
    late = Spoke(1, 2, hub.address, "token", ME)
    with pytest.raises(Told, match="the disk is full"):
        late.join(10)
    late.close()
    thread.join()
    assert told == [FULL]


def test_strangers_and_doubles(line):
    hub, _ = line(3, meet=False)
    stranger = socket.create_connection(tuple(hub.address.split()))
    stranger.sendall(b'GET / HTTP/1.1\r\n\r\n{"hello": 1}\n')
    assert stranger.recv(100) == b""  # hung up, and nothing else
    assert hub.news is None
    wrong = Spoke(1, 3, hub.address, "another token", ME)
    eventually(lambda: wrong.news)
    assert hub.news is None
    double = Spoke(2, 3, hub.address, "token", ME)
    eventually(lambda: hub.news)
    assert "two processes say that they are rank 2 of 3" in hub.news.what
    stranger.close()
    wrong.close(), double.close()


def test_a_forked_helper_does_not_keep_the_line_open(line):
    hub, (spoke,) = line(2)
    pid = os.fork()
    if not pid:
        time.sleep(30)
        os._exit(0)
    try:
        spoke._socket.shutdown(socket.SHUT_WR)
        spoke.close_sockets()
        eventually(lambda: hub.news, 5)
    finally:
        signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL)
        os.waitpid(pid, 0)
