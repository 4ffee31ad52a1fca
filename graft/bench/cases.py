"""The cases of `graft bench`: for each, the server, the client, and the figures that are measured."""

import csv
import io
import json
import os
import re
import time
from typing import Any

from graft.bench.bystander import BYSTANDER
from graft.bench.case import (
    CPU_GB,
    CPU_REQUESTS,
    GBIT,
    MICROSECONDS,
    PER_SECOND,
    Case,
    Figures,
    Measure,
    Scale,
)
from graft.bench.connections import CONNECTIONS, near_latency
from graft.bench.peer import Peer

KIB = 1024

NGINX = """
daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off; keepalive_requests 1000000;
    client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/fastcgi;
    uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
    server {{ listen {port} backlog=4096; root {root}; }}
}}
"""


def busy_seconds() -> float:
    """Return the CPU seconds that this machine spent since boot, without idle and iowait (/proc/stat, proc(5))."""
    with open("/proc/stat") as stat:
        ticks = [int(word) for word in stat.readline().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _iperf(peer: Peer, scale: Scale, *options: str) -> Measure:
    address, port = peer.serve(0, ("iperf3", "-s", "-p", "{port}"))

    def measure() -> Figures:
        command = ("iperf3", "-c", address, "-p", port, "-t", scale.seconds, "-J", "--connect-timeout", 3000)
        for _ in range(6):  # try again: iperf3's server is busy for a moment after a client has left
            before = busy_seconds()
            report = json.loads(peer.lab.client(*command, *options, timeout=scale.seconds + 20).stdout or "{}")
            spent = busy_seconds() - before
            if report.get("end"):
                return {**_throughput(report["end"]), "CPU": spent / max(_gigabytes(report["end"]), 1e-9)}
            time.sleep(0.4)
        raise RuntimeError(f"iperf3: {report.get('error', 'no report')}")

    return measure


def _gigabytes(end: dict[str, Any]) -> float:
    total = end.get("sum_received") or end["sum"]
    return float(total["bytes"]) / 1e9


def _throughput(end: dict[str, Any]) -> Figures:
    if "sum_received" in end and "jitter_ms" not in end.get("sum", {}):
        return {"rate": float(end["sum_received"]["bits_per_second"]) / 1e9}
    total = end["sum"]
    received = 1 - float(total["lost_percent"]) / 100
    return {
        "rate": float(total["bits_per_second"]) / 1e9 * received,
        "packets": float(total["packets"]) / float(total["seconds"]) * received,
    }


def _latency(peer: Peer, scale: Scale) -> Measure:
    address, port = peer.serve(1, ("sockperf", "server", "--tcp", "-p", "{port}"))

    def measure() -> Figures:
        told = peer.lab.client(
            "sockperf", "ping-pong", "--tcp", "-i", address, "-p", port, "-t", scale.seconds
        ).stdout
        text = re.sub(r"\x1b\[[0-9;]*m", "", told)
        found = {}
        for name in ("50.000", "99.000"):
            match = re.search(rf"percentile {name} =\s+([0-9.]+)", text)
            if not match:
                raise RuntimeError(f"sockperf: {text[-300:]}")
            found[f"p{name[:2]}"] = float(match[1])
        return found

    return measure


def _http(peer: Peer, scale: Scale, size: int, *, keep: bool) -> Measure:
    root = peer.lab.work / "root"
    root.mkdir(exist_ok=True)
    (root / str(size)).write_bytes(bytes(size))
    directory = peer.lab.work / f"nginx-{peer.name}-{size}-{keep}"
    directory.mkdir(exist_ok=True)
    config = directory / "nginx.conf"
    port = peer.first + 2
    config.write_text(NGINX.format(dir=directory, port=port, root=root))
    address, _ = peer.serve(2, ("nginx", "-c", config))
    header = () if keep else ("-H", "Connection: close")

    def measure() -> Figures:
        before = busy_seconds()
        command = ("wrk", "-t1", "-c16", f"-d{scale.seconds}s", *header, f"http://{address}:{port}/{size}")
        told = peer.lab.client(*command).stdout
        spent = busy_seconds() - before
        rate = re.search(r"Requests/sec:\s+([0-9.]+)", told)
        total = re.search(r"(\d+) requests in", told)
        if not rate or not total or not int(total[1]):
            raise RuntimeError(f"wrk: {told}")
        return {"rate": float(rate[1]), "CPU": spent / int(total[1]) * 1e5}

    return measure


def _redis_server(peer: Peer) -> tuple[str, int]:
    command = ("redis-server", "--port", "{port}", "--save", "", "--protected-mode", "no", "--dir", peer.lab.work)
    return peer.serve(3, command)


def _redis(peer: Peer, scale: Scale, pipeline: int, *, near: bool = False) -> Measure:
    address, port = _redis_server(peer)
    run = peer.run if near else peer.lab.client
    if near:
        address = peer.neighbour()

    def measure() -> Figures:
        total = scale.requests * 5 * (8 if pipeline > 1 else 1)
        command = ("redis-benchmark", "-h", address, "-p", port, "-t", "set,get", "-c", 50, "-n", total, "--csv")
        told = run(*command, "-P", pipeline).stdout
        rows = {row[0]: row[1] for row in csv.reader(io.StringIO(told)) if len(row) > 1}
        if not {"GET", "SET"} <= rows.keys():
            raise RuntimeError(f"redis-benchmark: {told}")
        return {name: float(rows[name]) for name in ("GET", "SET")}

    return measure


def _memcached(peer: Peer, scale: Scale) -> Measure:
    address, port = peer.serve(4, ("memcached", "-u", "root", "-p", "{port}", "-U", "0", "-l", "0.0.0.0"))

    def measure() -> Figures:
        found = {}
        for test in ("get", "set"):
            each = scale.requests // 4
            words = (f"--servers={address}:{port}", "--concurrency=8", f"--execute-number={each}", f"--test={test}")
            told = peer.lab.client("memcslap", *words, "--initial-load=1000").stdout
            match = re.search(rf"Time to {test} +\d+ keys by +8 threads: +([0-9.]+) seconds", told)
            if not match:
                raise RuntimeError(f"memcslap: {told}")
            found[test] = 8 * each / float(match[1])
        return found

    return measure


def _near_bulk(peer: Peer, scale: Scale) -> Measure:
    _, port = peer.serve(6, ("iperf3", "-s", "-p", "{port}"))

    def measure() -> Figures:
        for _ in range(6):
            command = ("iperf3", "-c", peer.neighbour(), "-p", port, "-t", scale.seconds, "-l", "128K", "-J")
            told = peer.run(*command).stdout
            report = json.loads(told or "{}")
            if report.get("end"):
                return {"rate": _throughput(report["end"])["rate"]}
            time.sleep(0.4)
        raise RuntimeError(f"iperf3: {report.get('error', told)}")

    return measure


NEAR = ("host", "graft", "graft-direct", "graft-local", "docker")


def _bulk(name: str, title: str, *options: str) -> Case:
    figures = {"rate": GBIT, "CPU": CPU_GB}
    return Case(name, title, figures, lambda peer, scale: _iperf(peer, scale, *options), ("iperf3",))


def _udp(size: int) -> Case:
    options = ("-u", "-b", "0", "-l", str(size))
    figures = {"rate": GBIT, "packets": PER_SECOND}
    return Case(
        f"udp-{size}", f"UDP in, {size} B", figures, lambda peer, scale: _iperf(peer, scale, *options), ("iperf3",)
    )


def _web(size: int, label: str, *, keep: bool) -> Case:
    kind = "keep-alive" if keep else "one request a connection"
    return Case(
        f"http-{label.replace(' ', '').lower()}-{'keepalive' if keep else 'close'}",
        f"nginx {label}, {kind}",
        {"rate": PER_SECOND, "CPU": CPU_REQUESTS},
        lambda peer, scale: _http(peer, scale, size, keep=keep),
        ("nginx", "wrk"),
        also=("passed",),
    )


def _requests(name: str, title: str, pipeline: int, *, near: bool = False) -> Case:
    return Case(
        name,
        title,
        {"GET": PER_SECOND, "SET": PER_SECOND},
        lambda peer, scale: _redis(peer, scale, pipeline, near=near),
        ("redis-server", "redis-benchmark"),
        NEAR if near else (),
    )


SIZES = ((64, "64 B"), (KIB, "1 KiB"), (64 * KIB, "64 KiB"), (KIB * KIB, "1 MiB"))
CASES: tuple[Case, ...] = (
    _bulk("tcp-in", "bulk TCP in, 1 flow"),
    _bulk("tcp-in-8", "bulk TCP in, 8 flows", "-P", "8"),
    _bulk("tcp-out", "bulk TCP out, 1 flow", "-R"),
    _bulk("tcp-out-8", "bulk TCP out, 8 flows", "-R", "-P", "8"),
    _udp(64),
    _udp(1400),
    Case("latency", "TCP request and response", {"p50": MICROSECONDS, "p99": MICROSECONDS}, _latency, ("sockperf",)),
    *(_web(size, label, keep=keep) for keep in (True, False) for size, label in SIZES),
    _requests("redis", "redis, 50 clients", 1),
    _requests("redis-16", "redis, 50 clients, pipeline of 16", 16),
    Case(
        "memcached",
        "memcached, 8 clients",
        {"get": PER_SECOND, "set": PER_SECOND},
        _memcached,
        ("memcached", "memcslap"),
    ),
    *CONNECTIONS,
    Case("near-bulk", "container to container, bulk", {"rate": GBIT}, _near_bulk, ("iperf3",), NEAR),
    Case(
        "near-latency",
        "container to container, request and response",
        {"p50": MICROSECONDS, "p99": MICROSECONDS},
        near_latency,
        ("cc",),
        NEAR,
    ),
    _requests("near-redis", "container to container, redis, 50 clients", 1, near=True),
    BYSTANDER,
)
