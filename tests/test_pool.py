"""A pool's entries: what they mean, what they never reach, and what is said of those that mean nothing."""

import re
from pathlib import PurePosixPath

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loratorio_ext.errors import SettingsError
from loratorio_ext.pool import Listed, check_size, folders, path_below, readings, resolve


def lora(path, alias="", file=""):
    return Listed(PurePosixPath(path).name, file or f"/loras/{path}.safetensors", path, alias)


HERE = [
    lora("robot"),
    lora("robot_arm"),
    lora("styles/oil", alias="Oil painting"),
    lora("styles/ink"),
    lora("styles/old/fresco"),
    lora("people/knight"),
    lora('odd/a, b: "c"; d'),
    lora("odd/v1:2"),
    lora("odd/[x]"),
    lora("odd/x"),
    lora("twice/hat"),
    lora("again/hat"),
]
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=12).filter(str.strip)


def paths(*pool, listed=HERE):
    return [member.lora.path for member in resolve(pool, listed, 1.0)]


def weights(*pool, weight=1.0):
    return {member.lora.path: (member.text, member.unet) for member in resolve(pool, HERE, weight)}


@pytest.mark.parametrize(
    "entry, meant",
    [
        ("robot", ["robot"]),
        ("oil", ["styles/oil"]),
        ("styles/oil", ["styles/oil"]),
        ("Oil painting", ["styles/oil"]),
        ("robot*", ["robot", "robot_arm"]),
        ("*o*t*", ["robot", "robot_arm"]),
        ("robo?", ["robot"]),
        ("styles/*", ["styles/oil", "styles/ink", "styles/old/fresco"]),
        ("styles/???", ["styles/oil", "styles/ink"]),
        ("*/old/*", ["styles/old/fresco"]),
        ("*", [each.path for each in HERE]),
        ('a, b: "c"; d', ['odd/a, b: "c"; d']),
        ("[x]", ["odd/[x]"]),
        ("[xy]", ["odd/x"]),
        ("v1:2", ["odd/v1:2"]),
        ("twice/hat", ["twice/hat"]),
    ],
)
def test_what_an_entry_means(entry, meant):
    assert paths(entry) == meant


def test_nothing_in_the_pool():
    assert resolve((), HERE, 1.0) == []


def test_every_lora_once_and_in_order():
    assert paths("styles/*", "robot", "oil", "robot*") == [
        "styles/oil", "styles/ink", "styles/old/fresco", "robot", "robot_arm"
    ]  # fmt: skip


def test_weights():
    assert weights("robot:0.8") == {"robot": (0.8, 0.8)}
    assert weights("robot:0.2:-1") == {"robot": (0.2, -1.0)}
    assert weights("robot", weight=0.5) == {"robot": (0.5, 0.5)}
    assert weights("styles/*:.25") == {path: (0.25, 0.25) for path in ("styles/oil", "styles/ink", "styles/old/fresco")}
    assert weights("v1:2:0.5") == {"odd/v1:2": (0.5, 0.5)}
    assert weights("v1:2") == {"odd/v1:2": (1.0, 1.0)}


def test_a_name_goes_before_a_pattern_wherever_it_stands():
    expected = {"robot": (0.9, 0.9), "robot_arm": (0.3, 0.3)}
    assert weights("robot:0.9", "robot*:0.3") == weights("robot*:0.3", "robot:0.9") == expected


def test_of_two_of_a_kind_the_later_one_counts():
    assert weights("robot:0.1", "robot:0.7") == {"robot": (0.7, 0.7)}
    assert weights("*:0.5", "styles/*:0.6")["styles/oil"] == (0.6, 0.6)


def test_weight_zero_leaves_out():
    assert paths("robot*", "robot:0") == ["robot_arm"]
    assert weights("robot:0:0.5", "oil:1:0") == {"robot": (0.0, 0.5), "styles/oil": (1.0, 0.0)}
    assert resolve(["robot"], HERE, 0.0) == []


@pytest.mark.parametrize(
    "entry, near",
    [
        ("robt", "robot"),
        ("Robot", "robot"),
        ("styles/oill", "styles/oil"),
        ("styles", "styles/*"),
        ("styles/", "styles/*"),
        ("style/*", "styles/*"),
        ("fresko:0.5", "fresco"),
        ("oil paintin", "Oil painting"),
    ],
)
def test_an_unknown_entry_is_an_error_that_says_what_is_near(entry, near):
    with pytest.raises(SettingsError, match="for the pool") as caught:
        resolve([entry], HERE, 1.0)
    assert repr(readings(entry)[-1][0]) in str(caught.value)
    assert f"did you mean {near}?" in str(caught.value)
    assert caught.value.status_code == 422


