"""A thin line from every rank to rank 0: who is there, orders, and bad news.

A collective operation cannot tell that a peer has died (over NCCL it waits for hours). A TCP connection can: the kernel closes it when the
process ends, by whatever signal, and its keep-alive probes notice a machine that is gone, however busy the process itself is. So every
rank holds one connection to rank 0. Whoever fails says why on it; rank 0 passes the first cause on; all leave within seconds, and one tells.

One JSON object a line. From a rank: {"hello": {"rank", "token", "host", "about"}}, {"failed": outcome}, {"bye": true}. From rank 0:
{"welcome": address}, {"order": ...}, {"abort": outcome}, {"heard": true}, {"bye": true}.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from dlmconvert.errors import EXIT_FAILED, EXIT_SAVED_RUN_AGAIN, Outcome, Told, UserError

JOIN_SECONDS = 600.0  # machines of a cluster do not start together
LEAVE_SECONDS = {EXIT_SAVED_RUN_AGAIN: 60.0}  # what a rank gets to leave by itself once it is known that the run ends
LEAVE_AFTER_FAILURE = 10.0
BETTER_NEWS_SECONDS = 3.0  # a rank that only lost a peer waits so long for the one that knows why
LATECOMERS_SECONDS = 20.0  # rank 0 fails before the others have come: it stays to tell them
FAREWELL_SECONDS = 2.0
KEEP_ALIVE = (10, 5, 4)  # a machine that has gone is noticed after 10 + 4 * 5 seconds of silence
AGAIN = "the same command continues from the newest checkpoint"
_LONGEST_LINE = 1 << 22
_lines: weakref.WeakSet = weakref.WeakSet()


def _forked() -> None:
    # A copy of the descriptor in a child would keep a dead rank's connection open.
    for line in list(_lines):
        line.close_sockets()


os.register_at_fork(after_in_child=_forked)


class _Line:
    """What both ends share: the news, and the clock that runs from then on."""

    def __init__(self, rank: int, count: int):
        self.rank, self.count = rank, count
        self.leave: Callable[[Outcome], None] = lambda outcome: os._exit(outcome.code)
        self._news: Outcome | None = None
        self._changed = threading.Condition()
        self._leaving = False
        _lines.add(self)

    @property
    def news(self) -> Outcome | None:
        """Why the run ends, as far as this rank is concerned; None while it goes on."""
        return self._news

    def _set_news(self, outcome: Outcome) -> None:
        with self._changed:
            if self._news is not None or self._leaving:
                return
            self._news = outcome
            self._changed.notify_all()
        seconds = LEAVE_SECONDS.get(outcome.code, LEAVE_AFTER_FAILURE)
        # Between training stages rank 0 works alone: first ask it as a scheduler would. A collective operation hears nothing.
        for delay, action in ((seconds / 2, lambda: os.kill(os.getpid(), signal.SIGTERM)), (seconds, lambda: self.leave(outcome))):
            timer = threading.Timer(delay, lambda action=action: self._leaving or action())
            timer.daemon = True
            timer.start()

    def check(self) -> None:
        """Raise Told when the run ends badly."""
        if self._news is not None:
            raise Told(self._news)

    def _cause(self, outcome: Outcome) -> Outcome:
        """What to tell of this rank's own end: news that came before it explain it, unless all leave as they were asked to."""
        news = self._news
        return outcome if news is None or outcome.code == news.code == EXIT_SAVED_RUN_AGAIN else news

    def _wait(self, seen: Callable[[], Any], seconds: float) -> bool:
        # In short turns: a condition in the main thread hears signals between them.
        until = time.monotonic() + seconds
        with self._changed:
            while not seen():
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.5))
        return True


@dataclass
class _Peer:
    socket: socket.socket
    rank: int | None = None
    host: str = ""
    about: dict[str, Any] | None = None
    received: bytes = b""
    parted: bool = False  # has said bye, or why it failed: that it goes is no news
    closed: bool = False

    @property
    def is_here(self) -> bool:
        """Whether the rank is on this machine."""
        return self.socket.getsockname()[0] == self.socket.getpeername()[0]


