"""The control plane of a ring: a TCP connection between every two ranks, which tells at once who is there.

Data moves through torch's process groups, which notice a dead neighbour but not a dead stranger, match messages by
order alone, and cannot say who broke. So before each pass every rank hands every other a header; a header that differs,
a closed connection, a notice of failure or silence beyond the deadline ends the pass. Frames have a fixed length.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

import attrs

from .deadlines import read_store, seconds_left

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_FRAME: Final = struct.Struct("!4sBIQB16sIIBIQ")
_HELLO: Final = struct.Struct("!16sI")
_MAGIC: Final = b"daR1"
_HEADER, _NOTICE, _GOODBYE = 0, 1, 2
NOBODY: Final = 0xFFFFFFFF
DTYPES: Final = ("float64", "float32", "bfloat16", "float16")


@attrs.frozen(kw_only=True)
class Header:
    """What all ranks of a pass must agree on.

    Attributes:
        generation: of the communicator.
        step: the pass, counted from 1.
        kind: what is exchanged: 0 rows forward, 1 gradients back, 2 and 3 the same hop by hop.
        digest: 16 bytes that identify configuration and length.
        batch: batch size.
        length: tokens of a shard.
        dtype: its place in `DTYPES`.
        attention: which of those that the ranks have built.
        call: the pass of the forward that this one belongs to; 0 where it is one itself.
    """

    generation: int
    step: int
    kind: int
    digest: bytes
    batch: int
    length: int
    dtype: int
    attention: int = 0
    call: int = 0

    def frame(self) -> bytes:
        """The header as it travels."""
        return _FRAME.pack(_MAGIC, _HEADER, *attrs.astuple(self))

    def difference(self, other: Header) -> str:
        """The first thing that the rank of `other` does otherwise, which what follows may come of."""
        pairs = zip(other._words(), self._words(), strict=True)
        it, this = next(((it, this) for it, this in pairs if it != this), ("has another configuration", "has its own"))
        return f"it {it} where this rank {this}: all ranks must make the same calls in the same order"

    def _words(self) -> Iterator[str]:
        yield f"is in generation {self.generation}"
        yield f"is in a {'backward' if self.kind % 2 else 'forward'} pass"
        yield f"calls number {self.attention} of the attentions built"
        yield f"goes back through pass {self.call}" if self.call else "calls for the first time"
        yield f"has a shard of {self.length} tokens"
        yield f"has a batch of {self.batch}"
        yield f"has {DTYPES[self.dtype]}"
        yield f"is in pass {self.step}"
        yield f"has rows that {'travel hop by hop' if self.kind > 1 else 'are fetched'}"


class Failure(Exception):  # noqa: N818 - never leaves this folder: communicators turn it into RingBroken
    """What a pass failed of: `peer` is who did, or None where that is not known.

    `is_certain` where that rank was seen to fail; otherwise it may have closed because another one did.
    """

    def __init__(self, peer: int | None, reason: str, *, is_certain: bool = False) -> None:
        super().__init__(reason)
        self.peer = peer
        self.reason = reason
        self.is_certain = is_certain

    def again(self) -> Failure:
        """The same, to be raised where this one is kept: a traceback keeps what callers compute."""
        return Failure(self.peer, self.reason, is_certain=self.is_certain)


class Control:
    """Connections from one rank to all others."""

    def __init__(self, rank: int, sockets: dict[int, socket.socket]) -> None:
        self.rank = rank
        self._sockets = sockets
        self._buffers = {peer: bytearray() for peer in sockets}
        self._watched: selectors.BaseSelector | None = None
        self.bytes_sent = 0

    @classmethod
    def connect(cls, store: Store, rank: int, size: int, deadline: float) -> Control:
        """Connect every two ranks through addresses left in `store`.

        Raises:
            OSError: a connection was refused, or was not there by the deadline (`time.monotonic`).
            RuntimeError: the store failed, or an address was not there by the deadline.
        """
        sockets: dict[int, socket.socket] = {}
        with socket.create_server(("", 0), backlog=size) as server:
            if rank == 0:
                store.set("secret", secrets.token_hex(8))
            store.set(f"address/{rank}", f"{_own_address(store)}:{server.getsockname()[1]}")
            try:
                secret = read_store(store, "secret", deadline)
                for peer in range(rank):
                    host, _, port = read_store(store, f"address/{peer}", deadline).decode().rpartition(":")
                    link = socket.create_connection((host, int(port)), timeout=seconds_left(deadline))
                    sockets[peer] = link
                    link.sendall(_HELLO.pack(secret, rank))
                while len(sockets) < size - 1:
                    server.settimeout(seconds_left(deadline))
                    link, _ = server.accept()
                    link.settimeout(seconds_left(deadline))
                    guest = _welcome(link, secret)
                    if guest is None or guest in sockets or not rank < guest < size:
                        link.close()  # a stranger
                        continue
                    sockets[guest] = link
            except BaseException:
                for link in sockets.values():
                    link.close()
                raise
        for link in sockets.values():
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.setblocking(False)
        return cls(rank, sockets)

    @property
    def peers(self) -> tuple[int, ...]:
        """The other ranks."""
        return tuple(self._buffers)

    def announce(self, header: Header) -> None:
        """Send `header` to everyone, without waiting.

        Raises:
            Failure: a rank is gone.
        """
        self._send_all(header.frame())

    def agree(self, header: Header, deadline: float) -> None:
        """Wait for everyone's header, which must be `header`, as announced.

        Raises:
            Failure: a rank is gone, has failed, is elsewhere, or is silent at the deadline.
        """
        missing = set(self._sockets)
        with selectors.DefaultSelector() as selector:
            for peer, link in self._sockets.items():
                selector.register(link, selectors.EVENT_READ, peer)
            while True:
                for peer in [peer for peer in missing if len(self._buffers[peer]) >= _FRAME.size]:
                    self._check(peer, header)
                    missing.discard(peer)
                if not missing:
                    break
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise _silent(missing)
                for key, _ in ready:
                    peer, there = key.data, self._receive(key.data)
                    if peer not in missing:
                        self._heed(peer)
                    elif not there and len(self._buffers[peer]) < _FRAME.size:
                        raise Failure(peer, "it is gone (its connection is closed)", is_certain=True)
                    if not there:
                        selector.unregister(key.fileobj)
        self._read()  # one that is late may find that another has given up; one that is gone may just be done
        for peer, buffer in self._buffers.items():
            if buffer:
                self._heed(peer)

    def look(self) -> None:
        """Read what is there, without waiting; headers of the next pass are kept for `agree`.

        Raises:
            Failure: a rank says that one has failed, or is gone without a word.
        """
        for peer, there in self._read():
            self._heed(peer)
            if not there and not self._has_left(peer):
                raise Failure(peer, "it is gone (its connection is closed)")

    def _read(self) -> list[tuple[int, bool]]:
        """Read what is there; returns of whom, and whether the connection is still open."""
        if self._watched is None:  # made once, since passes are looked at often and peers may be many
            self._watched = selectors.DefaultSelector()
            for peer, link in self._sockets.items():
                self._watched.register(link, selectors.EVENT_READ, peer)
        return [(key.data, self._receive(key.data)) for key, _ in self._watched.select(0)]

    def _heed(self, peer: int) -> None:
        """Raise `Failure` where what was read of `peer` tells of one."""
        notice = self._find_notice(peer)
        if notice is not None:
            raise Failure(*notice, is_certain=True)

    def blame(self, patience_s: float) -> tuple[int | None, str] | None:
        """Who failed first and of what, where another rank has told or vanished within `patience_s`."""
        deadline = time.monotonic() + patience_s
        gone: tuple[int, str] | None = None
        with selectors.DefaultSelector() as selector:
            for peer, link in self._sockets.items():
                selector.register(link, selectors.EVENT_READ, peer)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    peer = key.data
                    if not self._receive(peer):
                        gone = gone if gone or self._has_left(peer) else (peer, "it is gone")
                        selector.unregister(key.fileobj)
                    notice = self._find_notice(peer)
                    if notice is not None:
                        return notice
                if gone is not None:
                    deadline = min(deadline, time.monotonic() + patience_s / 5)  # its last words may still be under way
        return gone

    def close(self, culprit: int | None, *, failed: bool) -> None:
        """Tell the others who failed, or that this rank leaves in peace, and close all connections."""
        self.tell_end(culprit, failed=failed)
        self.abandon()

    def tell_end(self, culprit: int | None, *, failed: bool) -> None:
        """Tell the others who failed, or that this rank leaves in peace."""
        kind = _NOTICE if failed else _GOODBYE
        who = NOBODY if culprit is None else culprit
        frame = _FRAME.pack(_MAGIC, kind, 0, 0, 0, bytes(16), who, 0, 0, 0, 0)
        for link in self._sockets.values():
            try:
                link.send(frame)
            except OSError:
                continue  # it is gone, which is why we close

    def await_ends(self, deadline: float) -> None:
        """Wait until every other rank has left in peace or is gone, until the deadline at the longest."""
        with selectors.DefaultSelector() as selector:
            for peer, link in self._sockets.items():
                if not self._has_left(peer):
                    selector.register(link, selectors.EVENT_READ, peer)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if not self._receive(key.data) or self._has_left(key.data):
                        selector.unregister(key.fileobj)

    def abandon(self) -> None:
        """Close all connections without a word."""
        if self._watched is not None:
            self._watched.close()
        for link in self._sockets.values():
            link.close()
        self._sockets = {}

    def _send_all(self, frame: bytes) -> None:
        for peer, link in self._sockets.items():
            try:
                sent = link.send(frame)
            except OSError as error:
                raise Failure(peer, f"it is gone ({error})") from error  # or it left a notice first
            if sent != len(frame):
                raise Failure(peer, "it is many passes behind", is_certain=True)
            self.bytes_sent += sent

    def _receive(self, peer: int) -> bool:
        """Read what is there; False where the connection has ended."""
        try:
            data = self._sockets[peer].recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._buffers[peer] += data
        return bool(data)

    def _check(self, peer: int, header: Header) -> None:
        """Take one frame of `peer`, which must be our header."""
        frame = bytes(self._buffers[peer][: _FRAME.size])
        del self._buffers[peer][: _FRAME.size]
        magic, kind, *fields = _FRAME.unpack(frame)
        if magic != _MAGIC:
            raise Failure(
                peer, "it sends what another version of dilated_attention may, or a stranger", is_certain=True
            )
        if kind == _GOODBYE:
            raise Failure(peer, "it has closed its attention while others still use theirs", is_certain=True)
        if kind == _NOTICE:
            raise Failure(*_blamed(peer, fields[4]), is_certain=True)
        theirs = Header(**dict(zip(attrs.fields_dict(Header), fields, strict=True)))
        if theirs != header:
            raise Failure(peer, header.difference(theirs), is_certain=True)

    def _find_notice(self, peer: int) -> tuple[int | None, str] | None:
        """The failure that the frames read from `peer` tell of."""
        return next((_blamed(peer, fields[4]) for kind, fields in self._frames(peer) if kind == _NOTICE), None)

    def _has_left(self, peer: int) -> bool:
        """`peer` has said that it leaves in peace."""
        return any(kind == _GOODBYE for kind, _ in self._frames(peer))

    def _frames(self, peer: int) -> Iterator[tuple[int, list[int]]]:
        """Kind and fields of the whole frames read from `peer`."""
        buffer = self._buffers[peer]
        for begin in range(0, len(buffer) - _FRAME.size + 1, _FRAME.size):
            _, kind, *fields = _FRAME.unpack(bytes(buffer[begin : begin + _FRAME.size]))
            yield kind, fields


def _silent(missing: Iterable[int]) -> Failure:
    """Ranks that have not been heard of at the deadline."""
    first, *others = sorted(missing)
    more = f", nor did ranks {', '.join(map(str, others))}" if others else ""
    reason = f"rank {first} did not make this call before the timeout{more}"
    return Failure(None if others else first, reason, is_certain=True)


def _blamed(peer: int, who: int) -> tuple[int | None, str]:
    if who == NOBODY:
        return None, f"rank {peer} says that it waited in vain, and not for whom"
    if who == peer:
        return peer, "it failed, and said so"
    return who, f"rank {peer} says that it failed"


def _welcome(link: socket.socket, secret: bytes) -> int | None:
    """The rank of who has connected, if it knows the secret."""
    data = bytearray()
    while len(data) < _HELLO.size:
        part = link.recv(_HELLO.size - len(data))
        if not part:
            return None
        data += part
    said, peer = _HELLO.unpack(bytes(data))
    return int(peer) if secrets.compare_digest(said, secret) else None


def _own_address(store: Store) -> str:
    """Where others reach this host: the address from which it reaches the store, or that of its own name."""
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, TCPStore):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((store.host, store.port))  # sends nothing
            return str(probe.getsockname()[0])
    return socket.gethostbyname(socket.gethostname())
