"""Seccomp profiles as the OCI runtime specification has them."""

from typing import Any

from graft.kernel.architecture import HERE

ARCHITECTURES = list(HERE.seccomp)


def allow(
    names: list[str], *args: tuple[int, str, int], action: str = "SCMP_ACT_ALLOW", error: int | None = None
) -> dict[str, Any]:
    """A rule for the calls @names, with conditions (argument, comparison, value)."""
    rule: dict[str, Any] = {"names": names, "action": action}
    if args:
        rule["args"] = [{"index": i, "value": v, "op": f"SCMP_CMP_{op}"} for i, op, v in args]
    return rule | ({"errnoRet": error} if error is not None else {})


def profile(*rules: dict[str, Any], default: str = "SCMP_ACT_ERRNO", error: int | None = None) -> dict[str, Any]:
    """A profile of @rules."""
    made = {"defaultAction": default, "architectures": ARCHITECTURES, "syscalls": list(rules)}
    return made | ({"defaultErrnoRet": error} if error is not None else {})
