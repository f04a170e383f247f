"""Tells Ray that a machine is about to be taken away, so that training saves, and work and replicas move.

    python notices.py                                  beside Ray on a spot machine of AWS (cluster.yaml)
    python -m pipelines.cluster.notices --leave 100    preStop hook of a pod (deploy/kuberay)

Nothing in Ray asks a cloud for such notices. Here AWS is asked every few seconds through the metadata service
of the machine (IMDSv2): a spot interruption notice comes two minutes before the machine goes, a rebalance
recommendation earlier, or never. The node is then drained by Ray's own command: it gets no new work, Ray
Train hands the notice to the workers, which save, and Serve moves its replicas.

A file of its own that imports nothing of the project: nodes have Ray, and get their code with each job.

Exit codes: 0 the node is being drained, 1 Ray refused, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

METADATA = "http://169.254.169.254"
_TOKEN_S = 21_600  # the longest life that the service gives a token
_INTERRUPTION = "/latest/meta-data/spot/instance-action"
_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
_COMMAND_S = 60.0  # for Ray's command, which connects to the cluster

logger = logging.getLogger("notices")


@dataclass(frozen=True, slots=True)
class Notice:
    """What a cloud has announced.

    Fields:
        message: One line.
        until: When the machine goes, in seconds since the epoch; None when that is not known.
    """

    message: str
    until: float | None


class Metadata:
    """The metadata service of a machine of AWS.

    Args:
        url: Address of the service.
        timeout_s: Timeout of a request.
    """

    def __init__(self, url: str = METADATA, timeout_s: float = 2.0) -> None:
        self._url, self._timeout_s = url.rstrip("/"), timeout_s
        self._token = ""
        # A proxy of the environment is for other addresses.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def interruption(self) -> Notice | None:
        """Return the interruption notice of this spot machine, None without one.

        Raises:
            OSError: The service does not answer.
        """
        text = self._get(_INTERRUPTION)
        if text is None:
            return None
        notice: Any = json.loads(text)
        until = datetime.strptime(notice["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        return Notice(f"spot interruption: {notice['action']} at {notice['time']}", until.timestamp())

    def rebalance(self) -> Notice | None:
        """Return the recommendation to leave this machine, None without one.

        Raises:
            OSError: The service does not answer.
        """
        text = self._get(_REBALANCE)
        return None if text is None else Notice("rebalance recommendation", None)

    def _get(self, path: str) -> str | None:
        """Return a document, None when there is none."""
        for _ in range(2):
            if not self._token:
                self._token = self._send(
                    "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
                )
            try:
                return self._send("GET", path, {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as error:
                if error.code == HTTPStatus.NOT_FOUND:
                    return None
                if error.code != HTTPStatus.UNAUTHORIZED:
                    raise
                self._token = ""  # it has expired
        raise OSError(f"{self._url} refuses the token that it has just given")

    def _send(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(self._url + path, method=method, headers=headers)
        with self._opener.open(request, timeout=self._timeout_s) as response:
            return response.read().decode()


def drain(notice: Notice, node: Sequence[str] = ()) -> bool:
    """Drain the Ray node of this machine and return whether Ray has accepted.

    Args:
        notice: Reason, and when the node goes.
        node: Arguments of `ray drain-node` that name another node.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", notice.message]
    if notice.until is not None:
        command += ["--deadline-remaining-seconds", str(max(1, round(notice.until - time.time())))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    except subprocess.TimeoutExpired:
        logger.warning("ray drain-node did not end within %.0f s", _COMMAND_S)
        return False
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        logger.warning("ray drain-node: exit code %d: %s", done.returncode, said[-1] if said else "")
    return done.returncode == 0


def watch(
    metadata: Metadata,
    drain: Callable[[Notice], bool],
    *,
    rebalance: bool = False,
    every_s: float = 5.0,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Ask until an interruption notice has come and Ray has accepted it.

    Args:
        metadata: Service to ask.
        drain: Function that drains the node and tells whether Ray has accepted.
        rebalance: Whether a rebalance recommendation drains the node, too. Else it is only told: most come
            without an interruption, and the notice itself is early enough to save.
        every_s: Seconds between two questions.
        sleep: Function that waits.
    """
    is_recommended = False
    is_silent = False
    while True:
        try:
            notice = metadata.interruption()
            if notice is not None:
                logger.warning("%s", notice.message)
                if drain(notice):
                    return
            elif not is_recommended and (recommendation := metadata.rebalance()) is not None:
                logger.warning("%s", recommendation.message)
                is_recommended = not rebalance or drain(recommendation)
            is_silent = False
        except (OSError, ValueError, KeyError) as error:
            if not is_silent:
                logger.warning("the metadata service cannot be read, asking again: %s", error)
            is_silent = True
        sleep(every_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--metadata", default=METADATA, metavar="URL", help="metadata service of AWS")
    parser.add_argument("--every-s", type=float, default=5.0, help="seconds between questions (default 5)")
    parser.add_argument(
        "--rebalance", action="store_true", help="drain at a rebalance recommendation, too (default: tell it)"
    )
    parser.add_argument(
        "--leave", type=float, metavar="SECONDS", help="drain now, and wait so long before the node goes"
    )
    parser.add_argument("--address", help="cluster (default: that of this machine)")
    parser.add_argument("--node-id", help="node to drain (default: that of this machine)")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    node = [
        *(["--address", options.address] if options.address else ()),
        *(["--node-id", options.node_id] if options.node_id else ()),
    ]
    if options.leave is None:
        metadata = Metadata(options.metadata)
        watch(
            metadata, lambda notice: drain(notice, node), rebalance=options.rebalance, every_s=options.every_s
        )
        return 0
    until = time.time() + options.leave
    if not drain(Notice("the pod is being deleted", until), node):
        return 1
    time.sleep(max(0.0, until - time.time()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
