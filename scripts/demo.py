"""`make demo`: a web server in a netns that has nothing but lo is reached from outside, at the host's speed."""

import json
import os
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from graft.bench.lab import HOST4, HOST6, Lab, laboratory, nginx_config, wait_for

PAIRS = 5
SECONDS = 2


def show(prompt: str, command: str, output: str) -> None:
    """Print a command and its output as a transcript."""
    print(f"{prompt}$ {command}")
    for line in output.rstrip().splitlines():
        print(f"    {line}")
    print(flush=True)


def rate(lab: Lab, port: int) -> float:
    """Return bytes per second of 64 KiB responses on kept-alive connections, measured by wrk on the client."""
    script = lab.work / "report.lua"
    script.write_text('done = function(s, l, r) io.write("BYTES ", s.bytes, " ", s.duration, "\\n") end\n')
    url = f"http://{HOST4}:{port}/64k"
    result = lab.client("wrk", "-t1", "-c16", f"-d{SECONDS}s", "-s", script, url)
    for line in result.stdout.splitlines():
        if line.startswith("BYTES"):
            return float(line.split()[1]) / float(line.split()[2]) * 1e6
    raise RuntimeError(f"wrk: {result.stdout}{result.stderr}")


def demonstrate(lab: Lab) -> float:
    """Run the demonstration; returns the median ratio of graft's throughput to the host's. Raises RuntimeError."""
    root = lab.work / "root"
    root.mkdir()
    (root / "index.html").write_text("served by nginx, in a namespace with nothing but lo\n")
    (root / "64k").write_bytes(bytes(65536))
    config = nginx_config(lab, "grafted", 80)
    lab.spawn_graft("--name", "web", "-p", "8080:80", "nginx", "-c", config, stderr=sys.stderr)
    lab.wait_listening(8080)
    show("host", "graft run --name web -p 8080:80 nginx", "(started)")
    show("host", "graft ps", lab.graft("ps").stdout)
    pid = json.loads(lab.graft("ps", "-j").stdout)[0]["pid"]
    show(
        "host",
        f"nsenter --net=/proc/{pid}/ns/net ip -brief address",
        lab.host("nsenter", f"--net=/proc/{pid}/ns/net", "ip", "-brief", "address").stdout,
    )
    show("host", "graft endpoint show --netns web", lab.graft("endpoint", "show", "--netns", "web").stdout)
    for address in (HOST4, f"[{HOST6}]"):
        url = f"http://{address}:8080/"
        fetched = lab.client("curl", "-sS", "--max-time", "5", url)
        if fetched.returncode:
            raise RuntimeError(f"fetch {url}: {fetched.stderr}")
        show("client", f"curl {url}", fetched.stdout)
    log = lab.work / "grafted" / "access.log"
    show("web", "cat access.log", wait_for(log.read_text, "the access log"))
    lab.spawn("nginx", "-c", nginx_config(lab, "plain", 8081), stderr=sys.stderr)
    lab.wait_listening(8081)
    ratios = []
    print(f"64 KiB responses, {PAIRS} pairs of {SECONDS} s:")
    rate(lab, 8080), rate(lab, 8081)  # warm up
    for n in range(PAIRS):
        order = (8080, 8081) if n % 2 else (8081, 8080)
        measured = {port: rate(lab, port) for port in order}
        ratios.append(measured[8080] / measured[8081])
        gbit = {port: value * 8 / 1e9 for port, value in measured.items()}
        print(f"    graft {gbit[8080]:6.2f}   host {gbit[8081]:6.2f} Gbit/s   ratio {ratios[-1]:.3f}", flush=True)
    return statistics.median(ratios)


def main() -> int:
    """Run the demonstration in a laboratory, and print the result; returns the exit status."""
    if os.geteuid() != 0:
        print("demo: needs root: sudo make demo", file=sys.stderr)
        return 1
    for tool in ("nginx", "wrk", "curl", "ip", "nsenter"):
        if not shutil.which(tool):
            print(f"demo: '{tool}' is not installed; run 'make setup'", file=sys.stderr)
            return 1
    try:
        with laboratory("demo") as lab:
            ratio = demonstrate(lab)
    except (AssertionError, RuntimeError, TimeoutError) as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        return 1
    print(f"\ndemo: OK. Throughput graft : host = {ratio:.3f} (median of {PAIRS} pairs). Nothing is left behind.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
