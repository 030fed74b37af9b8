"""A bridge between two interfaces that hands every frame on after a delay: the kernel here may lack netem.

    python relay.py A B      in a network namespace, as root

Commands come on stdin, one per line: `delay SECONDS` (each way), `drop`, `pass`. It ends when stdin closes. Frames
keep the offsets of segmentation and checksum that the senders left to the device (PACKET_VNET_HDR), so a
burst of TCP is one read and one write of up to 64 KiB.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from collections import deque

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
ETH_P_ALL = 3
MOST_BYTES = 64 << 20  # on their way in one direction; more is dropped
FRAME = 1 << 17


def opened(interface: str) -> socket.socket:
    """All frames of an interface, with the virtio header."""
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    link.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    link.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    link.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 32 << 20)
    link.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
    link.bind((interface, 0))
    link.setblocking(False)
    return link


class Relay:
    def __init__(self, one: socket.socket, other: socket.socket):
        self._ways = [(one, other, deque()), (other, one, deque())]
        self._held = [0, 0]
        self.delay, self.passes = 0.0, True

    def take(self, way: int) -> None:
        """Frames that have come, with the time at which they go on."""
        source, _, queue = self._ways[way]
        due = time.monotonic() + self.delay
        if queue:
            due = max(due, queue[-1][0])  # a shorter delay never lets a frame overtake
        for _ in range(64):
            try:
                frame = source.recv(FRAME)
            except (BlockingIOError, OSError):
                return
            if self.passes and self._held[way] + len(frame) <= MOST_BYTES:
                queue.append((due, frame))
                self._held[way] += len(frame)

    def hand_on(self, way: int) -> float | None:
        """Sends what is due; seconds until the next frame is, None if there is none."""
        _, target, queue = self._ways[way]
        while queue:
            left = queue[0][0] - time.monotonic()
            if left > 0:
                return left
            frame = queue.popleft()[1]
            self._held[way] -= len(frame)
            if self.passes:
                # A full queue of the shaper drops, as a router's would.
                with contextlib.suppress(OSError):
                    target.send(frame)
        return None

    def run(self, commands: int) -> None:
        sockets = [way[0] for way in self._ways]
        text = b""
        while True:
            waits = [w for w in (self.hand_on(0), self.hand_on(1)) if w is not None]
            ready, _, _ = select.select([*sockets, commands], [], [], min(waits, default=None))
            for way in range(2):
                if sockets[way] in ready:
                    self.take(way)
            if commands in ready:
                more = os.read(commands, 4096)
                if not more:
                    return
                *lines, text = (text + more).split(b"\n")
                for line in lines:
                    self.obey(line.decode().split())

    def obey(self, words: list[str]) -> None:
        if words[0] == "delay":
            self.delay = float(words[1])
        else:
            self.passes = words[0] == "pass"


if __name__ == "__main__":
    Relay(opened(sys.argv[1]), opened(sys.argv[2])).run(sys.stdin.fileno())
