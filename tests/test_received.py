"""What a file from somebody else may be before anything looks inside; the limits, and what is said beyond them."""

import os
import zipfile
from dataclasses import dataclass

import pytest

from reverie import received
from reverie.errors import ConfigError


def refusal(function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Inner:
    count: int


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    parts: dict[str, Inner]


def test_only_an_ordinary_file_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name, got in (
        ("pipe", "must be a file, got a pipe; check the path"),
        ("lost", "must be a file, got nothing that can be read; check the path"),
        ("zeros", "must be a file, got a device; check the path"),
        (".", "must be a file, got a folder; check the path"),
    ):
        assert refusal(received.read_bytes, tmp_path / name) == got


def test_no_more_is_read_than_is_allowed(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert received.read_bytes(tmp_path / "a", 5) == b"12345"
    assert (
        refusal(received.read_bytes, tmp_path / "a", 4)
        == "must have at most 4 bytes, got more; check that it is the right file"
    )


def test_json_of_the_right_structure_is_plain_data_with_all_its_keys():
    text = '{"name": "x", "parts": {"a": {"count": 1}}, "later": [1.5]}'
    assert received.parse_json(text, Outer, "fix it") == {"name": "x", "parts": {"a": {"count": 1}}, "later": [1.5]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": 1, "parts": {}}', "name must be a valid string, got 1; fix it"),
        ('{"parts": {}}', "name must be there, got nothing; fix it"),
        ('{"name": "x", "parts": {"a": {"count": "1"}}}', "parts.a.count must be a valid integer, got '1'; fix it"),
        ('{"name": "x", "parts": {"a": {"count": NaN}}}', "must be JSON, got 'expected value at line 1 column 40'; fix it"),
        ("[]", "it must be an object, got []; fix it"),
        ("[" * 100_000, "must be JSON, got 'recursion limit exceeded at line 1 column 202'; fix it"),
        (b"\xff", "must be JSON, got 'expected value at line 1 column 1'; fix it"),
    ],
)
def test_other_json_is_refused_with_the_place(text, message):
    assert refusal(received.parse_json, text, Outer, "fix it") == message


def packed(path, *members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def checked(path):
    with zipfile.ZipFile(path) as archive:
        received.check_archive(archive, path.stat().st_size)


def test_an_archive_that_blows_up_is_refused(tmp_path, monkeypatch):
    bomb = packed(tmp_path / "bomb.zip", ("zeros", bytes(1 << 20)))
    checked(bomb)
    monkeypatch.setattr(received, "FREE_BYTES", 1000)
    size = bomb.stat().st_size
    assert size < 2000
    assert refusal(checked, bomb) == (
        f"must become at most 20 times its {size} bytes when it is unpacked, or 1000, got 1048576; "
        "is it a decompression bomb? Pack it without compression if not"
    )
    checked(packed(tmp_path / "stored.zip", ("zeros", bytes(1 << 20)), compression=zipfile.ZIP_STORED))


def test_an_archive_that_two_readers_could_take_for_different_ones_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = packed(tmp_path / "twice.zip", ("a", b"1"), ("a", b"2"))
    assert refusal(checked, twice) == "must be an archive with one member of each name, got several of 'a'; pack it again"
    exotic = packed(tmp_path / "exotic.zip", ("a", b"1"), compression=zipfile.ZIP_LZMA)
    assert refusal(checked, exotic) == "must be an archive that is stored or deflated, got another compression; pack it again"
    data = bytearray(packed(tmp_path / "locked.zip", ("a", b"1")).read_bytes())
    # The flags of a member stand in its entry of the central directory.
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    assert refusal(checked, tmp_path / "locked.zip") == (
        "must be an archive without encryption, got encrypted members; decrypt it first"
    )


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a/../../b", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(name):
    assert refusal(received.check_inside, name, "an image") == (
        f"an image must lie in the folder itself, got {name!r}; move it there"
    )


@pytest.mark.parametrize(
    ("shape", "item", "stored", "fits"),
    [((2, 3), 4, 24, True), ((2, 3), 4, 25, False), ((-2, -3), 4, 24, False), ((), 8, 8, True)],
)
def test_an_array_takes_the_bytes_that_its_shape_says(shape, item, stored, fits):
    assert received.holds(shape, item, stored) == fits
