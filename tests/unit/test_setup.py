"""scripts/setup.sh says what it cannot install; scripts/packages.txt names every program that anything here calls."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SETUP = ROOT / "scripts/setup.sh"
TABLE = ROOT / "scripts/packages.txt"
PYTHON_FILES = [*(ROOT / "graft").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
SHELL_FILES = [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci/run"]
# Calls whose first argument, or the first item of it, is a program: subprocess, shutil.which, a laboratory, need().
CALLS = {"run", "Popen", "check_output", "which", "need", "host", "client", "in_host", "spawn"}
PROGRAM = re.compile(r"[a-z][a-z0-9_.+-]*")
OWN = {"graft", "graftd", "graft-guard", "ip-graft", "vng"}  # this repository's, and the virtual environment's
SHELL_WORDS = {
    "break", "case", "cd", "command", "compgen", "continue", "declare", "do", "done", "echo", "elif", "else",
    "esac", "exec", "exit", "export", "fi", "for", "if", "in", "local", "mapfile", "printf", "pwd", "read",
    "return", "set", "shift", "step", "test", "then", "time", "touch", "trap", "true", "umask", "wait", "while",
}


def table() -> dict[str, str]:
    """Program -> its package."""
    rows = [line.split() for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    return {program: row[1] for row in rows for program in row[2:]}


def first_word(node: ast.expr) -> list[str]:
    """The program of an argv as it is written: a string, the first item of a list, either branch of a condition."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.Starred(value=value):
            return first_word(value)
        case ast.List(elts=[first, *_]) | ast.Tuple(elts=[first, *_]):
            return first_word(first)
        case ast.BinOp(left=left):
            return first_word(left)
        case ast.IfExp(body=body, orelse=orelse):
            return first_word(body) + first_word(orelse)
    return []


def called_in_python(path: Path) -> set[tuple[str, str]]:
    """(program, "file:line") of every call in @path that runs, or asks for, a program."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in CALLS:
            arguments = node.args if name == "need" else node.args[:1]
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            found |= {
                (word, place) for argument in arguments for word in first_word(argument) if PROGRAM.fullmatch(word)
            }
    return found


def called_in_shell(text: str) -> set[str]:
    """The words of a script that stand where a command stands, without its functions and the shell's own words."""
    text = re.sub(r"<<-?'?(\w+)'?.*?\n\s*\1\n", "\n", text, flags=re.S)  # here-documents
    text = re.sub(r"\$\(\(.*?\)\)", "0", text)
    text = re.sub(r"(^|\s)#.*|\\\n|'[^'\n]*'", " ", text, flags=re.M)  # comments, continued lines, words in quotes
    text = re.sub(
        r'"(?:[^"\\\n]|\\.)*"', lambda quoted: " ".join(re.findall(r"\$\([^)]*\)?", quoted[0])) or "_", text
    )
    functions = set(re.findall(r"^\s*(\w+)\(\)", text, flags=re.M))
    before = r"(?:^|[|;&({]|\b(?:if|while|then|do|else|exec)\s)\s*(?:!\s)?\s*(?:[A-Z]\w*=\S*\s+)*"
    commands = re.findall(rf"{before}([a-z][\w.+-]*)(?=[\s)]|$)", text, flags=re.M)
    return set(commands) - functions - set(SHELL_WORDS)


def test_every_program_that_python_calls_is_named():
    known = table()
    unknown = {(word, place) for path in PYTHON_FILES for word, place in called_in_python(path) if word not in known}
    assert not {(word, place) for word, place in unknown if word not in OWN}


def test_every_program_that_a_script_calls_is_named():
    known = table()
    for path in SHELL_FILES:
        assert called_in_shell(path.read_text()) - set(known) - OWN == set(), path
    lines = (ROOT / "Makefile").read_text().splitlines()
    recipes = "\n".join(line.strip().removeprefix("@") for line in lines if line.startswith("\t"))
    while (shorter := re.sub(r"\$\([^$()]*\)", "", recipes)) != recipes:
        recipes = shorter
    assert called_in_shell(recipes) - set(known) == set()


