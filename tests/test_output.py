"""Pictures on disk: what is found out before they are made, and what is left when writing fails."""

import errno
import os
import stat

import pytest

pytest.importorskip("PIL")

from PIL import Image

from loratorio_ext.errors import SettingsError, WriteError
from loratorio_ext.infotext import PNG_KEY
from loratorio_ext.standalone.output import check_out, numbered, save, whole

IMAGE = Image.new("RGB", (8, 8), (200, 30, 30))


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path, monkeypatch):
    """Refuge for pictures, inside the test's own folder."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


def full_disk(monkeypatch, folder):
    """From now on, pictures that are written into the folder end in the middle."""
    real = Image.Image.save

    def fail(self, path, *args, **kwargs):
        if os.path.dirname(path) != str(folder):
            return real(self, path, *args, **kwargs)
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)


@pytest.mark.parametrize("name", ["out", "out.txt", "out.jpg", "out.png.webp", ".png", ""])
def test_another_ending(tmp_path, name):
    with pytest.raises(SettingsError, match=r"must end in \.png") as caught:
        check_out(tmp_path / name)
    assert caught.value.field == "out" and ".png" in caught.value.allowed
    assert sorted(each.name for each in tmp_path.iterdir()) == ["temporary"]


def test_a_folder(tmp_path):
    (tmp_path / "out.png").mkdir()
    with pytest.raises(SettingsError, match="is a folder"):
        check_out(tmp_path / "out.png")


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="out cannot be written") as caught:
        check_out(tmp_path / "file/out.png")
    assert caught.value.field == "out"


def test_a_name_that_no_file_can_have(tmp_path):
    for name in ("a" * 300 + ".png", "a\0b.png"):
        with pytest.raises(WriteError):
            check_out(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(WriteError, match="out cannot be written"):
        check_out(tmp_path / "locked/out.png")


def test_a_new_place_is_made_and_left_empty(tmp_path):
    check_out(tmp_path / "a/b/out.PNG")
    assert list((tmp_path / "a/b").iterdir()) == []


def test_what_is_there_stays_whole_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    save([(IMAGE, path, "before")])
    before = path.read_bytes()
    full_disk(monkeypatch, tmp_path)
    with pytest.raises(WriteError, match="No space left.*is in .*temporary.*out.png instead") as caught:
        save([(IMAGE, path, "after"), (IMAGE, tmp_path / "maps.png", None)])
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.png", "temporary"]
    # Nothing is lost: the pictures are where the message says.
    kept = sorted(tmp_path.glob("temporary/loratorio-*/*.png"))
    assert [each.name for each in kept] == ["maps.png", "out.png"]
    assert Image.open(kept[1]).info[PNG_KEY] == "after" and str(kept[1]) in str(caught.value)


def test_an_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "out.png") as file:
        file.write_bytes(b"half")
        raise KeyboardInterrupt
    assert [each.name for each in tmp_path.iterdir()] == ["temporary"]


def test_permissions_and_links_are_as_with_writing_in_place(tmp_path):
    mask = os.umask(0o027)
    try:
        save([(IMAGE, tmp_path / "new.png", None)])
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new.png").stat().st_mode) == 0o640
    (tmp_path / "new.png").chmod(0o604)
    (tmp_path / "link.png").symlink_to(tmp_path / "new.png")
    save([(IMAGE, tmp_path / "link.png", "again")])
    assert (tmp_path / "link.png").is_symlink() and Image.open(tmp_path / "new.png").info[PNG_KEY] == "again"
    assert stat.S_IMODE((tmp_path / "new.png").stat().st_mode) == 0o604


def test_numbers(tmp_path):
    assert [each.name for each in numbered(tmp_path / "a.b.png", 2)] == ["a.b-0.png", "a.b-1.png"]
