"""The layout: wings of graft/ import downwards only, in no circle, and docs/design.md names every module.

The order of WINGS is the order of the layers: a module imports from its own wing and
from those before it. Imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WINGS = ("", "rules", "kernel", "process", "tenants", "engines", "trap", "daemon", "bench", "commands")
LINES_MAX, FUNCTION_MAX = 500, 80
ENTRIES = ("graft.__main__", "graft.keeper")  # how a process of graft's begins: they lead to whatever wing
ABOVE = {"graft.protocol": "rules"}  # messages carry the request of graft/rules/request.py


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package below @root, by its dotted name."""
    found = {}
    for path in sorted(root.glob("graft/**/*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of @known that the file @path imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from graft.trap import target` imports a module, `from graft.errors import Refused` a name of one
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {full[name] if full[name] in known else str(node.module) for name in full}
    return {name for name in found if name in known}


def wing(module: str) -> str:
    """The folder below graft/ that a module is in; "" for the ground."""
    if module in ENTRIES:
        return WINGS[-1]
    if module in ABOVE:
        return ABOVE[module]
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or parts[-1] in WINGS else ""


def upward(edges: dict[str, set[str]]) -> list[str]:
    """The imports that lead from a wing to one above it."""
    return [
        f"{module} imports {target}"
        for module, targets in sorted(edges.items())
        for target in sorted(targets)
        if WINGS.index(wing(target)) > WINGS.index(wing(module)) and target != "graft"
    ]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components with more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in edges[module]:
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            at = stack.index(module)
            found.append(sorted(stack[at:]))
            del stack[at:]

    for module in edges:
        if module not in index:
            visit(module)
    return [component for component in found if len(component) > 1]


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    known = modules(ROOT)
    return {module: imports(path, known) - {module, "graft"} for module, path in known.items()}


def test_every_module_is_in_a_wing():
    unknown = [module for module in modules(ROOT) if wing(module) not in WINGS]
    assert not unknown


def test_wings_import_downwards(edges):
    assert not upward(edges)


def test_no_circles(edges):
    assert not circles(edges)


def test_the_checks_find_what_they_look_for(tmp_path):
    """A circle and an upward import in a tree of two wings are both told."""
    for name, text in {
        "graft/__init__.py": "",
        "graft/rules/__init__.py": "",
        "graft/rules/address.py": "def late():\n    from graft.trap import target\n",
        "graft/trap/__init__.py": "",
        "graft/trap/target.py": "from graft.rules.address import Address\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    known = modules(tmp_path)
    made = {module: imports(path, known) - {module} for module, path in known.items()}
    assert upward(made) == ["graft.rules.address imports graft.trap.target"]
    assert circles(made) == [["graft.rules.address", "graft.trap.target"]]
def test_design_names_every_module():
    """The tables of modules in docs/design.md are the tree: each module once, and nothing that is not there."""
    named = re.findall(r"^\| `((?:[a-z_]+/)?[a-z_]+)` \|", (ROOT / "docs/design.md").read_text(), re.M)
    there = {
        str(path.relative_to(ROOT / "graft").with_suffix(""))
        for path in modules(ROOT).values()
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert sorted(named) == sorted(there)
def test_no_file_and_no_function_is_long():
    """A file of more than 500 lines, or a function of more than 80, has more than one concern."""
    found = []
    for folder in ("graft", "tests", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            if text.count("\n") > LINES_MAX:
                found.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and node.end_lineno and not _is_data(node):
                    length = node.end_lineno - node.lineno + 1
                    if length > FUNCTION_MAX:
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert not found


def _is_data(function: ast.FunctionDef) -> bool:
    """Is its body one expression, as a table is?"""
    body = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return len(body) == 1 and isinstance(body[0], ast.Return)
