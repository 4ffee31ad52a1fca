"""The manual pages say what the commands take, all of it and nothing else; and they are well-formed."""

import itertools
import json
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from graft.commands import ip_graft, wrapper
from graft.commands.graftd import command as graftd
from graft.commands.main import COMMANDS, graft, is_wrapper
from graft.engines import cni, install
from graft.rules.request import SETTINGS
from tests.conftest import lack, need

ROOT = Path(__file__).parents[3]
PAGES = sorted(path.name for path in (ROOT / "man").glob("*.md"))
EVERYWHERE = {"-h", "--help"}  # documented once, before the sub-commands


def text_of(page):
    return (ROOT / "man" / page).read_text()


def sections(page, level="##"):
    """Heading -> the lines below it, up to the next heading of this level or a higher one."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text_of(page).splitlines():
        hashes, _, title = line.partition(" ")
        if hashes and set(hashes) == {"#"} and len(hashes) <= len(level):
            lines = found.setdefault(title, []) if hashes == level else []
        else:
            lines.append(line)
    return found


def options_in(line):
    return set(re.findall(r"\*\*(-{1,2}[A-Za-z][\w-]*)\*\*", line))


def terms(lines):
    """The options of each term of the definition lists, as sets."""
    found = [options_in(term) for term, definition in itertools.pairwise(lines) if definition.startswith(":   ")]
    return [options for options in found if options]


def spelled(command):
    """The options of a click command, each with all its spellings."""
    return [set(p.opts) | set(p.secondary_opts) for p in command.params if isinstance(p, click.Option) and not p.hidden]


def walk(command, path):
    """Every command that is no group, by what is typed."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        yield from walk(command.get_command(context, name), f"{path} {name}")


def same(documented, real, where):
    """Both ways: nothing is missing, nothing is invented, and all spellings stand in one term."""
    assert sorted(map(sorted, documented)) == sorted(map(sorted, real)), where


def test_graft_names_every_option_of_every_command():
    chapters = sections("graft.1.md", "###")
    commands = {**dict(walk(graft, "graft")), "graft --": wrapper.command}
    assert chapters.keys() == commands.keys()
    for path, command in commands.items():
        same(terms(chapters[path]), spelled(command), path)
    same(terms(sections("graft.1.md")["OPTIONS"]), [*spelled(graft), EVERYWHERE], "graft")


def test_graft_names_every_command():
    text = text_of("graft.1.md")
    for name in COMMANDS:
        assert f"graft {name}" in text, name
    for option in ("--publish", "--ingress", "--egress", "--egress-rule", "--netns", "--user", "--name", "--verbose"):
        assert option in text, option


def test_an_option_names_its_label():
    """The entry of each option of `graft run` that containers of engines have as well."""
    entries = "\n".join(sections("graft.1.md", "###")["graft run"]).split("\n\n")
    for setting in SETTINGS:
        entry = next(each for each in entries if each.startswith(f"**{setting.options[0]}**"))
        assert f"**graft.{setting.label}**" in entry, setting.field


def test_graft_install_names_what_it_takes():
    """The oldest versions of engines, and the versions of containerd's configuration."""
    text = " ".join(sections("graft.1.md", "###")["graft install"])
    for engine, version in install.LEAST.items():
        assert f"{engine} {'.'.join(map(str, version))}" in text.replace("Docker", "docker").replace("Podman", "podman"), engine
    assert f"version than {' or '.join(map(str, install.CRI_TABLES))}" in text


def test_graft_synopsis():
    """Each line of the synopsis has options of its own command alone."""
    commands = {**dict(walk(graft, "graft")), "graft": wrapper.command}
    seen = set()
    for line in filter(None, sections("graft.1.md")["SYNOPSIS"]):
        words = line.split("**")[1].split()
        path = next(p for n in (3, 2, 1) if (p := " ".join(words[:n])) in commands)
        seen.add(path)
        assert options_in(line) <= set().union(*spelled(commands[path])), line
    assert seen == commands.keys()


def test_graftd_names_every_option():
    same(terms(sections("graftd.8.md")["OPTIONS"]), [*spelled(graftd), EVERYWHERE], "graftd")
    assert options_in("\n".join(sections("graftd.8.md")["SYNOPSIS"])) <= set().union(*spelled(graftd))


def test_ip_graft_names_every_option_and_command():
    same(terms(sections("ip-graft.8.md")["OPTIONS"]), [set(each) for each in ip_graft.OPTIONS.values()], "ip-graft")
    text = text_of("ip-graft.8.md")
    for word in (*ip_graft.COMMANDS, "del", "type unix path", "type local", "dynamic", "netns", "-batch", "-force", "-json"):
        assert word in text, word


def test_ip_graft_usage_names_every_option():
    """In ip(8)'s way: -n[etns]."""
    usage = {word.replace("[", "").replace("]", "") for word in re.findall(r"-\w[\w\[\]]*(?= |\n)", ip_graft.USAGE)}
    for spellings in ip_graft.OPTIONS.values():
        assert usage & set(spellings), spellings


