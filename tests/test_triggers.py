"""A LoRA's trigger words: the user's own before the training set's, and nothing where nothing can be read; and whether
a prompt has them, however it is written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratorio_ext.triggers import LIMIT, has_phrase, is_named, phrases, training_tags, trigger_words

TAGS = {"10_robot": {" a robot ": 12, "metal": 3}, "5_more": {"metal": 20, "sky": 1}}


@pytest.mark.parametrize("frequency", [TAGS, json.dumps(TAGS)], ids=["dict", "text"])
def test_the_most_frequent_training_tags(frequency):
    assert training_tags({"ss_tag_frequency": frequency}) == ["metal", "a robot", "sky"]


def test_not_all_of_many():
    many = {"folder": {f"tag {i}": i + 1 for i in range(100)}}
    assert training_tags({"ss_tag_frequency": many}) == [f"tag {i}" for i in range(99, 99 - LIMIT, -1)]


@pytest.mark.parametrize(
    "frequency", [None, "", "{", "[]", 3, [], {"a": 3}, {"a": {"b": "c"}}, {"a": {" ": 1}}], ids=repr
)
def test_what_is_no_table_of_tags(frequency):
    assert training_tags({"ss_tag_frequency": frequency}) == []
    assert training_tags({}) == []


def test_the_users_own_text_goes_first(tmp_path):
    file = tmp_path / "robot.v1.safetensors"
    assert trigger_words(str(file), {"ss_tag_frequency": TAGS}) == "metal, a robot, sky"
    (tmp_path / "robot.v1.json").write_text(json.dumps({"activation text": " rbt, metal ", "preferred weight": 0.7}))
    assert trigger_words(str(file), {"ss_tag_frequency": TAGS}) == "rbt, metal"


@pytest.mark.parametrize("notes", ["", "{", "[]", '{"activation text": ""}', '{"activation text": 3}', "\xff"])
def test_notes_that_say_nothing(tmp_path, notes):
    (tmp_path / "robot.json").write_bytes(notes.encode("latin-1"))
    assert trigger_words(str(tmp_path / "robot.safetensors"), {"ss_tag_frequency": TAGS}) == "metal, a robot, sky"
    assert trigger_words(str(tmp_path / "robot.safetensors"), {}) == ""


def test_phrases_are_between_commas():
    assert phrases(" rbt, zorg robot ,, rbt\nred armour,") == ("rbt", "zorg robot", "red armour")
    assert phrases(" , \n") == phrases("") == ()


@pytest.mark.parametrize(
    "prompt",
    [
        "a zorg robot on the left",
        "A Zorg Robot",
        "two zorg robots",
        "a (zorg:1.2) robot",
        "a ((zorg)) [robot]",
        "zorg_robot, sky",
        "a [zorg robot:ball:0.5] in a city",
        "a [zorg|blue] robot",
        "a city AND a zorg robot :1.2",
        "a robot BREAK zorg",
        "zorg \\(robot\\)",
        "(zorg)1.3 robot--",
        "zorg,robot",
    ],
)
def test_however_a_prompt_is_written(prompt):
    assert has_phrase(prompt, "zorg robot") and is_named(prompt, ("zr", "zorg robot"))


@pytest.mark.parametrize("prompt", ["", "a robot", "a zorgon robot", "a grell robot and a ball", "zor g robot"])
def test_what_is_not_named(prompt):
    assert not has_phrase(prompt, "zorg robot") and not is_named(prompt, ("zorg robot", "zr"))


def test_scripts_that_write_words_in_one_line():
    assert has_phrase("\u4e00\u4e2a\u673a\u5668\u4eba\u5728\u57ce\u5e02", "\u673a\u5668\u4eba")
    assert not has_phrase("\u4e00\u4e2a\u57ce\u5e02", "\u673a\u5668\u4eba")


def test_words_that_nobody_knows_leave_nobody_out():
    assert is_named("a ball", ()) and is_named("", ())
    assert not is_named("a ball", ("!!", "..")), "no word in them, none in the prompt"


@given(st.lists(st.text("abc xyz", min_size=1).filter(str.strip), min_size=1, max_size=4), st.text("(){}[]:|,. 1"))
def test_a_phrase_is_found_wherever_it_stands(words, between):
    prompt = between.join([" ", *words, " "])
    assert all(has_phrase(f"{before} {word} {prompt}", word) for word in words for before in ("", "a city,"))
