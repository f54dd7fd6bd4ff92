"""What was picked: as numbers, as text that reads back, as data of an answer, and as pictures."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loratorio_ext.heatmaps import COLUMNS, colours, pictures, share_chart, weight_maps
from loratorio_ext.infotext import quote
from loratorio_ext.record import Record, StepData, read_shares, written_shares

NAME = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)


def weights(n, rows, seed=0, size=(3, 4)):
    drawn = np.random.default_rng(seed).random((n, rows, *size), dtype=np.float32)
    return drawn / drawn.sum(axis=0)


class TestRecord:
    def test_shares_are_means_over_patches_rows_and_steps(self):
        record, steps = Record(), [weights(2, 3, seed) for seed in range(4)]
        for step in steps:
            record.add(["a", "b"], step, (0, 1, 0))
        of_image = [np.mean([step[:, [0, 2]].mean((1, 2, 3)) for step in steps], axis=0)]
        of_image.append(np.mean([step[:, 1].mean((1, 2)) for step in steps], axis=0))
        assert record.images == 2 and record.loras == ["a", "b"]
        for shares, expected in zip(record.shares(), of_image):
            np.testing.assert_allclose([shares["a"], shares["b"]], expected, rtol=1e-5)
            assert sum(shares.values()) == pytest.approx(1)

    def test_a_second_pass_with_other_loras_and_another_size(self):
        record = Record()
        record.add(["a", "b"], weights(2, 1), (0,))
        record.add(["b", "c"], weights(2, 1, size=(5, 6)), (0,))
        assert record.loras == ["a", "b", "c"]
        table = record.share_table(0)
        assert table.shape == (2, 3) and table[0, 2] == table[1, 0] == 0
        np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-5)

    def test_nothing_recorded(self):
        assert Record().shares() == [] and Record().images == 0 and pictures(Record(), 0) == []

    def test_what_is_kept_does_not_change_with_what_was_given(self):
        record, given_ = Record(), weights(2, 1)
        record.add(["a", "b"], given_, (0,))
        before = record.share_table(0)
        given_[:] = 0
        np.testing.assert_array_equal(record.share_table(0), before)

    def test_data_of_several_batches(self):
        records = [Record(), Record()]
        for number, record in enumerate(records):
            for step in range(3):
                record.add(["a", "b"] if number else ["b"], weights(2 if number else 1, 2, step), (0, 1))
        data = json.loads(json.dumps(StepData.of(records)))
        assert data["loras"] == ["b", "a"]
        assert np.array(data["shares"]).shape == (4, 3, 2)
        assert data["shares"][0] == [[1.0, 0.0]] * 3
        np.testing.assert_allclose(np.sum(data["shares"], axis=2), 1, atol=1e-3)
        assert StepData.of(records)(p=None, index=0) is None, "no text of an infotext"


class TestText:
    @given(st.dictionaries(NAME, st.floats(0.001, 1)))
    def test_round_trip(self, shares):
        read = read_shares(written_shares(shares))
        assert read == {name: pytest.approx(share, abs=5.1e-4) for name, share in shares.items()}
        assert list(read.values()) == sorted(read.values(), reverse=True)
        assert written_shares(read) == written_shares(dict(sorted(shares.items(), key=lambda item: -item[1])))

    @given(st.dictionaries(NAME.filter(lambda name: name.isprintable()), st.floats(0.001, 1), min_size=1))
    def test_round_trip_through_the_webuis_own_text(self, shares):
        import re

        line = f"Steps: 20, LoRAtorio picked: {quote(written_shares(shares))}, Version: 1"
        found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line))
        text = found["LoRAtorio picked"]
        text = json.loads(text) if text[:1] == text[-1:] == '"' else text
        assert read_shares(text).keys() == shares.keys()

    def test_as_it_looks(self):
        assert written_shares({"hat": 0.2, "robot; 0.9": 0.7, "none": 0.0}) == "robot\\; 0.9 0.700; hat 0.200"
        assert written_shares({}) == "" and read_shares("") == {}

    @pytest.mark.parametrize("text", ["robot", "robot high", "0.5; robot"])
    def test_other_text_is_refused(self, text):
        with pytest.raises(ValueError):
            read_shares(text)


class TestPictures:
    def test_brighter_means_more(self):
        ramp = colours(np.linspace(-0.5, 1.5, 50)).astype(int)
        lightness = ramp @ [299, 587, 114]
        assert (np.diff(lightness) >= 0).all() and lightness[-1] > lightness[0]
        assert colours(np.array(1.0)).tolist() == [255, 250, 200]

    def test_a_column_a_step_and_a_row_a_lora(self):
        table = np.zeros((6, 2), np.float32)
        table[:3, 0] = table[3:, 1] = 1
        chart = np.asarray(share_chart(["first", "second"], table)).astype(int).sum(axis=2)
        bright = chart > 650
        left, right = bright[:, 150 : 150 + 72], bright[:, 150 + 72 : 150 + 144]
        upper, lower = slice(34, 54), slice(56, 76)
        assert left[upper].mean() > 0.9 and right[lower].mean() > 0.9
        assert left[lower].mean() < 0.1 and right[upper].mean() < 0.1

    @pytest.mark.parametrize("steps", [1, 3, 50])
    @pytest.mark.parametrize("size", [(1, 1), (2, 9), (64, 48)])
    def test_maps_of_any_grid_and_any_number_of_steps(self, steps, size):
        record = Record()
        for step in range(steps):
            record.add(["a", "b", "c"], weights(3, 2, step, size), (0, 1))
        chart, maps = pictures(record, 1)
        assert chart.mode == maps.mode == "RGB"
        assert maps.width == 150 + min(steps, COLUMNS) * 78 + 6

    def test_a_map_shows_where(self):
        record, left = Record(), np.zeros((2, 1, 4, 4), np.float32)
        left[0, :, :, :2] = left[1, :, :, 2:] = 1
        record.add(["left", "right"], left, (0,))
        maps = np.asarray(weight_maps(record.loras, record.steps, 0)).astype(int).sum(axis=2) > 650
        assert maps[34 : 34 + 72, 150 : 150 + 36].mean() == 1 and maps[34 : 34 + 72, 186:222].mean() == 0

    @given(st.lists(NAME, min_size=1, max_size=3, unique=True))
    def test_any_name_can_be_drawn(self, names):
        record = Record()
        record.add(names, weights(len(names), 1), (0,))
        assert all(isinstance(picture, Image.Image) for picture in pictures(record, 0))

    def test_loras_without_a_share_are_not_shown(self):
        record, of_two = Record(), np.zeros((3, 1, 2, 2), np.float32)
        of_two[1] = 1
        record.add(["a", "b", "c"], of_two, (0,))
        chart, maps = pictures(record, 0)
        assert maps.height == 34 + 78 + 6 and chart.height == 34 + 22 + 24
