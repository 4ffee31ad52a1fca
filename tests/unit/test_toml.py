"""Files of the administrator: what is not understood is an error of one line, with the file and the key."""

import os

import pytest

from graft import toml
from graft.errors import Failure

SCHEMA: toml.Schema = {
    "on": toml.flag,
    "names": toml.each(toml.text),
    "deep": {"names": toml.each(toml.text)},
    "low": {"kind": toml.one_of("first", "second"), "port": toml.number(1, 65535)},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "graft.toml"
    path.touch(0o644)
    return path


def test_values(file):
    file.write_text('on = true\nnames = ["a", "b"]\n[deep]\nnames = []\n')
    assert toml.read(file, SCHEMA) == {"on": True, "names": ("a", "b"), "deep": {"names": ()}}
    file.write_text("# nothing\n")
    assert toml.read(file, SCHEMA) == {}
    file.unlink()
    with pytest.raises(FileNotFoundError):
        toml.read(file, SCHEMA)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("off = true", "unknown key 'off' (on, names, deep, low)"),
        ("on = true\n[deeper.still]", "unknown key 'deeper' (did you mean 'deep'?)"),
        ("[deep]\nname = []", "unknown key 'deep.name' (did you mean 'deep.names'?)"),
        ("on = 1", "on: 1 is neither true nor false"),
        ('names = "a"', "names: 'a' is not an array (write it in brackets: [...])"),
        ("names = [true]", "names: true is not a string (write it in quotes)"),
        ("deep = 3", "deep: not a table ([deep])"),
        ("on = ", "Invalid value (the file ends here)"),
        ("on = true\non = false", "Cannot overwrite a value (the file ends here)"),
        ("on = true\nnames = [,\n]", "Invalid value (column 10)"),
        ("xyz = 1", "unknown key 'xyz' (on, names, deep, low)"),
        ("[deep]\nonn = true", "unknown key 'deep.onn' (did you mean 'on'?)"),
        ('[low]\nkind = "fist"', "low.kind: 'fist' is unknown (did you mean 'first'?)"),
        ("[low]\nport = 70000", "low.port: 70000 is not a number from 1 to 65535"),
        ('on = true\n"low.port" = 7', "unknown key 'low.port' (without quotes: low.port = ...)"),
        pytest.param(f"on = true\nnames = {'[' * 5000}", "tables or arrays too deep in one another", id="depth"),
        pytest.param(f"names = [\n{'1' * 5000}]", "a number of too many digits", id="digits"),
        ("[low]\nport = true", "low.port: true is not a number from 1 to 65535"),
    ],
)
def test_what_is_wrong(file, text, says):
    file.write_text(text)
    with pytest.raises(Failure) as found:
        toml.read(file, SCHEMA)
    told = str(found.value)
    assert told.startswith((
        f"{file}, line {text.count(chr(10)) + 1}: {says}",
        f"{file}, line 2: {says}",
    ))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("on = true\n\nnames = [1]", 3),
        ("'names' = [1]", 1),
        ('"names" = [1]', 1),
        ("on = true\n[deep]\nnames = [1]", 3),
        ("[ deep ]\nnames = [1]", 2),
        ('names = ["names = 1",\n2]', 2),
        ("names = [\n'a12',\n12,\n]", 3),
        ("names = [[\n1]]", 1),
        ("# names = 3\nnames = [1]", 2),
        ("deep.names = [1]", 1),
        ("deep = {names = [1]}", 1),
        ('"de\\u0065p" = {names = [1]}', 0),
        ("\n[shallow]", 2),
        ("\n[[names]]\nx = 1", 2),
        ("on = true\nnames.x = [1]", 2),
        ('on = true\n"names " = [1]', 2),
        ("on = true\n'a = b' = 1", 2),
        ('on = true\n"" = 1', 2),
        ('names = [\n# 12\n"#", # 12\n12,\n]', 4),
        ("on = true\nnames = [1] # on = 2", 2),
    ],
)
def test_the_line(file, text, line):
    """A wrong key is told with its line, where it is written plainly."""
    file.write_text(text)
    with pytest.raises(Failure) as found:
        toml.read(file, SCHEMA)
    assert str(found.value).startswith(f"{file}, line {line}: " if line else f"{file}: ")


