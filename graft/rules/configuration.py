"""graftd.toml: what the administrator of a host decides for all of its containers.

The grammar is in man/graftd.8.md, "CONFIGURATION". Each key is optional; without a file the defaults hold, which are
the narrow ones. graftd reads it when it starts.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from graft import toml
from graft.errors import Failure, UsageError
from graft.rules.address import Prefix, parse_prefix
from graft.rules.request import LABELS

CONFIGURATION = Path("/etc/graft/graftd.toml")
# What an author of pods may ask for if pods.annotations says so; the others take nothing, and need no word
ANNOTATIONS = (*(f"graft.{label}" for label in LABELS), "graft.netadmin", "graft.endpoint")


class Configuration(NamedTuple):
    """The values of graftd.toml. The names are its keys."""

    addresses: tuple[Prefix, ...] = ()  # that engines' settings may give, beside those of the engine's own network
    annotations: tuple[str, ...] = ()  # [pods]: names of what pods' annotations may take

    def document(self) -> dict[str, Any]:
        """The configuration in JSON, for `graft doctor`."""
        return {
            "addresses": [str(prefix) for prefix in self.addresses],
            "pods": {"annotations": list(self.annotations)},
        }


def _parse_prefix(value: Any) -> Prefix:
    return parse_prefix(toml.text(value))


def _parse_annotation(value: Any) -> str:
    name = toml.text(value)
    if name not in ANNOTATIONS and not (name.startswith("graft.endpoint.") and name != "graft.endpoint."):
        raise UsageError(f"'{name}' is no annotation that needs it", hint=f"{', '.join(ANNOTATIONS)}[.NAME]")
    return name


SCHEMA: toml.Schema = {
    "addresses": toml.each(_parse_prefix),
    "pods": {"annotations": toml.each(_parse_annotation)},
}


def configuration_path() -> Path:
    """Where the configuration is: GRAFT_CONFIG of the environment, or CONFIGURATION."""
    return Path(os.environ.get("GRAFT_CONFIG") or CONFIGURATION)


def read_configuration() -> Configuration:
    """The configuration at configuration_path(); the defaults if there is none, and GRAFT_CONFIG names none.

    Raises Failure, which names the file and the key.
    """
    path = configuration_path()
    try:
        found = toml.read(path, SCHEMA)
    except FileNotFoundError as error:
        if path != CONFIGURATION:
            raise Failure(f"{path}: {error.strerror}", code="ENOENT") from None
        return Configuration()
    return Configuration(**{**found.pop("pods", {}), **found})
