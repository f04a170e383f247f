"""Checks of Ray: the cluster, the token, the ports, and the nodes.

Only `node_checks` joins the cluster from this process. `ray_checks` asks in a process of its own, because
`ray.init` blocks for a long time if nothing listens, and leaves a half-connected process if it is refused.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from resshift.doctor.finding import Finding, fail, ok, warn
from resshift.doctor.machine import machine_checks

# What `ray start --head` and Serve listen on when nobody says otherwise.
HEAD_PORTS = {6379: "GCS", 8265: "dashboard", 8000: "Serve", 10001: "Ray client"}
_ASK = """
import json, logging, ray
ray.init(logging_level=logging.ERROR, log_to_driver=False)
alive = [node for node in ray.nodes() if node["Alive"]]
print("\\n" + json.dumps({"nodes": len(alive), "resources": ray.cluster_resources()}))
"""


def check_token(environment: Mapping[str, str], home: Path) -> Finding:
    """The token of Ray, as Ray looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token."""
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    make = "ray get-auth-token --generate, and the same file on every node"
    if mode == "disabled":
        if environment.get("RAY_ADDRESS"):
            return warn(
                "token",
                "RAY_AUTH_MODE=disabled",
                f"whoever reaches the cluster runs code on it: RAY_AUTH_MODE=token, {make}",
            )
        return ok("token", "off; a cluster of this machine alone")
    if environment.get("RAY_AUTH_TOKEN"):
        return warn(
            "token",
            "in RAY_AUTH_TOKEN",
            "the environment is inherited and logged: keep it in ~/.ray/auth_token, mode 600",
        )
    try:
        status = path.stat()
    except FileNotFoundError:
        if mode == "token":
            return fail("token", f"RAY_AUTH_MODE=token and no {path}", make)
        return ok("token", "none; Ray makes one for a cluster of this machine")
    if status.st_size == 0:
        return fail("token", f"{path} is empty", make)
    if stat.S_IMODE(status.st_mode) & 0o077:
        return warn("token", f"others can read {path}", f"chmod 600 {path}")
    return ok("token", str(path))


def check_ports(busy: Sequence[int]) -> Finding:
    """Ports of a head on this machine that are already in use."""
    taken = [f"{port} ({HEAD_PORTS[port]})" for port in busy]
    if taken:
        return warn(
            "ports",
            f"in use: {', '.join(taken)}",
            "another Ray? `ray status`; else start with --port, --dashboard-port, and http_options of Serve",
        )
    return ok("ports", f"free: {', '.join(map(str, HEAD_PORTS))}")


def busy_ports() -> list[int]:
    """Return those of the head's ports that something on this machine listens on."""
    return [
        port for port in HEAD_PORTS if any(port == listening for _, listening in listeners(_tcp_tables()))
    ]


def check_exposure(open_ports: Sequence[tuple[str, int]]) -> Finding:
    """Ports of Ray that listen beyond loopback on this machine: (address, port)."""
    found = [
        f"{address}:{port}"
        for address, port in open_ports
        if port in (8265, 10001) and not address.startswith("127.")
    ]
    if found:
        return warn(
            "exposure",
            f"listens on {', '.join(found)}",
            "they run code for whoever may ask: --dashboard-host=127.0.0.1, and a tunnel (`ray dashboard`)",
        )
    return ok("exposure", "dashboard and client port are not open to others")


def listeners(table: str) -> list[tuple[str, int]]:
    """Return (address, port) of the IPv4 sockets that listen, from the text of /proc/net/tcp."""
    found: list[tuple[str, int]] = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 3 and fields[3] == "0A":  # LISTEN
            address, port = fields[1].split(":")
            found.append((socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)))
    return found


def _tcp_tables() -> str:
    try:
        return Path("/proc/net/tcp").read_text()
    except FileNotFoundError:  # not Linux
        return ""


def check_address(address: str) -> Finding:
    """RAY_ADDRESS: whether somebody listens there. The form is HOST:PORT of the GCS, or "auto"."""
    if address in ("auto", "local"):
        return ok("ray address", address)
    if address.startswith(("http://", "https://")):
        return fail(
            "ray address",
            f"RAY_ADDRESS={address} is for `ray job submit`",
            "inside a job leave it alone; from outside RAY_API_SERVER_ADDRESS is its name",
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return fail(
            "ray address", f"RAY_ADDRESS={address}", "the form is HOST:6379, or auto on a node of the cluster"
        )
    try:
        socket.create_connection((host, int(port)), 5).close()
    except OSError as error:
        return fail(
            "ray address",
            f"nobody at {address}: {error}",
            "is the head up (`ray status` there), and does the security group let you in?",
        )
    return ok("ray address", address)


def check_cluster(environment: Mapping[str, str], timeout_s: float = 60) -> Finding:
    """Join the cluster of RAY_ADDRESS for a moment, in a process of its own."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return fail(
            "cluster",
            f"no answer in {timeout_s:.0f} s",
            "look at gcs_server.out and raylet.out on the head: docs/operate.md, head lost",
        )
    if asked.returncode:
        said = next(
            (line for line in reversed(asked.stderr.splitlines()) if line.strip()),
            f"exit code {asked.returncode}",
        )
        remedy = (
            "versions of Ray and Python must be the cluster's; the token must be its token: "
            "~/.ray/auth_token of the head"
        )
        return fail("cluster", " ".join(said.split())[:300], remedy)
    told = json.loads(asked.stdout.splitlines()[-1])
    have = told["resources"]
    found = f"{told['nodes']} nodes, {have.get('CPU', 0):.0f} CPUs, {have.get('GPU', 0):.0f} GPUs"
    if not have.get("CPU"):
        return warn(
            "cluster",
            found,
            "no node does any work yet: the autoscaler starts some when a job asks; `ray status` says if it "
            "cannot",
        )
    return ok("cluster", found)


def ray_checks(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Ask about the cluster that a job started here would use."""
    yield check_token(environment, Path.home())
    address = environment.get("RAY_ADDRESS")
    if not address or address == "local":
        yield ok("ray address", "none; jobs start a cluster of this machine")
        yield check_ports(busy_ports())
    else:
        reached = check_address(address)
        yield reached
        if not reached.remedy:
            yield check_cluster(environment)
    yield check_exposure(listeners(_tcp_tables()))


def node_checks(lock: str | None) -> Iterator[Finding]:
    """Ask every node of the cluster about itself, all at a time; needs a connected process
    (`connect_to_ray`).
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(_on_node)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            lock
        )
        for node in nodes
    ]
    for node, answer in zip(nodes, asked, strict=True):
        where = node["NodeManagerAddress"]
        try:
            found: list[Finding] = ray.get(answer, timeout=300)
        except RayError as error:  # also that the code cannot be imported there
            yield fail(
                f"{where} node",
                " ".join(str(error).split())[-300:],
                "submit with --working-dir . so that the node has the code",
            )
            continue
        yield from (replace(one, name=f"{where} {one.name}") for one in found)


def _on_node(lock: str | None) -> list[Finding]:
    return [*machine_checks(lock), check_exposure(listeners(_tcp_tables())), _ray_environment(os.environ)]


def _ray_environment(environment: Mapping[str, str]) -> Finding:
    """What the workers of a node inherit for S3: an endpoint that only the driver has is the commonest
    surprise.
    """
    named = [
        f"{name}={environment[name]}"
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_PROFILE")
        if name in environment
    ]
    return ok("S3 environment", ", ".join(named) or "none; AWS's endpoint, and the role of the machine")
