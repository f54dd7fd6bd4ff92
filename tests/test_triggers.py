"""A LoRA's trigger words: the user's own before the training set's, and nothing where nothing can be read."""

import json

import pytest

from loratorio_ext.triggers import LIMIT, training_tags, trigger_words

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
