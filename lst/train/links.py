"""Connections over which the ranks' watchdogs talk, beside the collectives of training.

::

    rank 0 ◂── a connection each ──▸ rank 1, 2, … n − 1        JSON objects, one a line

They are the watchdogs' own: a collective that hangs does not hold them up, and the operating system
closes them when a process dies. The address travels once, through the process group.
"""

import json
import os
import secrets
import socket
from typing import Any

from lst.train.distributed import World

Message = dict[str, Any]

CONNECT_SECONDS = 20.0


class Link:
    """One end of a connection. Never waits; a message that does not fit is dropped as a whole."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.closed = False
        self._inbox = b""
        self._rest = b""  # of a message that fitted in part

    def send(self, message: Message) -> None:
        line = json.dumps(message).encode() + b"\n"
        try:
            if self._rest:
                self._rest = self._rest[self.socket.send(self._rest) :]
            if not self._rest:
                self._rest = line[self.socket.send(line) :]
        except BlockingIOError:
            pass  # a peer that is stopped reads nothing, and is found out by its silence
        except OSError:
            self.closed = True

    def receive(self) -> list[Message]:
        """The messages that have come; at the end of the connection ``closed`` is set."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.closed = self.closed or not data
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            messages = [None]
        if all(isinstance(message, dict) for message in messages):
            return messages
        self.closed = True  # not one of us
        return []

    def close(self) -> None:
        self.socket.close()


def open_links(world: World) -> tuple[socket.socket | None, str, Link | None]:
    """Every rank calls it: rank 0 gets a listening socket, the others a link to it.

    Returns:
        The listening socket, what a rank must say first, and the link.
    """
    listener = _listen() if world.is_main else None
    ours = (0, "") if listener is None else (listener.getsockname()[1], secrets.token_hex(16))
    port, token = world.gather(ours)[0]
    if listener is not None:
        return listener, token, None
    address = (os.environ["MASTER_ADDR"], port)
    link = Link(socket.create_connection(address, timeout=CONNECT_SECONDS))
    link.send({"rank": world.rank, "token": token})
    return None, token, link


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
