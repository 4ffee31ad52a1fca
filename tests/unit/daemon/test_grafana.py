"""contrib/grafana/graft.json against Grafana's own schema, as its Foundation SDK has it in Python.

The types of the SDK are generated from the schema. A reader of theirs takes what the schema knows and nothing else, so
what is written again lacks what was misspelt or stands in a wrong place.
"""

import inspect
import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.cog.runtime import Runtime
from grafana_foundation_sdk.models.dashboard import Dashboard

PAGE = Path(__file__).parents[3] / "contrib/grafana/graft.json"


@pytest.fixture
def page() -> dict[str, Any]:
    register_default_plugins()
    document: dict[str, Any] = json.loads(PAGE.read_text())
    return document


def unknown(given: Any, read: Any, at: str = "") -> Iterator[str]:
    """Where @given has what @read lacks, or has otherwise. What @read has in addition are defaults."""
    if isinstance(given, dict) and isinstance(read, dict):
        for key, value in given.items():
            yield from unknown(value, read[key], f"{at}.{key}") if key in read else [f"{at}.{key}"]
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for n, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from unknown(one, other, f"{at}[{n}]")
    elif given != read:
        yield at


def complaints(document: dict[str, Any]) -> list[str]:
    read = Dashboard.from_json(document)
    return [*unknown(document, json.loads(JSONEncoder().encode(read))), *mistyped(read)]


def mistyped(value: Any, at: str = "") -> Iterator[str]:
    """Where an object of the SDK has a number, a word or a flag of another type than it says."""
    hints = get_type_hints(type(value).__init__) if hasattr(value, "to_json") else {}
    for name, field in vars(value).items() if hints else ():
        kinds = {*(get_args(hints.get(name)) or (hints.get(name),))} - {type(None)}
        simple = {kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, (bool, int, float, str))}
        if isinstance(field, list):
            for n, each in enumerate(field):
                yield from mistyped(each, f"{at}.{name}[{n}]")
        elif hasattr(field, "to_json"):
            yield from mistyped(field, f"{at}.{name}")
        elif field is not None and simple and simple == kinds and not fits(field, simple):
            yield f"{at}.{name}"


def fits(value: Any, kinds: set[type]) -> bool:
    for kind in kinds:
        if issubclass(kind, Enum):
            if value in {each.value for each in kind}:
                return True
        elif isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool):
            return True
    return False


def test_the_page_is_as_grafana_says(page):
    assert complaints(page) == []
    kinds = {panel["type"] for panel in page["panels"]}
    assert kinds <= Runtime().panelcfg_variants.keys(), "a kind of panel that Grafana has"
    assert {target["datasource"]["type"] for panel in page["panels"] for target in panel["targets"]} == {"prometheus"}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda page: page.update(heading="x"), ".heading"),
        (lambda page: page["panels"][0]["options"].update(colour="x"), ".panels[0].options.colour"),
        (lambda page: page["panels"][0]["targets"][0].update(expression="x"), ".panels[0].targets[0].expression"),
        (lambda page: page["panels"][5]["fieldConfig"]["defaults"].update(units="x"), ".panels[5].fieldConfig.defaults.units"),
        (lambda page: page["panels"][0]["gridPos"].update(w="four"), ".panels[0].grid_pos.w"),
        (lambda page: page.update(editable="yes"), ".editable"),
        (lambda page: page["templating"]["list"][1].update(refresh=9), ".templating.list_val[1].refresh"),
    ],
)
def test_what_it_does_not_know_is_found(page, change, where):
    change(page)
    assert where in complaints(page)
