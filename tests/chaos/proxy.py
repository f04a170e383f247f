"""A proxy that does to S3 traffic what networks and busy stores do, with known shares.

    python tests/chaos/proxy.py PORT UPSTREAM_PORT [--slow-down 0.05] [--reset 0.01] [--cut 0.001]
        [--deny KEY_PART] [--counts FILE]

One thread a connection, one request a connection. What happens to a request is drawn from a seeded generator.
At the end (SIGTERM) the counts are written as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import struct
import sys
import threading
from collections import Counter
from pathlib import Path

_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
)


def answer(code: str, status: str, message: str) -> bytes:
    """Return a complete error answer of S3."""
    body = _ERROR.format(code=code, message=message).encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: "
        "close\r\n\r\n"
    )
    return head.encode() + body


def read_message(connection: socket.socket) -> tuple[bytes, bytes]:
    """Return head and body of an HTTP message with a length, chunks, or neither."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return data, b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    fields = {
        line.split(b":", 1)[0].strip().lower(): line.split(b":", 1)[1].strip()
        for line in head.split(b"\r\n")[1:]
        if b":" in line
    }
    if (
        fields.get(b"expect", b"").lower() == b"100-continue"
    ):  # the client keeps its body until it is asked for it
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
        while not body.endswith(b"0\r\n\r\n"):
            piece = connection.recv(65536)
            if not piece:
                break
            body += piece
    else:
        length = int(fields.get(b"content-length", b"0"))
        if head.startswith(b"HEAD"):
            length = 0
        while len(body) < length:
            piece = connection.recv(1 << 20)
            if not piece:
                break
            body += piece
    return head, body


class Proxy:
    """The faults and their counts."""

    def __init__(self, upstream: int, options: argparse.Namespace) -> None:
        self.upstream, self.options = upstream, options
        self.counts: Counter[str] = Counter()
        self._rng, self._lock = random.Random(options.seed), threading.Lock()

    def handle(self, client: socket.socket) -> None:
        """Serve one connection."""
        with client:
            try:
                self._handle(client)
            except OSError:
                with self._lock:
                    self.counts["broken by a client"] += 1

    def _handle(self, client: socket.socket) -> None:
        head, body = read_message(client)
        if not head:
            return
        method, path = head.split(b" ", 2)[:2]
        with self._lock:
            draw = self._rng.random()
            self.counts["requests"] += 1
        options = self.options
        if options.deny and options.deny.encode() in path and method == b"GET":
            self._count("denied")
            client.sendall(answer("AccessDenied", "403 Forbidden", "Access Denied"))
        elif draw < options.slow_down:
            self._count("slow_down")
            client.sendall(answer("SlowDown", "503 Slow Down", "Please reduce your request rate."))
        elif draw < options.slow_down + options.reset:
            self._count("reset")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with RST
        else:
            self._forward(client, head, body, method, cut=draw > 1 - options.cut)

    def _forward(self, client: socket.socket, head: bytes, body: bytes, method: bytes, *, cut: bool) -> None:
        lines = [
            line for line in head.split(b"\r\n") if not line.lower().startswith((b"connection:", b"expect:"))
        ]
        with socket.create_connection(("127.0.0.1", self.upstream)) as server:
            server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
            answer_head, answer_body = (
                read_message(server) if method != b"HEAD" else (read_message_head(server), b"")
            )
        if cut and method == b"GET" and len(answer_body) > 100:
            self._count("cut")
            answer_body = answer_body[: len(answer_body) // 2]
        kept = [line for line in answer_head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        client.sendall(b"\r\n".join([*kept, b"Connection: close"]) + b"\r\n\r\n" + answer_body)

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1


def read_message_head(connection: socket.socket) -> bytes:
    """Return the head of an answer that has no body."""
    data = b""
    while b"\r\n\r\n" not in data and (piece := connection.recv(65536)):
        data += piece
    return data.partition(b"\r\n\r\n")[0]


def main() -> None:
    """Listen until SIGTERM."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("port", type=int)
    parser.add_argument("upstream", type=int)
    parser.add_argument("--slow-down", type=float, default=0.05)
    parser.add_argument("--reset", type=float, default=0.01)
    parser.add_argument("--cut", type=float, default=0.001)
    parser.add_argument("--deny", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--counts", default="")
    options = parser.parse_args()
    proxy = Proxy(options.upstream, options)

    def stop(number: int, frame: object) -> None:
        del number, frame
        if options.counts:
            Path(options.counts).write_text(json.dumps(proxy.counts))
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    with socket.create_server(("127.0.0.1", options.port), backlog=256) as listener:
        while True:
            connection, _ = listener.accept()
            connection.settimeout(60)
            threading.Thread(target=proxy.handle, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
