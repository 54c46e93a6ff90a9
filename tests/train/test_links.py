"""What ranks tell each other comes whole or not at all; a stranger is let go."""

import json
import socket
from collections.abc import Iterator

import pytest

from lst.train.links import Link


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Of a connection that holds little."""
    first, second = socket.socketpair()
    for end in (first, second):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with first, second:
        yield first, second


class Partial(socket.socket):
    """Takes a message in parts, as TCP does where there is room for some of it."""

    room = 0

    def send(self, data: bytes, flags: int = 0) -> int:  # type: ignore[override]
        if not self.room:
            raise BlockingIOError
        data = data[: self.room]
        self.room -= len(data)
        return super().send(data, flags)


def test_messages_that_fit_in_part_do_not_spoil_those_after_them(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """A rank that reads nothing for hours, and then all."""
    narrow = Partial(fileno=ends[0].detach())
    sender, receiver = Link(narrow), Link(ends[1])
    heard = []
    for number in range(40):
        narrow.room += 7
        sender.send({"number": number})
        heard += receiver.receive()
    narrow.room = 1000
    sender.send({"number": 40})
    heard += receiver.receive()
    assert not receiver.closed
    numbers = [message["number"] for message in heard]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 40
    assert 10 < len(numbers) < 40  # the others were dropped
    narrow.close()


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.0\r\n", b"1\n", b"[]\n", b"null\n", b"\xff\n", b"[" * 50_000 + b"\n"]
)
def test_a_stranger_is_let_go(ends: tuple[socket.socket, socket.socket], said: bytes) -> None:
    link = Link(ends[0])
    ends[1].setblocking(False)
    while said and not link.closed:
        said = said[ends[1].send(said) :]
        assert link.receive() == []
    assert link.closed


def test_messages_come_in_order_however_they_are_cut(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    link, messages = Link(ends[0]), [{"beat": {"at": "ä:1"}}, {"bye": True}]
    heard = []
    for byte in b"".join(json.dumps(each).encode() + b"\n" for each in messages):
        ends[1].send(bytes([byte]))
        heard += link.receive()
    assert heard == messages
    assert not link.closed
    ends[1].close()
    assert link.receive() == []
    assert link.closed