def test_graft_runtime_names_every_option():
    source = (ROOT / "csrc/runtime.c").read_text()
    read = set(re.findall(r'option\(argv \+ \w+, "(-[\w-]+)"', source))
    table = source.partition("static bool takes_value")[2].partition("NULL}")[0]
    passed = set(re.findall(r'"(-[\w-]+)"', table))
    own = {option for option in read if option.startswith("--graft-")}
    assert len(own) == 2
    assert len(passed) > 8
    chapters = sections("graft-runtime.8.md")
    assert set().union(*terms(chapters["OPTIONS"])) == own
    assert set().union(*terms(chapters["OPTIONS OF THE RUNTIME"])) == (read - own) | passed
    assert passed in terms(chapters["OPTIONS OF THE RUNTIME"])


def test_graft_cni_names_its_configuration_and_environment():
    source = Path(cni.__file__).read_text()
    keys = set(re.findall(r'config(?:\.get\(|\[)"(\w+)"', source)) | {cni.PREVIOUS}
    chapters = sections("graft-cni.8.md")
    documented = re.findall(r"^\*\*(\w+)\*\*$", "\n".join(chapters["CONFIGURATION"]), re.M)
    assert set(documented) == keys
    environment = set(re.findall(r"\*\*(CNI_\w+)\*\*", "\n".join(chapters["ENVIRONMENT"])))
    assert environment == set(re.findall(r"CNI_[A-Z]+", source))
    assert not options_in(text_of("graft-cni.8.md")) - set().union(*map(set, spelled(graft)))
    for version in cni.VERSIONS:
        assert version in text_of("graft-cni.8.md"), version


@pytest.mark.parametrize("page", PAGES)
def test_an_option_in_a_page_is_one_of_grafts(page):
    """Wherever a page names one: in a sentence, too."""
    known = set(ip_graft.SPELLINGS) | EVERYWHERE
    for _, command in (*walk(graft, ""), ("", graft), ("", graftd), ("", wrapper.command)):
        known |= set().union(*spelled(command), set())
    known |= set(re.findall(r'"(-[\w-]+)"', (ROOT / "csrc/runtime.c").read_text()))
    assert options_in(text_of(page)) <= known


def examples(page):
    return [line.strip() for line in sections(page)["EXAMPLES"] if line.startswith("    ")]


def parse(words):
    """Have click read a command line of graft's, and not carry it out. Raises click.UsageError."""
    command = wrapper.command if is_wrapper(words) else graft
    context = command.make_context("graft", list(words))
    protected = "_protected_args" if hasattr(context, "_protected_args") else "protected_args"  # click 8.1 of Debian
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, [*getattr(context, protected), *context.args])
        assert found
        command, context = found, found.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES)
def test_examples(page):
    """Every page has some, and graft reads each line that is its own."""
    lines = examples(page)
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line) if line.startswith(("graft", "ip ", "ip-graft", "GRAFT")) else [""]
        if words[0] == "graft":
            parse(words[1:])
        elif words[-2:-1] == ["graftd"] or words[0] == "graftd":
            graftd.make_context("graftd", words[words.index("graftd") + 1 :])
        elif "ip-graft" in words:
            options, rest = ip_graft.parse_options(words[words.index("ip-graft") + 1 :])
            assert options.batch or ip_graft.check(0, rest)


def test_examples_of_configurations_are_json():
    for page in ("graft-cni.8.md", "graft-runtime.8.md"):
        text = "\n".join(sections(page)["EXAMPLES"])
        blocks = re.findall(r"(?:^    .*\n?)+", text, re.M)
        documents = [json.loads(block) for block in blocks if block.lstrip().startswith("{")]
        assert documents, page


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_whole(page):
    lines = text_of(page).splitlines()
    name, number, _ = page.rsplit(".", 2)
    assert lines[0] == f"# {name}({number})"
    chapters = sections(page)
    assert list(chapters)[:3] == ["NAME", "SYNOPSIS", "DESCRIPTION"]
    assert list(chapters)[-2:] == ["EXAMPLES", "SEE ALSO"]
    assert "\n".join(chapters["NAME"]).strip().startswith(f"{name} - ")
    for other, section in re.findall(r"\b(graft[\w.-]*|ip-graft)\((\d)\)", "\n".join(lines)):
        assert f"{other}.{section}.md" in PAGES, f"{other}({section})"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_formatted_without_a_complaint(page):
    """Converted as 'make install' does it: by mandoc(1) without an error, by man(1) without a warning."""
    need("go-md2man", "mandoc", "man")
    made = ROOT / "build/man" / page.removesuffix(".md")
    subprocess.run(("make", "-s", str(made.relative_to(ROOT))), cwd=ROOT, check=True)
    linted = subprocess.run(("mandoc", "-Tlint", "-Werror", made), capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout
    shown = subprocess.run(("man", "--warnings", "-l", made), capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "120"})
    if "minimized" in shown.stdout:
        lack("this system has manual pages removed (unminimize(8))")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert page.partition(".")[0] in shown.stdout
    for title in sections(page):
        assert title in shown.stdout, title