def test_every_program_that_is_named_is_called():
    """modprobe is called by virtme-ng, of the virtual environment."""
    files = (*PYTHON_FILES, *SHELL_FILES, ROOT / "Makefile")
    texts = [path.read_text() for path in files if path != Path(__file__)]
    words = {word for text in texts for word in re.findall(r"[a-z][\w.+-]*", text)}
    assert table().keys() - {"modprobe"} - words == set()


APT = """
apt-get) shift; echo "apt-get $*" >>{log}; [ "$1" != install ] || for last; do [ "$last" = lazy ] || echo "$last" >>{have}; done;;
apt-cache) grep -qx "$3" {known} && echo "  Candidate: 1.0" || echo "  Candidate: (none)";;
dpkg-query) grep -qx "${{!#}}" {have} && printf installed;;
id) echo {uid};;
"""


@pytest.fixture
def system(tmp_path):
    """setup.sh, a table of its own and a package manager that only pretends."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "have").write_text("old\n")
    (tmp_path / "known").write_text("old\nnew\nsecond\nlazy\n")
    shutil.copy(SETUP, tmp_path / "scripts")

    def run(table, *sets, uid=0):
        (tmp_path / "scripts/packages.txt").write_text(table)
        places = {"log": tmp_path / "log", "have": tmp_path / "have", "known": tmp_path / "known", "uid": uid}
        fake = '#!/bin/bash\nset -- ${0##*/} "$@"\ncase $1 in\n' + APT.format(**places) + "esac\n"
        for name in ("apt-get", "apt-cache", "dpkg-query", "id"):
            (tmp_path / "bin" / name).write_text(fake)
            (tmp_path / "bin" / name).chmod(0o755)
        env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "TMPDIR": str(tmp_path)}
        script = tmp_path / "scripts/setup.sh"
        done = subprocess.run(("bash", script, *sets), env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


def test_setup_installs_the_first_name_that_the_system_has(system):
    code, out, err = system("run old\nrun first|second|*  nosuchprogram\nother first\n", "run")
    assert (code, err) == (0, "")
    assert out == "setup: run: install first|second|*\nsetup: run: installed 1 packages\n"
    assert system("run old\nrun second\n", "run") == (0, "setup: run: nothing to install\n", "")


def test_setup_installs_what_lacks_a_program(system):
    """docker.io of Debian 13 comes without docker."""
    code, out, _ = system("run new|old  nosuchprogram\n", "run")
    assert (code, out) == (0, "setup: run: install new|old\nsetup: run: installed 1 packages\n")


def test_setup_takes_programs_from_elsewhere(system):
    assert system("run nginx-light|*  sh cat\n", "run") == (0, "setup: run: nothing to install\n", "")


def test_setup_names_a_package_without_a_candidate(system):
    code, _, err = system("run new\nrun none|never\n", "run")
    assert code == 1
    assert "have no package for: none|never" in err
    assert "packages.txt" in err


def test_setup_installs_what_may_be_lacking_where_it_is_to_be_had(system):
    row = "run {}|?  nosuchprogram\n"
    assert system(row.format("never"), "run") == (0, "setup: run: nothing to install\n", "")
    assert system("run new\n" + row.format("never"), "run")[:2] == (0, "setup: run: install new\nsetup: run: installed 1 packages\n")
    code, out, _ = system(row.format("second"), "run")
    assert (code, out) == (0, "setup: run: install second|?\nsetup: run: installed 1 packages\n")


def test_setup_names_a_package_that_was_not_installed(system):
    """apt-get may succeed and install nothing."""
    code, _, err = system("run lazy\n", "run")
    assert code == 1
    assert "did not install lazy" in err


def test_setup_says_what_a_user_cannot_install(system):
    code, _, err = system("run new\n", "run", uid=1000)
    assert code == 1
    assert "setup: missing: new\nsetup: run the same command as root" in err


def test_setup_refuses_a_set_that_is_not_there(system):
    code, _, err = system("run old\n", "ruin")
    assert code == 1
    assert "no set 'ruin'" in err