class Hub(_Line):
    """Rank 0's end. `address` says where the others reach it; `own_address` (after `gather`) where its machine is in their network."""

    def __init__(self, count: int, host: str, token: str):
        super().__init__(0, count)
        self.own_address = "127.0.0.1"
        if host in ("127.0.0.1", "localhost"):
            self._server = socket.create_server((host, 0), backlog=max(128, count))
        else:  # all interfaces: here the name may mean the loopback, while the others see another address
            both = socket.has_dualstack_ipv6()
            self._server = socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=max(128, count))
        self._server.setblocking(False)
        self.address = f"{host} {self._server.getsockname()[1]}"
        self._token = token
        self._peers: dict[int, _Peer] = {}
        self._second_hand: tuple[float, Outcome] | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def gather(self, refusal: Callable[[int, str, dict[str, Any]], Outcome | None], seconds: float = JOIN_SECONDS) -> None:
        """Wait for all ranks. refusal(rank, host, what it says about itself) -> why it may not take part, or None.

        Raises UserError when some do not come, Told when one is refused or fails.
        """
        complete = self._wait(lambda: self._news or len(self._peers) == self.count - 1, seconds)
        if self._news is None and not complete:
            missing = sorted(set(range(1, self.count)) - set(self._peers))
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            one = len(missing) == 1
            error = UserError(
                f"rank{'' if one else 's'} {shown} of {self.count} did not come within {seconds / 60:.0f} minutes",
                f"{'its process' if one else 'their processes'} did not start, or cannot reach {self.address.replace(' ', ':')} (a firewall?)",
                "look at the output of that machine, then run the same command again",
                exit_code=EXIT_FAILED,
            )
            self.failed(Outcome(error.exit_code, error.what, error.why, error.next_step))
            raise error
        if self._news is None:
            for rank in sorted(self._peers):
                refused = refusal(rank, self._peers[rank].host, self._peers[rank].about or {})
                if refused is not None:
                    self.failed(refused)
                    raise Told(refused)
        self.check()
        for peer in self._peers.values():
            if not peer.is_here:
                self.own_address = _plain(peer.socket.getsockname()[0])
        for peer in self._peers.values():
            self._broadcast({"welcome": self.own_address if peer.is_here else ""}, [peer])

    def order(self, what: dict[str, Any]) -> None:
        self._broadcast({"order": what})

    def failed(self, outcome: Outcome) -> Outcome:
        """This rank cannot go on: the others hear it. Returns what is to be told: the first cause, wherever it was."""
        if self._news is None and outcome.lost_peer:
            self._wait(lambda: self._news, BETTER_NEWS_SECONDS + 1)
        self._wait(lambda: self._news or len(self._peers) == self.count - 1, LATECOMERS_SECONDS)
        cause = self._cause(outcome)
        if self._news is None:
            self._broadcast({"abort": asdict(replace(cause, lost_peer=True, told=True))})
        self.close()
        return cause

    def close(self) -> None:
        """Leave; what was said is heard, and late messages of the others are read, so that the kernel resets no connection."""
        self._leaving = True
        self._broadcast({"bye": True})
        for peer in self._peers.values():
            with suppress(OSError):
                peer.socket.shutdown(socket.SHUT_WR)
        self._wait(lambda: all(peer.closed for peer in self._peers.values()), FAREWELL_SECONDS)
        self.close_sockets()

    def close_sockets(self) -> None:
        for peer in list(self._peers.values()):
            peer.socket.close()
        self._server.close()

    def _broadcast(self, message: dict[str, Any], peers: list[_Peer] | None = None) -> None:
        line = json.dumps(message).encode() + b"\n"
        for peer in list(self._peers.values()) if peers is None else peers:
            if not peer.closed:
                with suppress(OSError):  # its end is noticed where it is read
                    peer.socket.sendall(line)

    def _serve(self) -> None:
        while True:
            try:
                ready = self._selector.select(timeout=0.25)
            except (OSError, ValueError):
                return  # closed
            for key, _ in ready:
                try:
                    if key.data is None:
                        self._accept()
                    else:
                        self._read(key.data)
                except OSError:
                    if self._leaving and key.data is None:
                        return
            if self._second_hand is not None and time.monotonic() > self._second_hand[0]:
                self._heard(self._second_hand[1])
                self._second_hand = None
            if self._leaving and self._server.fileno() < 0:
                return

    def _accept(self) -> None:
        connection, _ = self._server.accept()
        _keep_alive(connection)
        connection.settimeout(20)
        self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.socket.recv(1 << 16)
        except OSError:
            data = b""
        peer.received += data
        *lines, peer.received = peer.received.split(b"\n")
        try:
            for line in lines:
                self._message(peer, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            data = b""  # a stranger
        if data and len(peer.received) < _LONGEST_LINE:
            return
        self._selector.unregister(peer.socket)
        with self._changed:
            peer.closed = True
            self._changed.notify_all()
        if peer.rank is None:
            peer.socket.close()
        elif not peer.parted:
            what = f"rank {peer.rank} of {self.count} on {peer.host} ended without a word"
            self._heard(Outcome(EXIT_FAILED, what, "it was killed (the system does that when memory runs out), or its machine has gone", AGAIN))

    def _message(self, peer: _Peer, message: dict[str, Any]) -> None:
        if "hello" in message:
            hello = message["hello"]
            rank = int(hello["rank"])
            if hello["token"] != self._token or not 0 < rank < self.count:
                raise ValueError("a stranger")
            peer.host, peer.about = str(hello["host"]), dict(hello["about"])
            if rank in self._peers:
                what = f"two processes say that they are rank {rank} of {self.count}, on {self._peers[rank].host} and on {peer.host}"
                self._heard(Outcome(EXIT_FAILED, what, "", "give every machine its own --node-rank"))
                raise ValueError("one too many")
            with self._changed:
                peer.rank = rank
                self._peers[rank] = peer
                self._changed.notify_all()
            if self._news is not None:
                self._broadcast({"abort": asdict(replace(self._news, told=True))}, [peer])
        elif peer.rank is None:
            raise ValueError("a stranger")
        elif "failed" in message:
            outcome = Outcome(**message["failed"])
            with suppress(OSError):
                peer.socket.sendall(json.dumps({"heard": True}).encode() + b"\n")
            if outcome.lost_peer:
                self._second_hand = self._second_hand or (time.monotonic() + BETTER_NEWS_SECONDS, outcome)
            else:
                where = f"rank {peer.rank} of {self.count} on {peer.host}: "
                self._heard(replace(outcome, what=where + outcome.what, lost_peer=True))
            peer.parted = True
        elif "bye" in message:
            peer.parted = True

    def _heard(self, outcome: Outcome) -> None:
        if self._news is None and not self._leaving:
            outcome = replace(outcome, lost_peer=True)
            self._broadcast({"abort": asdict(replace(outcome, told=True))})  # first: this rank hangs up once it knows
            self._set_news(outcome)


class Spoke(_Line):
    """The end of every other rank."""

    def __init__(self, rank: int, count: int, address: str, token: str, about: dict[str, Any]):
        super().__init__(rank, count)
        host, _, port = address.rpartition(" ")
        try:
            self._socket = socket.create_connection((host, int(port)), timeout=60)
        except OSError as error:
            raise UserError(
                f"rank {rank} of {count} cannot reach rank 0 at {host}:{port}", str(error), "open the network between the machines (any port)", exit_code=EXIT_FAILED
            ) from error
        self._socket.settimeout(None)
        _keep_alive(self._socket)
        self._orders: queue.SimpleQueue = queue.SimpleQueue()
        self.own_address = _plain(self._socket.getsockname()[0])
        self._welcome = self._heard = self._ended = False
        self._say({"hello": {"rank": rank, "token": token, "host": socket.gethostname(), "about": about}})
        threading.Thread(target=self._listen, daemon=True).start()

    def join(self, seconds: float = JOIN_SECONDS) -> None:
        """Wait until rank 0 has seen all. Raises Told when it refuses, or somebody failed."""
        self._wait(lambda: self._welcome or self._news, seconds + 60)
        self.check()

    def next_order(self) -> dict[str, Any]:
        """What rank 0 wants next, however long that takes. Raises Told when the run ends badly."""
        while True:
            with suppress(queue.Empty):
                return self._orders.get(timeout=0.2)
            self.check()

    def failed(self, outcome: Outcome) -> Outcome:
        """This rank cannot go on: rank 0 hears why. Returns what is to be told: `told` when rank 0 does that."""
        cause = self._cause(outcome)
        if cause is outcome:
            self._say({"failed": asdict(outcome)})
            if outcome.lost_peer:
                self._wait(lambda: self._news or self._ended, BETTER_NEWS_SECONDS + 2)
                cause = self._news or outcome
            else:
                self._wait(lambda: self._heard or self._ended, 5.0)
                cause = replace(outcome, told=self._heard or (self._news is not None and self._news.told))
        self.close()
        return cause

    def close(self) -> None:
        self._leaving = True
        self._say({"bye": True})
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
        self.close_sockets()

    def close_sockets(self) -> None:
        self._socket.close()

    def _say(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # rank 0 has gone: noticed where it is read
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        received = b""
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            received += data
            *lines, received = received.split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "order" in message:
                    self._orders.put(message["order"])
                elif "abort" in message:
                    self._set_news(Outcome(**message["abort"]))
                elif "bye" in message:
                    self._ended = True
                self.own_address = message.get("welcome") or self.own_address
                with self._changed:
                    self._welcome = self._welcome or "welcome" in message
                    self._heard = self._heard or "heard" in message
                    self._changed.notify_all()
            if not data:
                break
        if not self._leaving and not self._ended:
            what = f"rank 0 of {self.count} ended without a word"
            why = "it was killed (the system does that when memory runs out), or its machine has gone"
            self._set_news(Outcome(EXIT_FAILED, what, why, AGAIN, lost_peer=True, told=self.rank != 1))  # one of those left speaks
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def _plain(address: str) -> str:
    """An IPv4 address as such, also when it came over a socket for both kinds."""
    return address.removeprefix("::ffff:")


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle, interval, probes = KEEP_ALIVE
    for name, value in (("TCP_KEEPIDLE", idle), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", probes), ("TCP_USER_TIMEOUT", 1000 * (idle + interval * probes))):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