def test_what_is_too_much(file):
    """Deep and long files cost one line, not the loop of graftd."""
    file.write_text("on = " + "[" * 5000)
    with pytest.raises(Failure, match=f"{file}, line 1: tables or arrays too deep"):
        toml.read(file, SCHEMA)
    file.write_text("on" + ".a" * 1000 + " = 1")
    with pytest.raises(Failure, match=f"{file}, line 1: more than 16 dots outside of strings"):
        toml.read(file, SCHEMA)
    file.write_text(f'names = ["{"." * 50}"]')
    assert toml.read(file, SCHEMA)["names"] == ("." * 50,)
    file.write_text(f"# {'.' * 50}\non = true # 10.0.0.1{' 10.0.0.2' * 9}\n")
    assert toml.read(file, SCHEMA) == {"on": True}
    for number in ("9" * 5000, f"0x{'f' * 6000}"):
        file.write_text(f"on = {number}")
        with pytest.raises(Failure, match=f"{file}") as found:
            toml.read(file, SCHEMA)
        assert len(str(found.value)) < 500
    file.write_text(f"names = [{'1,' * 1001}]")
    with pytest.raises(Failure, match="an array of more than 1000 values"):
        toml.read(file, SCHEMA)
    file.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(Failure, match=f"{file}: more than 1 MiB"):
        toml.read(file, SCHEMA)


def test_a_fault_is_one_line(file):
    file.write_text('"on\\ngraftd: forged" = 1')
    with pytest.raises(Failure) as found:
        toml.read(file, SCHEMA)
    assert "\n" not in str(found.value)


def test_bytes_that_are_no_text(file):
    file.write_bytes(b"on = \xff")
    with pytest.raises(Failure, match=f"{file}, line 1: not text in UTF-8 .byte 6"):
        toml.read(file, SCHEMA)


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_write_decides_nothing(file, mode):
    file.chmod(mode)
    with pytest.raises(Failure, match="others than root may write it"):
        toml.read(file, SCHEMA)


@pytest.mark.skipif(os.geteuid() != 0, reason="to give a file away needs root")
def test_nor_does_a_file_of_somebody_elses(file):
    os.chown(file, 65534, 65534)
    with pytest.raises(Failure, match="others than root may write it"):
        toml.read(file, SCHEMA)


def test_a_directory(tmp_path):
    with pytest.raises(Failure, match="not a file"):
        toml.read(tmp_path, SCHEMA)


def test_a_byte_order_mark(file):
    file.write_bytes(b"\xef\xbb\xbfon = true\n")
    with pytest.raises(Failure, match=f"{file}, line 1: a byte order mark"):
        toml.read(file, SCHEMA)


def test_who_may_write_the_directory(file):
    """They could put an older file of root's in its place, or take it away."""
    file.write_text("on = true\n")
    for mode in (0o777, 0o775):
        file.parent.chmod(mode)
        with pytest.raises(Failure, match=f"{file}: others than root may write in {file.parent} .chown root"):
            toml.read(file, SCHEMA)
    assert toml.read(file, SCHEMA, anybodys=True) == {"on": True}
    file.parent.chmod(0o755)
    assert toml.read(file, SCHEMA) == {"on": True}


def test_links_lead_to_what_root_alone_may_write(file, tmp_path):
    target = tmp_path / "target"
    target.write_text("on = true\n")
    target.chmod(0o644)
    file.unlink()
    file.symlink_to(target)
    assert toml.read(file, SCHEMA) == {"on": True}
    target.chmod(0o666)
    with pytest.raises(Failure, match=f"{file}: others than root may write it"):
        toml.read(file, SCHEMA)
    target.unlink()
    with pytest.raises(Failure, match=f"{file}: a symbolic link that leads nowhere"):
        toml.read(file, SCHEMA)


def test_a_name_stands_in_one_file(file, tmp_path):
    other = tmp_path / "other.toml"
    for path, text in ((file, "a = 1\nb = 2\n"), (other, "\nb = 3\n")):
        path.write_text(text)
        path.chmod(0o644)
    names = toml.Names()
    assert toml.read_names(file, lambda _name, value: value, None, names) == {"a": 1, "b": 2}
    with pytest.raises(Failure, match=f"{other}, line 2: b: it stands in {file}, line 2 as well"):
        toml.read_names(other, lambda _name, value: value, None, names)
