"""What was picked: as numbers, as text that reads back, as data of an answer, and as pictures."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loratorio_ext.heatmaps import BASE, BASE_NAME, COLOURS, fewer, parts_of, pictures
from loratorio_ext.infotext import quote
from loratorio_ext.record import Record, StepData, TextOfEach, reach, read_shares, written_shares

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

    def test_gates_that_add_up_to_more_are_shared(self):
        """And what they leave is the base model's."""
        record, gates = Record(), np.float32([[1.0, 0.5, 0.0], [1.0, 0.25, 1.0], [0.5, 0.0, 0.0]])
        record.add(["a", "b", "c"], gates.reshape(3, 1, 1, 3), (0,))
        maps = [[0.4, 0.5, 0], [0.4, 0.25, 1], [0.2, 0, 0]]
        np.testing.assert_allclose(record.mean_maps(0)[:, 0], maps, atol=1e-6)
        base = next(part for part in parts_of(record, 0, (3, 1)) if part.name == BASE_NAME)
        np.testing.assert_allclose(base.map, [[0, 0.25, 0]], atol=1e-6)
        assert base.share == pytest.approx(0.25 / 3)

    def test_gates_of_several_rows_are_shared_row_by_row(self):
        record = Record()
        record.add(["a", "b"], np.float32([[1, 0], [1, 0]]).reshape(2, 2, 1, 1), (0, 0))
        assert record.share_table(0).tolist() == [[0.25, 0.25]]

    def test_nothing_recorded(self):
        assert Record().shares() == [] and Record().images == 0

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

    def test_an_image_of_somebody_elses_has_none(self):
        """As the host asks for each image's: by its place in the batch, to which others may have added images."""
        texts = TextOfEach(["hat 1.000", "robot 1.000"])
        assert [texts[place] for place in range(4)] == ["hat 1.000", "robot 1.000", None, None]
        assert isinstance(texts, list) and json.loads(json.dumps(texts)) == ["hat 1.000", "robot 1.000"]
        assert texts[-1] == "robot 1.000" and texts[5:] == []

    @pytest.mark.parametrize("text", ["robot", "robot high", "0.5; robot"])
    def test_other_text_is_refused(self, text):
        with pytest.raises(ValueError):
            read_shares(text)


