"""Port mappings of CNI and netavark as publications. It imports nothing: engines wait for an interpreter."""


def publication(host_ip: str, host_port: int, container_port: int, protocol: str, span: int = 1) -> str:
    """`-p` of @span ports from @host_port on, as graftd reads it (graft/rules/publication.py)."""
    address = f"[{host_ip}]:" if ":" in host_ip else f"{host_ip}:" if host_ip else ""  # "0.0.0.0" is IPv4 alone
    host, inside = (str(p) if span == 1 else f"{p}-{p + span - 1}" for p in (host_port, container_port))
    return f"{address}{host}:{inside}/{protocol}"