@pytest.mark.parametrize(
    "entry",
    [
        "../robot", "../../etc/passwd", "/etc/passwd", "/loras/robot.safetensors", "/loras/robot", "./robot",
        "styles/../robot", "styles/../../secret", "..", ".", "/", "~", "~/robot", "C:\\robot", "..\\robot",
        "styles\\oil", "robot.safetensors", "/*", "../*", "/loras/*", "styles//oil", "file:///loras/robot", "$HOME",
        "robot\u200b", "ｒobot", "robot ", ":0.5", "robot:", "robot:high", "robot:1:2:3", "robot:nan", "robot:inf",
        "robot:1e3", "[", "[!", "zzz*", "styles/*/nothing/*",
    ],
)  # fmt: skip
def test_nothing_but_what_is_listed_can_be_reached(entry):
    with pytest.raises(SettingsError, match="for the pool"):
        resolve([entry], HERE, 1.0)


def test_a_listed_path_may_look_like_an_attack_and_is_still_only_that_file():
    odd = [lora("..", file="/loras/...safetensors"), lora("robot")]
    assert paths("..", listed=odd) == [".."]


def test_a_name_of_two_files_must_be_given_with_its_folder():
    with pytest.raises(SettingsError, match="'hat' in the pool may be any of again/hat, twice/hat"):
        resolve(["hat"], HERE, 1.0)


def test_where_nothing_is_listed():
    with pytest.raises(SettingsError, match="the host lists none"):
        resolve(["robot"], [], 1.0)


def test_a_huge_entry_is_not_repeated_in_full():
    with pytest.raises(SettingsError) as caught:
        resolve(["x" * 100_000], HERE, 1.0)
    assert len(str(caught.value)) < 300


@given(st.lists(TEXT, max_size=4), st.lists(TEXT, min_size=1, max_size=6, unique=True))
def test_whatever_is_asked_only_listed_loras_come_back(pool, names):
    listed = [lora(name.replace("/", "_")) for name in names]
    try:
        members = resolve(pool, listed, 1.0)
    except SettingsError:
        return
    assert all(member.lora in listed for member in members)
    assert len({member.lora.file for member in members}) == len(members)


@given(st.lists(TEXT.filter(lambda text: "/" not in text), min_size=1, max_size=6, unique=True), st.data())
def test_a_listed_name_always_means_that_lora(names, data):
    listed = [lora(f"folder/{name}") for name in names]
    chosen = data.draw(st.sampled_from(listed))
    assert [member.lora for member in resolve([chosen.name], listed, 1.0)] == [chosen]
    assert [member.lora for member in resolve([chosen.path], listed, 1.0)] == [chosen]
    weighted = f"{chosen.name}:0.5"
    assume(weighted not in names)
    found = resolve([weighted], listed, 1.0)
    assert any(member.lora == chosen for member in found) or "*" in chosen.name or "?" in chosen.name


def test_paths_below_the_folder():
    assert path_below("/models/Lora/styles/oil.safetensors", "/models/Lora") == "styles/oil"
    assert path_below("/models/Lora/v1.5.pt", "/models/Lora/") == "v1.5"
    assert path_below("/elsewhere/styles/oil.safetensors", "/models/Lora") == "oil"
    assert path_below("/models/Lora2/oil.safetensors", "/models/Lora") == "oil"


def test_folders_as_patterns():
    assert folders(HERE) == ["again/*", "odd/*", "people/*", "styles/*", "styles/old/*", "twice/*"]
    for folder in folders(HERE):
        assert paths(folder)


class TestSize:
    """Five LoRAs of 1, 2, 3, 4 and 100 KiB: four of a folder, and one by its name."""

    LISTED = [Listed(f"s{size}", f"/s{size}", f"many/s{size}", size=size << 10) for size in (1, 2, 3, 4)]
    LISTED += [Listed("big", "/big", "big", size=100 << 10)]

    def members(self, *pool):
        return resolve(pool, self.LISTED, 1.0)

    @pytest.mark.parametrize("most_files, most_bytes", [(5, 110 << 10), (0, 0), (5, 0), (0, 110 << 10)])
    def test_what_fits(self, most_files, most_bytes):
        assert check_size(self.members("many/*", "big"), most_files, most_bytes) is None

    @pytest.mark.parametrize(
        "most_files, most_bytes, entry, count",
        [(4, 0, "many/*", 4), (4, 110 << 10, "many/*", 4), (5, (110 << 10) - 1, "big", 1), (0, 1, "big", 1)],
    )
    def test_what_does_not(self, most_files, most_bytes, entry, count):
        """The error names the entry that is most to blame, and says what there is and what may be."""
        with pytest.raises(SettingsError, match=f"5 LoRAs.*'{re.escape(entry)}' brings {count} of.*name:0.*") as caught:
            check_size(self.members("many/*", "big"), most_files, most_bytes)
        assert caught.value.field == "pool" and caught.value.value == entry
        for limit in filter(None, [most_files and f"at most {most_files} LoRAs", most_bytes and "GiB in all"]):
            assert limit in caught.value.allowed and caught.value.allowed in str(caught.value)

    def test_what_is_left_out_counts_for_nothing(self):
        check_size(self.members("many/*", "s4:0", "big:0"), 3, 6 << 10)

    def test_nothing(self):
        check_size([], 1, 1)