def halves(name="left", other="right", size=(4, 4)):
    """A record of one image whose left half is one LoRA's and whose right half another's."""
    record, left = Record(), np.zeros((2, 1, *size), np.float32)
    left[0, ..., : size[1] // 2] = left[1, ..., size[1] // 2 :] = 1
    record.add([name, other], left, (0,))
    return record


def flat(width=512, height=512, lightness=128):
    return Image.new("RGB", (width, height), (lightness,) * 3)


def hue(picture, colour):
    """Where a picture has a colour's hue, ``[H, W]``."""
    pixels = np.asarray(picture, float)
    pixels, wanted = pixels - pixels.mean(axis=2, keepdims=True), np.array(colour, float) - np.mean(colour)
    length = np.linalg.norm(pixels, axis=2)
    return (pixels @ wanted / np.linalg.norm(wanted) > 0.95 * length) & (length > 10)


class TestReach:
    @given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 64))
    def test_patches_reach_over_the_edge_by_what_the_last_one_lacks(self, height, width, p):
        grid = -(-height // p), -(-width // p)
        reached = reach(grid, p, (height, width))
        assert reached == pytest.approx((grid[0] * p / height, grid[1] * p / width))

    def test_of_another_latent_nothing_is_known(self):
        assert reach((4, 4), 4, (64, 64)) == reach((64, 64), 4, (16, 16)) == (1.0, 1.0)

    def test_a_partial_patch_is_drawn_as_large_as_it_is(self):
        """A latent of 6 pixels a side has a whole patch of 4 and half a one."""
        record, weights_ = Record(), np.zeros((1, 1, 2, 2), np.float32)
        weights_[..., 0, 0] = 1
        record.add(["a"], weights_, (0,), reach((2, 2), 4, (6, 6)))
        (drawn,) = record.mean_maps(0, (48, 48))
        assert drawn[:32, :32].min() == 1 and drawn[33:].max() == drawn[:, 33:].max() == 0


class TestMaps:
    def test_they_are_means_over_the_steps_and_nobody_is_nothing(self):
        record = Record()
        for loras in (["a", "b"], ["b", "c"]):
            record.add(loras, np.array([0.75, 0.25], np.float32).reshape(2, 1, 1, 1), (0,))
        np.testing.assert_allclose(record.mean_maps(0, (3, 2))[:, 0, 0], [0.375, 0.5, 0.125])
        assert record.mean_maps(0).shape == (3, 1, 1)

    def test_passes_of_two_sizes_are_laid_over_each_other(self):
        record = Record()
        for size in ((4, 4), (8, 8)):
            record.add(["left", "right"], halves(size=size).steps[0].weights, (0,))
        maps = record.mean_maps(0, (64, 64))
        assert maps[0, :, :32].min() == maps[1, :, 32:].min() == 1
        np.testing.assert_allclose(record.mean_maps(0)[0], np.repeat([[1, 0]], 8, 0).repeat(4, 1), atol=1e-6)

    def test_as_data_with_the_base_models_part(self):
        record = halves()
        record.add(["left", "right"], np.full((2, 1, 4, 4), 0.25, np.float32), (0,))
        data = json.loads(json.dumps(StepData.of([record], maps=True)))
        assert data["base"] == [[0.0, 0.5]]
        maps = np.array(data["maps"])
        assert maps.shape == (1, 2, 4, 4)
        np.testing.assert_allclose(maps[0, 0, 0], [0.625, 0.625, 0.125, 0.125])

    def test_of_batches_with_other_loras(self):
        data = StepData.of([halves("a", "b"), halves("b", "c")], maps=True)
        maps = np.array(data["maps"])
        assert data["loras"] == ["a", "b", "c"] and maps.shape == (2, 3, 4, 4)
        assert maps[0, 2].max() == maps[1, 0].max() == 0 and maps[1, 1, 0, 0] == maps[0, 0, 0, 0] == 1


class TestPictures:
    @pytest.mark.parametrize("size", [(512, 512), (768, 320), (1024, 1024)])
    def test_they_have_the_images_size(self, size):
        found = pictures(halves(), 0, flat(*size))
        assert list(found) == ["painted", "maps", "shares"]
        assert found["painted"].size == found["shares"].size == size
        assert found["maps"].width == size[0] and found["maps"].height in range(size[1] // 3, size[1] + 2)

    def test_a_small_image_is_shown_in_whole_multiples(self):
        assert {picture.width for picture in pictures(halves(), 0, flat(64, 96)).values()} == {256}

    def test_each_lora_has_its_colour_where_it_acts(self):
        found = pictures(halves(), 0, flat())
        painted = found["painted"].crop((0, 0, 512, 400))
        left, right = hue(painted, COLOURS[0]), hue(painted, COLOURS[1])
        assert left[:, :256].all() and not left[:, 256:].any()
        assert right[:, 256:].all() and not right[:, :256].any()
        panels = found["maps"]
        first, second = panels.crop((10, 100, 118, 250)), panels.crop((138, 100, 250, 250))
        assert hue(first, COLOURS[0]).all() and not hue(second, COLOURS[0]).any()
        assert hue(panels.crop((390, 100, 500, 250)), COLOURS[1]).all()

    def test_the_image_stays_visible(self):
        image = flat()
        image.paste((255, 255, 255), (100, 100, 160, 160))
        painted = np.asarray(pictures(halves(), 0, image)["painted"].convert("L"), int)
        assert painted[130, 130] > painted[50, 50] + 40

    def test_what_is_left_of_one_is_the_base_models(self):
        record = Record()
        record.add(["left"], halves().steps[0].weights[:1], (0,))
        parts = parts_of(record, 0, (64, 64))
        assert [part.name for part in parts] == ["left", BASE_NAME] and parts[1].colour == BASE
        assert [part.label for part in parts] == ["50% left", "50% base model"]
        assert parts[1].map[:, :32].max() == 0 and parts[1].map[:, 32:].min() == 1
        painted = np.asarray(pictures(record, 0, flat())["painted"])
        assert (painted[:300, 300:] == 128).all(), "the image, in grey"
        assert [part.name for part in parts_of(halves(), 0, (8, 8))] == ["left", "right"]

    def test_who_is_in_every_pass_is_named_beside_the_base_model(self):
        record = Record()
        for _ in range(2):
            record.add(["left"], halves().steps[0].weights[:1], (0,), everywhere=["town", "lcm"])
        assert [part.label for part in parts_of(record, 0, (8, 8))] == ["50% left", "50% base model + town + lcm"]

    def test_of_many_loras_those_with_most_have_colours(self):
        record, count = Record(), 12
        drawn = np.arange(1, count + 1, dtype=np.float32).reshape(-1, 1, 1, 1) / sum(range(1, count + 1))
        record.add([f"n{i}" for i in range(count)], drawn, (0,))
        parts = parts_of(record, 0, (32, 32))
        few = fewer(parts)
        assert [part.name for part in few] == ["n11", "n10", "n9", "n8", "n7", "n6", "6 others"]
        assert len({part.colour for part in few}) == 7
        assert sum(part.share for part in few) == pytest.approx(1)
        assert len(parts) == count, "each has a map still"

    def test_a_step_stands_over_its_place_and_shares_add_up(self):
        record = Record()
        for step in range(4):
            first = np.float32(step < 2)
            record.add(["a", "b"], np.array([first, 1 - first]).reshape(2, 1, 1, 1), (0,))
        chart = pictures(record, 0, flat())["shares"].crop((80, 20, 480, 380))
        early, late = chart.crop((0, 0, 190, 360)), chart.crop((230, 0, 400, 360))
        for picture, mine, other in ((early, 0, 1), (late, 1, 0)):
            assert hue(picture, COLOURS[mine]).mean() > 0.9 and hue(picture, COLOURS[other]).mean() < 0.05

    def test_only_the_region_that_was_painted(self):
        painted = pictures(halves(), 0, flat(), region=(200, 40, 100, 80))["painted"]
        touched = hue(painted, COLOURS[0]) | hue(painted, COLOURS[1])
        assert touched[40:120, 200:300].all()
        touched[40:120, 200:300] = False
        assert not touched[:380].any()

    def test_smooth_weights_have_no_edges(self):
        steep = np.abs(np.diff(halves().mean_maps(0, (64, 64))[0], axis=1)).max()
        soft = np.abs(np.diff(halves().mean_maps(0, (64, 64), smooth=True)[0], axis=1)).max()
        assert steep == 1 and soft < 0.1

    @pytest.mark.parametrize("steps", [1, 3, 150])
    @pytest.mark.parametrize("size", [(1, 1), (2, 9), (64, 48)])
    def test_any_grid_and_any_number_of_steps(self, steps, size):
        record = Record()
        for step in range(steps):
            record.add(["a", "b", "c"], weights(3, 2, step, size), (0, 1))
        assert all(picture.mode == "RGB" for picture in pictures(record, 1, flat(300, 260)).values())

    @given(st.lists(NAME, min_size=1, max_size=3, unique=True))
    def test_any_name_can_be_drawn(self, names):
        record = Record()
        record.add(names, weights(len(names), 1), (0,))
        assert all(isinstance(picture, Image.Image) for picture in pictures(record, 0, flat(64, 64)).values())

    def test_loras_without_a_share_are_not_shown(self):
        record, of_two = Record(), np.zeros((3, 1, 2, 2), np.float32)
        of_two[1] = 1
        record.add(["a", "b", "c"], of_two, (0,))
        assert [part.name for part in parts_of(record, 0, (8, 8))] == ["b"]

    def test_where_nobody_had_a_share_there_is_nothing_to_show(self):
        record = Record()
        record.add([], np.zeros((0, 1, 2, 2), np.float32), (0,))
        assert pictures(record, 0, flat()) == pictures(Record(), 0, flat()) == {}
