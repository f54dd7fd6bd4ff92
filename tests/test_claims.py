"""Claims: what tags and options say of where, when and how much a LoRA may act, and what is refused in which words."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from loratorio_ext import masks
from loratorio_ext.claims import (
    Claim,
    Claims,
    Tagged,
    claims_of,
    heeding,
    in_words,
    left_out,
    not_heeded,
    place_of,
    places_and_shares,
    share_of,
)
from loratorio_ext.errors import SettingsError
from loratorio_ext.parts import OTHERS, PARTS, PLACES, box_of, check_at, check_steps, is_slip, parts_of_tag
from loratorio_ext.pool import Listed
from loratorio_ext.settings import Settings
from loratorio_ext.styles import is_background, is_style

HERE = Path(__file__).parents[1]
sizes = st.integers(1, 40)


def lora(path, alias=""):
    return Listed(path.rpartition("/")[2], f"/loras/{path}.safetensors", path, alias)


def tagged(text, path="", alias=""):
    """An active LoRA by the inside of its tag."""
    items = tuple(text.split(":"))
    return Tagged(lora(path or items[0], alias), items)


def claims(*tags, **options):
    return claims_of(Settings(**options), [tagged(tag) if isinstance(tag, str) else tag for tag in tags])


def refuses(*tags, **options):
    with pytest.raises(SettingsError) as caught:
        claims(*tags, **options)
    return str(caught.value)


def base64_of(image, format="PNG", **saved):
    file = io.BytesIO()
    image.save(file, format, **saved)
    return base64.b64encode(file.getvalue()).decode()


def mask_of(pixels, mode="L", **saved):
    """A picture of these pixels (uint8 ``[h, w]`` or ``[h, w, channels]``) in base64."""
    return base64_of(Image.fromarray(np.asarray(pixels, np.uint8), mode), **saved)


def kept_pixels(text):
    with Image.open(io.BytesIO(base64.b64decode(masks.kept(text)))) as image:
        assert image.mode == "L" and image.format == "PNG"
        return np.asarray(image)


@pytest.mark.parametrize("module", ["settings", "parts", "masks", "claims", "sampling_loras", "styles"])
def test_import_needs_no_host_no_pillow_and_only_claims_torch(module):
    program = f"import sys, loratorio_ext.{module}; sys.exit('PIL' in sys.modules or 'modules' in sys.modules "
    program += ")" if module == "claims" else "or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=HERE).returncode == 0


class TestTags:
    @pytest.mark.parametrize(
        "tag, said",
        [
            ("knight", {}),
            ("knight:0.8", {}),
            ("knight:0.8:at=left", {"at": "left"}),
            ("knight:0.8:0.5:at=Right:share=2", {"at": "right", "share": 2.0}),
            ("knight:at=center", {"at": "centre"}),
            ("knight:at=0.1-.2-0.50-1.", {"at": "0.1-0.2-0.5-1"}),
            ("knight: at = 0-0-1-0.25 ", {"at": "0-0-1-0.25"}),
            ("knight:te=0.5:unet=1:dyn=4:steps=0.25-1", {"steps": "0.25-1"}),
            ("knight:share=.5:base=0", {"share": 0.5, "base": False}),
            ("lcm:1:base=1", {"base": True}),
        ],
    )
    def test_what_tags_say(self, tag, said):
        assert parts_of_tag(tag.split(":")) == said

    @pytest.mark.parametrize("name", sorted(OTHERS))
    def test_the_hosts_and_others_parts_are_passed_over(self, name):
        assert parts_of_tag(["knight", "1", f"{name}=0.5,2"]) == {}

    @pytest.mark.parametrize(
        "part",
        ["lbw=ALL", "lbw=1,0,0,0,1", "start=4", "stop=9", "step=0-10", "0,1@0.5", "a@0", "lctl=1", "bass", "x=y=z"],
    )
    def test_and_so_are_unknown_ones(self, part):
        assert parts_of_tag(["knight", "1", part]) == {}

    @pytest.mark.parametrize(
        "part, meant",
        [
            ("shrae=2", "share"),
            ("shar=2", "share"),
            ("shares=2", "share"),
            ("Share=2", "share"),
            ("stesp=0-1", "steps"),
            ("stepps=0-1", "steps"),
            ("STEPS=0-1", "steps"),
            ("bsae=1", "base"),
            ("word=zorg", "words"),
            ("AT=left", "at"),
        ],
    )
    def test_slips_are_named(self, part, meant):
        message = refuses(f"knight:0.8:{part}")
        assert f"<lora:knight:0.8:{part}>" in message and f"did you mean {meant}?" in message

    @given(st.sampled_from(["share", "steps", "base"]), st.data())
    def test_every_single_slip_is_seen(self, name, data):
        at = data.draw(st.integers(0, len(name) - 1))
        letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz"))
        swapped = name[:at] + name[at + 1 : at + 2] + name[at] + name[at + 2 :]
        for wrong in (name[:at] + name[at + 1 :], name[:at] + letter + name[at:], name[:at] + letter + name[at + 1 :]):
            assert is_slip(wrong, name) == (wrong not in OTHERS)
        assert is_slip(swapped, name)
        assert not is_slip(name + "zz", name) and not is_slip("q" + name[1:-1] + "q", name)

    @pytest.mark.parametrize(
        "part, allowed",
        [
            ("at=lft", "did you mean left?"),
            ("at=", "left, right, top, bottom, centre, or x0-y0-x1-y1"),
            ("at=left+top", "x0-y0-x1-y1"),
            ("at=0.5-0-0.2-1", "x0-y0-x1-y1"),
            ("at=0-0-2-1", "x0-y0-x1-y1"),
            ("at=0-0-1", "x0-y0-x1-y1"),
            ("at=0-0-nan-1", "x0-y0-x1-y1"),
            ("at=" + "9" * 5000, "x0-y0-x1-y1"),
            ("at=left=right", "left, right"),
            ("share=0", "from 0.01 to 100"),
            ("share=-1", "from 0.01 to 100"),
            ("share=1e1", "from 0.01 to 100"),
            ("share=nan", "from 0.01 to 100"),
            ("share=1_0", "from 0.01 to 100"),
            ("share=\u0662", "from 0.01 to 100"),
            ("share=", "from 0.01 to 100"),
            ("share=" + "9" * 5000, "from 0.01 to 100"),
            ("steps=0.5", "first-last"),
            ("steps=0.5-0.5", "the first below the last"),
            ("steps=0-20", "from 0 to 1"),
            ("base=2", "0 or 1"),
            ("base=true", "0 or 1"),
            ("mask=iVBORw0KGgo", "option loras"),
        ],
    )
    def test_bad_parts_are_refused_by_tag_part_value_and_range(self, part, allowed):
        name, _, value = part.partition("=")
        message = refuses(f"knight:0.8:{part}")
        assert message.startswith("LoRAtorio: ") and f"{name} in <lora:knight:0.8:{part}"[:60] in message
        assert allowed in message and len(message) < 400
        assert name == "mask" or repr(value)[:8] in message

    def test_a_part_said_twice(self):
        assert "at in <lora:a:1:at=left:at=right> is said twice" in refuses("a:1:at=left:at=right")


class TestPlaces:
    @given(sizes, sizes)
    def test_sides_that_meet_add_up_to_one(self, height, width):
        for pair in (("left", "right"), ("top", "bottom"), ("0-0-0.3-1", "0.3-0-1-1")):
            first, second = (Claim.of({"at": at}).place(height, width) for at in pair)
            torch.testing.assert_close(first + second, torch.ones(height, width))

    @given(sizes, sizes, st.integers(1, 99), st.integers(1, 99))
    def test_four_corners_add_up_to_one(self, height, width, x, y):
        x, y = f"{x / 100:g}", f"{y / 100:g}"
        boxes = (f"0-0-{x}-{y}", f"{x}-0-1-{y}", f"0-{y}-{x}-1", f"{x}-{y}-1-1")
        whole = sum(Claim.of({"at": at}).place(height, width) for at in boxes)
        torch.testing.assert_close(whole, torch.ones(height, width))

    @pytest.mark.parametrize(
        "at, inside, outside",
        [
            ("left", (10, 2), (10, 37)),
            ("right", (10, 37), (10, 2)),
            ("top", (1, 20), (18, 20)),
            ("bottom", (18, 20), (1, 20)),
            ("centre", (10, 20), (10, 2)),
            ("0.75-0-1-0.5", (1, 38), (18, 38)),
        ],
    )
    def test_left_is_left_and_top_is_top(self, at, inside, outside):
        place = Claim.of({"at": at}).place(20, 40)
        assert place.shape == (20, 40) and place.dtype == torch.float32
        assert place[inside] == 1 and place[outside] == 0

    def test_an_edge_is_a_tenth_of_the_side_wide_and_centred(self):
        row = Claim.of({"at": "left"}).place(1, 100)[0]
        assert (row[:45] == 1).all() and (row[55:] == 0).all()
        torch.testing.assert_close(row[45:55], torch.linspace(0.95, 0.05, 10))

    def test_there_is_no_soft_edge_at_the_images_border(self):
        assert (Claim.of({"at": "0-0-1-1"}).place(7, 9) == 1).all()
        assert (Claim.of({"at": "left"}).place(20, 20)[:, :8] == 1).all()

    @given(st.tuples(*[st.integers(0, 1000)] * 4), sizes, sizes)
    def test_any_box(self, edges, height, width):
        left, top, right, bottom = (edge / 1000 for edge in edges)
        assume(left < right and top < bottom)
        at = check_at(f"{left}-{top}-{right}-{bottom}")
        assert box_of(at) == pytest.approx((left, top, right, bottom)) and check_at(at) == at
        place = Claim.of({"at": at}).place(height, width)
        assert place.shape == (height, width) and 0 <= place.min() and place.max() <= 1
        for y in range(height):
            for x in range(width):
                across = ramp(x, width, left, right) * ramp(y, height, top, bottom)
                assert place[y, x] == pytest.approx(across, abs=1e-6)

    def test_nowhere_said_is_everywhere(self):
        assert Claim().place(4, 4) is None and not Claim().placed
        assert Claim.of({"at": "left"}).placed and Claim.of({"mask": mask_of([[255]])}).placed

    def test_several_loras(self):
        one, other = Claim.of({"at": "left", "share": 2.0}), Claim()
        stacked = place_of([one, other], 3, 4)
        assert torch.equal(stacked[0], one.place(3, 4)) and (stacked[1] == 1).all()
        assert share_of([one, other]).tolist() == [2, 1]
        assert place_of([other, other], 3, 4) is None and share_of([other, other]) is None
        assert place_of([], 3, 4) is None and share_of([]) is None


def ramp(index, count, first, last):
    """The softness of a side, literally."""
    pixel = (index + 0.5) / count
    rise = 1 if first == 0 else min(max((pixel - first) / 0.1 + 0.5, 0), 1)
    fall = 1 if last == 1 else min(max((last - pixel) / 0.1 + 0.5, 0), 1)
    return rise * fall


class TestSteps:
    @pytest.mark.parametrize(
        "steps, inside, outside",
        [
            ("0-0.5", [0, 0.25, 0.4999], [0.5, 0.75, 1]),
            ("0.5-1", [0.5, 0.75, 1], [0, 0.4999]),
            ("0.25-0.5", [0.25, 0.49], [0, 0.24, 0.5, 1]),
            ("0-1", [0, 0.5, 1], []),
        ],
    )
    def test_from_the_first_up_to_the_last(self, steps, inside, outside):
        claim = Claim.of({"steps": check_steps(steps)})
        assert all(map(claim.acts_at, inside)) and not any(map(claim.acts_at, outside))

    def test_windows_that_meet_share_no_step_and_leave_none(self):
        first, second = (Claim.of({"steps": steps}) for steps in ("0-0.35", "0.35-1"))
        for count in (1, 3, 20, 50):
            assert all(first.acts_at(i / count) != second.acts_at(i / count) for i in range(count))


class TestMasks:
    PIXELS = [[0, 64, 128], [255, 0, 200]]

    def test_what_is_kept_is_what_was_given(self):
        assert kept_pixels(mask_of(self.PIXELS)).tolist() == self.PIXELS

    def test_kept_twice_is_kept_once(self):
        once = masks.kept(mask_of(np.random.default_rng(0).integers(0, 255, (300, 200))))
        assert masks.kept(once) == once

    @pytest.mark.parametrize(
        "prefix", ["data:image/png;base64,", "data:image/jpeg;base64,", "DATA:image/x-png;base64,"]
    )
    def test_data_urls(self, prefix):
        assert kept_pixels(prefix + mask_of(self.PIXELS)).tolist() == self.PIXELS

    def test_lines_of_base64(self):
        text = mask_of(self.PIXELS)
        assert masks.kept("\n".join(text[i : i + 20] for i in range(0, len(text), 20))) == masks.kept(text)

    def test_jpeg_colour_and_one_bit(self):
        white = Image.new("RGB", (40, 20), "white")
        assert (kept_pixels(base64_of(white, "JPEG")) == 255).all()
        white.paste((0, 0, 0), (0, 0, 20, 20))
        assert kept_pixels(base64_of(white.convert("1")))[5].tolist() == [0] * 20 + [255] * 20
        assert kept_pixels(base64_of(white.convert("P")))[5].tolist() == [0] * 20 + [255] * 20

    def test_transparent_is_black(self):
        white = np.full((2, 4, 4), 255, np.uint8)
        white[:, :2, 3] = 0
        assert kept_pixels(mask_of(white, "RGBA")).tolist() == [[0, 0, 255, 255]] * 2
        assert kept_pixels(mask_of(white[..., [0, 3]], "LA")).tolist() == [[0, 0, 255, 255]] * 2

    def test_sixteen_bits_of_grey(self):
        deep = Image.fromarray(np.array([[0, 32896, 65535]], np.uint16))
        assert kept_pixels(base64_of(deep)).tolist() == [[0, 128, 255]]

    def test_a_phones_orientation_is_heeded(self):
        image = Image.new("L", (40, 20))
        image.paste(255, (0, 0, 20, 20))
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        assert kept_pixels(base64_of(image, "JPEG", exif=exif))[10, [5, 35]].tolist() == [0, 255]

    def test_large_pictures_become_small_with_the_same_meaning(self):
        pixels = np.zeros((600, 1000), np.uint8)
        pixels[:, 500:] = 255
        kept = kept_pixels(mask_of(pixels))
        assert max(kept.shape) == 128 and kept.shape[0] in (76, 77)
        assert (kept[:, :63] == 0).all() and (kept[:, 65:] == 255).all()
        assert len(masks.kept(mask_of(np.random.default_rng(0).integers(0, 255, (2000, 2000))))) < 30_000

    def test_nothing_but_the_picture_is_kept(self):
        noted = mask_of(self.PIXELS, dpi=(300, 300), icc_profile=b"x" * 500)
        assert masks.kept(noted) == masks.kept(mask_of(self.PIXELS))

    GIF = base64_of(Image.new("L", (4, 4), 255), "GIF")

    @pytest.mark.parametrize(
        "text, why",
        [
            ("", "no such picture"),
            ("!", "no base64"),
            ("\u00e4\u00f6", "got"),
            ("aGVsbG8=", "no such picture"),
            (GIF, "no such picture"),
            ("data:image/png;base64,", "no such picture"),
            ("data:text/html,<b>", "no base64"),
            ("https://example.org/mask.png", "no base64"),
            (mask_of([[0, 0]]), "black everywhere"),
            (mask_of(PIXELS)[:60], "got"),
        ],
    )
    def test_what_is_no_mask(self, text, why):
        with pytest.raises(SettingsError, match="loras.a.mask must be a PNG or JPEG in base64") as caught:
            Settings(loras={"a": {"mask": text}})
        assert why in str(caught.value) and len(str(caught.value)) < 300

    def test_a_picture_that_would_fill_the_memory(self):
        data = bytearray(base64.b64decode(mask_of([[255]])))
        data[16:24] = (50_000).to_bytes(4, "big") * 2
        data[29:33] = __import__("zlib").crc32(data[12:29]).to_bytes(4, "big")
        with pytest.raises(SettingsError, match="loras.a.mask"):
            Settings(loras={"a": {"mask": base64.b64encode(data).decode()}})

    @given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
    def test_a_mask_covers_the_image_whatever_their_sizes(self, h, w, height, width, seed):
        pixels = np.random.default_rng(seed).integers(0, 255, (h, w))
        pixels[0, 0] = 255
        place = Claim.of({"mask": masks.kept(mask_of(pixels))}).place(height, width)
        assert place.shape == (height, width) and 0 <= place.min() and place.max() <= 1
        if height % h == width % w == 0:
            grown = pixels.repeat(height // h, axis=0).repeat(width // w, axis=1) / 255
            np.testing.assert_allclose(place.numpy(), grown, atol=1e-6)
        if h % height == w % width == 0:
            means = pixels.reshape(height, h // height, width, w // width).mean(axis=(1, 3)) / 255
            np.testing.assert_allclose(place.numpy(), means, atol=1e-6)

    def test_a_mask_and_a_place_are_where_both_say(self):
        mask = masks.kept(mask_of([[255], [0]]))
        place = Claim.of({"mask": mask, "at": "left"}).place(10, 10)
        assert place[2, 2] == 1 and place[7, 2] == 0 and place[2, 8] == 0


class TestClaims:
    def test_nothing_said_is_the_methods_own(self):
        assert claims("a", "b:0.5") == Claims((Claim(), Claim()))
        assert claims() == Claims(())

    def test_a_tag_wins_over_the_option_part_by_part(self):
        found = claims("a:1:at=left", "b", loras={"a": {"at": "right", "share": 2}, "b": {"steps": "0-0.5"}})
        assert found.each == (Claim(at=PLACES["left"], share=2.0), Claim(steps=(0.0, 0.5)))

    def test_loras_of_a_pool_have_claims_too(self):
        robot = Tagged(lora("styles/robot"))
        assert claims(robot, loras={"robot": {"at": "top"}}).each == (Claim(at=PLACES["top"], keeps=True),)

    @pytest.mark.parametrize("name", ["oil", "styles/oil", "Oil painting"])
    def test_by_name_path_or_alias(self, name):
        oil = Tagged(lora("styles/oil", alias="Oil painting"), ("Oil painting", "1"))
        found = claims("a", oil, loras={name: {"share": 3}})
        assert found == Claims((Claim(), Claim(share=3.0, keeps=True)))

    def test_patterns_name_several(self):
        found = claims("robot_a", "robot_b", "cat", loras={"robot*": {"share": 3}})
        assert [claim.share for claim in found.each] == [3, 3, 1]

    def test_two_of_one_name_stay_two(self):
        top, below = tagged("a", "a"), tagged("sub/a", "sub/a")
        found = claims(top, below, loras={"a": {"share": 2}, "sub/a": {"share": 3}})
        assert [claim.share for claim in found.each] == [2, 3]

    def test_two_entries_for_one_lora_are_refused(self):
        message = refuses(tagged("oil", "styles/oil"), loras={"oil": {"share": 2}, "styles/oil": {"share": 3}})
        assert "loras.oil and loras.styles/oil are the same LoRA" in message

    def test_what_means_no_active_lora_is_told(self):
        options = {"loras": {"knigth": {"share": 2}, "a": {}}, "everywhere": ["lcm", "*slider*", "a"]}
        assert claims("a", **options).unused == ("loras.knigth", "everywhere: lcm", "everywhere: *slider*")

    def test_base_by_tag_option_or_everywhere(self):
        for tag, options in (
            ("lcm:1:base=1", {}),
            ("lcm", {"loras": {"lcm": {"base": True}}}),
            ("lcm", {"everywhere": ["lcm"]}),
            ("lcm", {"everywhere": ["l*"]}),
            (tagged("lcm", "speed/lcm"), {"everywhere": ["speed/*"]}),
            ("lcm:1:base=1", {"loras": {"lcm": {"base": False}}}),
        ):
            found = claims("a", tag, **options)
            assert [claim.base for claim in found.each] == [False, True] and found.unused == ()

    def test_what_a_tag_says_against_it_wins(self):
        assert not claims("lcm:1:base=0", everywhere=["*"]).each[0].base
        assert not claims("lcm", loras={"lcm": {"base": False}}, everywhere=["*"]).each[0].base
        assert claims("lcm:1:base=0:at=left", everywhere=["lcm"]).each == (Claim(at=PLACES["left"]),)

    @pytest.mark.parametrize("part", ["at=left", "share=2", "steps=0-0.5"])
    def test_in_every_pass_there_is_nothing_to_share(self, part):
        name = part.partition("=")[0]
        for tag, options in ((f"lcm:1:base=1:{part}", {}), (f"lcm:1:{part}", {"everywhere": ["lcm"]})):
            message = refuses(tag, **options)
            assert f"<lora:{tag}> says {name} of a LoRA that is in every pass" in message
        value = {"at": "left", "share": 2, "steps": "0-0.5"}[name]
        assert f"loras.lcm says {name}" in refuses("lcm", loras={"lcm": {"base": True, name: value}})

    def test_every_part_reaches_the_claim(self):
        mask = masks.kept(mask_of([[255]]))
        parts = {"at": "left", "share": 2.0, "steps": "0-0.5", "mask": mask, "words": "zorg robot,zr"}
        expected = Claim((0.0, 0.0, 0.5, 1.0), 2.0, (0.0, 0.5), mask, ("zorg robot", "zr"))
        assert claims("a", loras={"a": parts}).each == (expected,)
        assert set(parts) | {"base"} == set(PARTS)


class TestStyles:
    OIL = "oil:1:words=oil style"

    @staticmethod
    def everywhere(found):
        return [claim.base for claim in found.each]

    def test_a_style_beside_others_is_in_every_pass_and_is_named(self):
        found = claims("zorg:1", self.OIL, "comet:1")
        assert self.everywhere(found) == [False, True, False] and found.styles == ("oil",)
        assert found.each[1] == Claim(words=("oil style",), base=True)
        assert in_words(found) == [
            "oil is a style, and so in every pass (base=0 in its tag, or styles, says otherwise)"
        ]

    def test_by_its_name_and_by_the_words_of_its_file(self):
        by_name, by_file = tagged("ink_style_v2:1"), Tagged(lora("neon"), ("neon", "1"), words=("neon style",))
        by_folder = tagged("ink:1", path="styles/ink")
        assert self.everywhere(claims("zorg:1", by_name, by_file, by_folder)) == [False, True, True, True]
        otherwise = Tagged(lora("neon"), ("neon", "1", "words=neon robot"), words=("neon style",))
        assert self.everywhere(claims("zorg:1", otherwise)) == [False, False]
        by_option = claims("zorg:1", "neon:1", loras={"neon": {"words": "neon style"}})
        assert by_option.styles == ("neon",)

    def test_where_nobody_else_competes_styles_do(self):
        assert self.everywhere(claims(self.OIL)) == [False]
        assert self.everywhere(claims(self.OIL, "ink_style:1")) == [False, False]
        beside_one_in_every_pass = claims(self.OIL, "lcm:1:base=1")
        assert self.everywhere(beside_one_in_every_pass) == [False, True] and beside_one_in_every_pass.styles == ()

    @pytest.mark.parametrize("part", ["at=left", "share=2", "steps=0-0.5", "base=0"])
    def test_what_is_said_of_it_goes_before(self, part):
        found = claims("zorg:1", f"{self.OIL}:{part}")
        assert self.everywhere(found) == [False, False] and found.styles == ()
        name, value = part.split("=")
        value = {"share": 2, "base": False}.get(name, value)
        assert self.everywhere(claims("zorg:1", self.OIL, loras={"oil": {name: value}})) == [False, False]

    @pytest.mark.parametrize(
        "options",
        [
            {"styles": "compete"},
            {"unnamed": "drop"},
            {"preset": "paper"},
            {"method": "switch"},
            {"method": "composite"},
        ],
        ids=str,
    )
    def test_options_and_methods_that_know_no_such_thing(self, options):
        settings = Settings.from_mapping(options)
        assert self.everywhere(claims_of(settings, [tagged("zorg:1"), tagged(self.OIL)])) == [False, False]

    def test_a_pools_styles_are_chosen_as_the_rest_of_it(self):
        oil = Tagged(lora("oil"), words=("oil style",), pooled=True)
        assert self.everywhere(claims("zorg:1", oil)) == [False, False]
        assert self.everywhere(claims("zorg:1", oil, everywhere=["oil"])) == [False, True]


def rest_left_by(each, image_of_row=(0,), progress=0.0):
    """Of each row, whether those who take part in a step leave the rest to those in every pass."""
    acting = [claim for claim in each if not claim.base and claim.acts_at(progress)]
    rest = places_and_shares(acting, torch.zeros(len(image_of_row), 4, 8, 8), image_of_row)["rest"]
    return [False] * len(image_of_row) if rest is None else rest.tolist()


class TestBackgrounds:
    TOWN = "town:1:words=skyline town"
    OIL = TestStyles.OIL
    TOWN_BY_HAND = Tagged(lora("town"), ("town", "1", "base=1"), words=("skyline town",))
    OIL_BY_HAND = Tagged(lora("oil"), ("oil", "1", "base=1"), words=("oil style",))

    @staticmethod
    def told(*given, **options):
        """Who is in every pass, and whether the others leave the rest to those."""
        found = claims(*given, **options).each
        return [claim.base for claim in found], rest_left_by(found) == [True]

    def test_the_one_there_is_is_in_every_pass_and_is_named(self):
        found = claims("zorg:1", self.TOWN, "comet:1")
        assert [claim.base for claim in found.each] == [False, True, False]
        assert found.backgrounds == ("town",) and found.styles == ()
        assert in_words(found) == [
            "town is the background, and so in every pass (base=0 in its tag, or styles, says otherwise)"
        ]

    def test_beside_a_style_it_competes_and_nothing_is_left_to_the_style(self):
        assert self.told("zorg:1", self.TOWN, self.OIL) == ([False, False, True], False)
        assert self.told("zorg:1", self.TOWN, self.OIL_BY_HAND) == ([False, False, True], False)

    def test_of_two_both_compete(self):
        beach = tagged("beach:1", path="backgrounds/beach")
        assert self.told("zorg:1", self.TOWN, beach) == ([False] * 3, False)
        assert self.told("zorg:1", self.TOWN_BY_HAND, beach) == ([False, True, False], False)

    def test_to_a_style_alone_the_rest_is_left(self):
        assert self.told("zorg:1", self.OIL) == ([False, True], True)
        assert self.told("zorg:1", self.OIL_BY_HAND) == ([False, True], True)
        assert self.told("zorg:1", tagged("oil_style:1"), everywhere=["oil_style"]) == ([False, True], True)

    def test_to_others_in_every_pass_nothing_is(self):
        assert self.told("zorg:1", "lcm:1:base=1") == ([False, True], False)

    @pytest.mark.parametrize("part", ["at=left", "share=2", "steps=0-0.5", "base=0"])
    def test_what_is_said_of_it_goes_before(self, part):
        assert self.told("zorg:1", f"{self.TOWN}:{part}") == ([False, False], False)

    def test_where_nobody_else_competes_it_does(self):
        assert self.told(self.TOWN) == ([False], False)
        assert self.told(self.TOWN, "lcm:1:base=1") == ([False, True], False)

    @pytest.mark.parametrize(
        "options, of_style",
        [({"styles": "everywhere"}, True), ({"styles": "compete"}, False), ({"unnamed": "drop"}, False),
         ({"preset": "paper"}, False), ({"method": "composite"}, False)],
        ids=str,
    )  # fmt: skip
    def test_options_and_methods_that_know_no_such_thing(self, options, of_style):
        settings = Settings.from_mapping(options)
        for other, base in ((self.TOWN, False), (self.OIL, of_style)):
            found = claims_of(settings, [tagged("zorg:1"), tagged(other)]).each
            assert [claim.base for claim in found] == [False, base]
            assert not any(claim.yields for claim in found)
            asked = settings.rest and settings.method == "loratorio"
            assert [claim.keeps for claim in found] == [False, asked and not base]

    @pytest.mark.parametrize("other, keeps", [(TOWN, True), (OIL, True), ("knight:1", False)], ids=str)
    def test_what_is_known_to_be_a_style_or_a_background_keeps_the_rest_where_it_competes(self, other, keeps):
        def kept(**options):
            found = claims("zorg:1", tagged(other), styles="compete", **options).each
            return places_and_shares(found, torch.zeros(2, 4, 8, 8), (0, 1))["kept"]

        assert (kept().tolist() == [[False, False], [True, True]]) if keeps else kept() is None
        assert kept(rest=False) is None

    def test_it_does_in_the_images_in_which_it_takes_part(self):
        town = Tagged(lora("town"), words=("skyline town",), pooled=True)
        found = claims("zorg:1", "knight:1", town).each
        heeded = heeding(found, [False, False, True], ["zorg", "zorg, skyline town"], "drop_pooled")
        kept = places_and_shares(heeded, torch.zeros(2, 4, 8, 8), (0, 1, 1))["kept"]
        assert kept.tolist() == [[False] * 3, [False] * 3, [False, True, True]]

    def test_one_of_a_pool_competes(self):
        town = Tagged(lora("town"), words=("skyline town",), pooled=True)
        assert self.told("zorg:1", town) == ([False, False], False)
        assert self.told("zorg:1", town, self.OIL) == ([False, False, True], False)

    def test_who_takes_no_part_keeps_nothing(self):
        """A background of a pool that the prompt does not name, or whose steps are over, holds up nobody."""
        town = Tagged(lora("town"), words=("skyline town",), pooled=True)
        found = claims("zorg:1", town, self.OIL).each
        prompts = ["zorg, oil style", "zorg, skyline town, oil style", "oil style"]
        assert rest_left_by(found) == [False]
        assert rest_left_by(heeding(found, [False, True, False], prompts[:1], "drop_pooled")) == [True]
        heeded = heeding(found, [False, True, False], prompts, "drop_pooled")
        assert rest_left_by(heeded, image_of_row=(0, 1, 1, 2)) == [True, False, False, True]
        timed = claims("zorg:1", f"{self.TOWN}:steps=0-0.5", self.OIL).each
        assert rest_left_by(timed, progress=0.2) == [False] and rest_left_by(timed, progress=0.7) == [True]

    def test_the_method_is_told(self):
        claimed = places_and_shares(claims("zorg:1", self.TOWN).each[:1], torch.zeros(1, 4, 8, 8), (0,))
        assert claimed["rest"].tolist() == [True] and claimed["place"] is claimed["share"] is None
        for nobody in ([], claims("zorg:1").each):
            found = places_and_shares(nobody, torch.zeros(1, 4, 8, 8), (0,))
            assert found["rest"] is found["kept"] is None


@pytest.mark.parametrize(
    "name, words",
    [
        ("backgrounds/a", ()), ("forest_background_v2", ()), ("a", ("bamboo forest",)),
        ("a", ("skyline town", "old city")), ("Landscape-XL", ("zorg",)), ("a", ("Auroral Background",)),
        ("a", ("grassy hills", "wide fields")), ("a", ("sunken reef",)),
    ],
)  # fmt: skip
def test_backgrounds(name, words):
    assert is_background(name, words)


@pytest.mark.parametrize(
    "name, words",
    [
        ("a", ()), ("forest", ()), ("a", ("forest elf",)), ("a", ("town", "zorg robot")),
        ("backgroundless", ()), ("", ("",)),
        ("a", ("robot in a town with a hat",)), ("hallway", ()), ("a", ("office lady",)), ("a", ("field marshal",)),
    ],
)  # fmt: skip
def test_no_backgrounds(name, words):
    assert not is_background(name, words)


@pytest.mark.parametrize(
    "name, words",
    [
        ("styles/oil", ()), ("Art-Style/ink", ("ink",)), ("a", ("neon style",)), ("ghibli_style_offset", ()),
        ("a", ("in the style of monet", "monet style")),
        ("GhibliStyle-v2", ("1girl", "solo")), ("art styles", ()), ("a", ("Styles of the 1920s",)), ("style", ()),
    ],
)  # fmt: skip
def test_styles(name, words):
    assert is_style(name, words)


@pytest.mark.parametrize(
    "name, words",
    [
        ("a", ()), ("hairstyles/bob", ()), ("fashion/styles/a", ()), ("a", ("neon",)), ("hair_style_12", ()),
        ("a", ("zorg robot", "anime style")), ("lifestyle", ()),
        ("hairstyles", ()), ("stylegan", ()), ("styled", ()), ("a", ("a robot with a strange hair style",)),
        ("fashion-style", ()), ("", ("",)),
    ],
)  # fmt: skip
def test_no_styles(name, words):
    assert not is_style(name, words)


class TestWords:
    def test_a_tag_goes_before_the_option_before_the_file(self):
        file = Tagged(lora("zorg"), ("zorg", "1"), words=("robot",))
        assert claims(file).each[0].words == ("robot",)
        assert claims(file, loras={"zorg": {"words": "zr, zorg"}}).each[0].words == ("zr", "zorg")
        in_tag = Tagged(lora("zorg"), ("zorg", "1", "words=zorg robot"), words=("robot",))
        assert claims(in_tag, loras={"zorg": {"words": "zr"}}).each[0].words == ("zorg robot",)
        none = Tagged(lora("zorg"), ("zorg", "1", "words="), words=("robot",))
        assert claims(none).each[0].words == ()

    @pytest.mark.parametrize(
        "unnamed, of_the_prompt, of_a_pool",
        [("keep", True, True), ("auto", True, True), ("drop_pooled", True, False), ("drop", False, False)],
    )
    def test_who_may_be_left_out(self, unnamed, of_the_prompt, of_a_pool):
        claim = Claim(words=("zorg robot",))
        for pooled, stays in ((False, of_the_prompt), (True, of_a_pool)):
            (heeded,) = heeding([claim], [pooled], ["a red ball"], unnamed)
            assert heeded.acts_at(0.5) == stays
            assert (left_out(["zorg"], [heeded]) == []) == stays
            assert heeding([claim], [pooled], ["a zorg robot"], unnamed) == [claim]
            assert heeding([Claim()], [pooled], ["a red ball"], unnamed) == [Claim()], "nobody knows its words"
            in_every_pass = Claim(words=("zorg robot",), base=True)
            assert heeding([in_every_pass], [pooled], ["a red ball"], unnamed) == [in_every_pass]

    def test_by_itself_the_prompt_chooses_from_a_pool_where_it_names_one_of_it(self):
        of_prompt, zorg, comet, unknown = (Claim(words=words) for words in (("neon",), ("zorg",), ("comet",), ()))
        prompts = ["a zorg robot", "a red ball", "a comet, a zorg", "neon"]
        heeded = heeding([of_prompt, zorg, comet, unknown], [False, True, True, True], prompts, "auto")
        assert [claim.images for claim in heeded] == [None, None, (False, True, True, True), None]
        tagged = heeding([zorg, comet], [False, True], ["a zorg"], "auto")
        assert tagged == [zorg, comet], "who has a tag is none of the pool"

    def test_of_many_who_are_left_out_is_said_at_once(self):
        claims = heeding([Claim(words=(name,)) for name in "abcde"], [True] * 5, ["x", "y"], "drop")
        assert left_out(list("abcde"), claims) == [
            "a, b, c and 2 more take no part: the prompt has none of their trigger words"
        ]
        assert len(left_out(list("abc"), claims[:3])) == 3
        some = heeding([Claim(words=(name,)) for name in "abcde"], [True] * 5, ["x", "a b c d e"], "drop")
        assert left_out(list("abcde"), some) == [
            "a, b, c and 2 more take no part in image 1: the prompt has none of their trigger words"
        ]

    def test_of_a_batch_those_images_that_name_it(self):
        prompts = ["a zorg robot", "a red ball", "a robot, zorg"]
        (some,) = heeding([Claim(words=("zorg robot",))], [False], prompts, "drop")
        assert some.images == (True, False, True) and some.acts_at(0) and some.placed
        assert left_out(["zorg"], [some]) == [
            "zorg takes no part in image 2: the prompt has none of its trigger words (zorg robot)"
        ]
        place = place_of([some, Claim(at=PLACES["left"])], 2, 40, image_of_row=(0, 1, 1, 2))
        assert place.shape == (2, 4, 2, 40)
        assert place[0].amax(dim=(1, 2)).tolist() == place[0].amin(dim=(1, 2)).tolist() == [1, 0, 0, 1]
        assert torch.equal(place[1], place_of([Claim(at=PLACES["left"])], 2, 40).expand(4, 2, 40))

    def test_without_a_difference_between_images_places_are_those_of_all(self):
        (nobody,) = heeding([Claim(words=("zorg",))], [False], ["a", "b"], "drop")
        assert not nobody.placed and not nobody.acts_at(0.5)
        assert place_of([Claim(), Claim()], 3, 4, image_of_row=(0, 1)) is None

    def test_what_methods_do_not_know(self):
        (some,) = heeding([Claim(words=("zorg",))], [False], ["zorg", "b"], "drop")
        assert not_heeded("merge", [Claim(words=("zorg",))]) is None, "words alone ask for nothing"
        assert not_heeded("switch", [some]) and not not_heeded("composite", [some])


def test_errors_know_what_is_to_blame():
    with pytest.raises(SettingsError) as caught:
        claims("a:1:at=lft")
    error = caught.value
    assert (error.field, error.value) == ("at in <lora:a:1:at=lft>", "lft") and error.allowed in str(error)
    with pytest.raises(SettingsError) as caught:
        Settings(loras={"a": {"share": 0}})
    assert (caught.value.field, caught.value.value) == ("loras.a.share", 0)
