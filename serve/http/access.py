"""The access log: a JSON line for every request that was answered.

    {"time": "2026-01-31T12:00:00.123Z", "caller": "alice", "peer": "127.0.0.1", "method": "POST",
     "path": "/v1/upscale", "status": 200, "seconds": 1.2, "bytes_in": 81920, "bytes_out": 1310720}

There are neither queries nor keys in it. A gateway appends a line in one write, so several may share a file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

STANDARD_OUTPUT = "-"


class AccessLog:
    """Appends lines to a file.

    Args:
        path: Name of the file; "-" is standard output, and empty writes nothing.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line; it begins with the time of now."""
        if not self._path:
            return
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        text = json.dumps({"time": now.replace("+00:00", "Z"), **line}) + "\n"
        if self._path == STANDARD_OUTPUT:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        # Opened anew, so that the file may be rotated.
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)
