"""The part of the metadata service of AWS (IMDSv2) that `pipelines.cluster.notices` asks, on loopback."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class MetadataServer:
    """Documents by path, and what was asked; a request without a valid token is refused, as by AWS."""

    port: int = 0
    documents: dict[str, str] = field(default_factory=dict[str, str])
    token: str = "token-1"
    given: int = 0
    refused: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def interrupt(self, seconds: float) -> None:
        """Give the interruption notice of a machine that goes in so many seconds."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
        self.documents["/latest/meta-data/spot/instance-action"] = (
            f'{{"action": "terminate", "time": "{when}"}}'
        )

    def recommend(self) -> None:
        """Recommend to leave the machine."""
        self.documents["/latest/meta-data/events/recommendations/rebalance"] = '{"noticeTime": "now"}'


@contextlib.contextmanager
def metadata_server() -> Generator[MetadataServer]:
    """Run the service while the block lasts."""
    served = MetadataServer()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if self.path != "/latest/api/token" or not seconds.isdecimal() or int(seconds) > 21_600:
                self._answer(400)
                return
            served.given += 1
            self._answer(200, served.token)

        def do_GET(self) -> None:
            if self.headers.get("X-aws-ec2-metadata-token") != served.token:
                served.refused += 1
                self._answer(401)
            elif self.path in served.documents:
                self._answer(200, served.documents[self.path])
            else:
                self._answer(404)

        def _answer(self, code: int, text: str = "") -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
