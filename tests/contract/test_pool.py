"""LoRAs of a pool, and a selection among them, on every host: images against brute force, and what is said of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from loratorio_ext.record import read_shares, written_shares
from loratorio_ext.settings import Settings
from tests.contract.rows import HIRES, THREE, TWO, largest, mean
from tests.live.webui import RequestError, encode_image

PLAIN = "a cat on a hill"
FIVE = ["lora", "locon:0.8", "unet_only:0.9", "rank_1", "down_blocks:0.7"]

OPTIONS = {
    "beside the prompt's": {"pool": ["unet_only:0.9", "rank_1:0.7"]},
    "in both": {"pool": ["lora:0.3", "rank_1"]},
    "by pattern": {"pool": ["rank_*:0.8"]},
    "at a weight for all": {"pool": ["unet_only", "rank_1"], "pool_weight": 0.6},
    "text and UNet apart": {"pool": ["unet_only:0:1", "text_only:1:0"]},
    "of other kinds": {"pool": ["dora:0.8", "loha:0.7", "full:0.5"]},
    "top 1 of the image": {"pool": FIVE, "top_k": 1},
    "top 2 of each patch": {"pool": FIVE, "top_k": 2, "selection_scope": "patch"},
    "top 2, the paper's form": {"pool": FIVE, "top_k": 2, "preset": "paper"},
    "top 2 in every third step": {"pool": FIVE, "top_k": 2, "reselect_every": 3},
    "top 2 of each patch in every third step": {
        "pool": FIVE, "top_k": 2, "selection_scope": "patch", "reselect_every": 3
    },
    "in every third step, base share 1": {"pool": FIVE, "top_k": 2, "reselect_every": 3, "base_share": 1.0},
    "one refreshed a step": {"pool": FIVE, "top_k": 2, "refresh": 2},
    "late steps only": {"pool": FIVE, "top_k": 2, "reselect_every": 2, "start": 0.5},
    "composite": {"pool": ["unet_only", "rank_1"], "method": "composite"},
    "switch": {"pool": ["unet_only", "rank_1"], "method": "switch", "switch_every": 2},
}  # fmt: skip

SAVED = {"samples_save": True}
CHOSEN = {"pool": FIVE, "top_k": 2, "reselect_every": 3}
REQUESTS = {
    "no LoRA in the prompt": {"prompt": PLAIN},
    "batch of 2": {"prompt": TWO, "batch_size": 2},
    "2 batches of 2": {"prompt": PLAIN, "n_iter": 2, "batch_size": 2},
    "AND": {"prompt": f"{TWO} AND a dog in the rain :0.6", "batch_size": 2},
    "NGMS": {"prompt": TWO, "s_min_uncond": 4.0},
    "DDIM": {"prompt": PLAIN, "sampler_name": "DDIM"},
    "Heun": {"prompt": PLAIN, "sampler_name": "Heun"},
    "prompt editing": {"prompt": "a [cat:dog:0.5] on a [hill|boat]"},
    "long prompt": {"prompt": "a cat on a hill, " * 20},
    "hires": {"prompt": PLAIN, **HIRES},
    "hires with LoRAs of its own": {"prompt": TWO, "hr_prompt": "a red boat <lora:cross_attention:1>", **HIRES},
}


def equal(first, second) -> bool:
    return all(map(np.array_equal, first.images, second.images))


@pytest.fixture(scope="module")
def strange_loras(webui):
    """Files in a folder below the LoRA folder that no model at hand can use, and one that it can."""
    folder = webui.data / "models" / "Lora" / "strange"
    folder.mkdir()
    lora = load_file(folder.parent / "lora.safetensors")
    wide = {
        key: torch.zeros(len(value), value.shape[1] + 8) if "lora_unet" in key and "lora_down" in key else value
        for key, value in lora.items()
    }
    save_file(wide, folder / "other_shapes.safetensors")
    save_file({f"lora_unet_nowhere_{key}": value for key, value in lora.items()}, folder / "other_names.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no header here")
    tags = json.dumps({"10_robots": {"a robot": 12, "metal": 3}})
    save_file(lora, folder / "good, odd; name.safetensors", metadata={"ss_tag_frequency": tags})
    yield
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    contract_listing(webui)


def contract_listing(webui) -> None:
    """Let the host look through its folders again."""
    if hasattr(webui, "post"):
        webui.post("/sdapi/v1/refresh-loras")
    else:
        webui.module("networks").list_available_networks()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_pool_options(contract, options):
    contract.assert_composes(options, prompt=TWO, negative_prompt="fog")


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_pool_requests(contract, request_):
    contract.assert_composes(CHOSEN, **request_)


def test_a_pool_alone_is_the_same_as_the_prompts_loras(contract):
    by_pool = contract.composed({"pool": ["lora", "locon:0.8"]}, prompt=PLAIN)
    by_prompt = contract.composed(prompt=f"{PLAIN} <lora:lora:1> <lora:locon:0.8>")
    assert largest(by_pool.images, by_prompt.images) <= 1


def test_the_pool_comes_with_an_image_and_a_mask(contract):
    picture = contract.webui.txt2img(prompt="a red boat", seed=7).images[0]
    contract.assert_composes(CHOSEN, image=picture, prompt=PLAIN, denoising_strength=0.6, steps=12)


@pytest.mark.parametrize("k", [5, 64])
def test_keeping_the_whole_pool_is_no_selection(contract, k):
    whole = contract.composed({"pool": FIVE}, prompt=PLAIN)
    assert equal(whole, contract.composed({"pool": FIVE, "top_k": k, "reselect_every": 3}, prompt=PLAIN))


def test_the_host_comes_back_from_a_pool_as_it_was(contract):
    before = contract.plain(prompt=PLAIN), contract.plain(prompt=TWO)
    for options in (CHOSEN, {"pool": ["*_blocks", "text_only", "dora"], "start": 0.5}):
        for prompt in (PLAIN, TWO):
            contract.composed(options, prompt=prompt)
            assert equal(before[0], contract.plain(prompt=PLAIN))
            assert equal(before[1], contract.plain(prompt=TWO))


@pytest.mark.parametrize(
    "entry, said",
    [
        ("unet_onli", "did you mean unet_only?"),
        ("rank*1000", "no LoRA matches"),
        ("../../config", "there is no LoRA"),
        ("/etc/passwd", "there is no LoRA"),
        ("lora.safetensors", "there is no LoRA"),
    ],
)
def test_what_the_host_does_not_list_is_refused_by_name(contract, entry, said):
    before = contract.plain(prompt=TWO)
    with pytest.raises(RequestError) as caught:
        contract.composed({"pool": ["lora", entry]}, prompt=TWO)
    assert caught.value.status == 422
    assert entry in caught.value.body and said in caught.value.body
    assert equal(before, contract.plain(prompt=TWO))


@pytest.mark.parametrize("pool", ["lora", [1], [""], None, {"lora": 1}], ids=repr)
def test_what_is_no_pool_is_refused(contract, pool):
    with pytest.raises(RequestError) as caught:
        contract.composed({"pool": pool}, prompt=TWO)
    assert caught.value.status == 422
    assert "pool must be a list of text" in caught.value.body


def test_what_does_not_fit_is_left_out_by_name(contract, strange_loras):
    before = contract.plain(prompt=TWO)
    composed = contract.composed({"pool": ["strange/*", "unet_only"]}, prompt=TWO)
    good = contract.composed({"pool": ["good, odd; name", "unet_only"]}, prompt=TWO)
    assert largest(composed.images, good.images) <= 1
    assert "other_shapes is left out of the pool: made for another model" in composed.infotext
    assert "other_names is left out of the pool: made for another model" in composed.infotext
    assert "broken is left out of the pool: its file cannot be read" in composed.infotext
    assert "left out" not in good.infotext
    assert equal(before, contract.plain(prompt=TWO))
    restored = contract.composed({"pool": ["strange/good, odd; name:1"]}, prompt=PLAIN)
    assert largest(restored.images, contract.composed({"pool": ["lora"]}, prompt=PLAIN).images) <= 1


def test_a_pool_of_which_nothing_fits_gives_the_hosts_image(contract, strange_loras):
    composed = contract.composed({"pool": ["strange/o*"]}, prompt=PLAIN)
    assert equal(composed, contract.plain(prompt=PLAIN))
    assert "no LoRA is active" in composed.infotext


def parameters(infotext: str) -> dict[str, str]:
    from tests.contract.double.host.modules import infotext_utils

    return infotext_utils.parse_generation_parameters(infotext)


def test_what_was_picked_is_said(contract, strange_loras):
    """In each image's infotext, and step by step in the answer."""
    pool = [*FIVE, "good, odd; name:0.5"]
    composed = contract.composed({"pool": pool, "top_k": 2}, prompt=PLAIN, batch_size=2, n_iter=2)
    data = composed.info["extra_generation_params"]["LoRAtorio steps"]
    assert data["loras"] == [*(entry.partition(":")[0] for entry in FIVE), "good, odd; name"]
    shares = np.array(data["shares"])
    assert shares.shape == (4, 8, 6)
    np.testing.assert_allclose(shares.sum(axis=2), 1, atol=1e-3)
    assert ((shares > 0).sum(axis=2) <= 2).all(), "two LoRAs an image and step"
    for number, infotext in enumerate(composed.info["infotexts"][-4:]):
        read = parameters(infotext)
        picked = read_shares(read["LoRAtorio picked"])
        expected = dict(zip(data["loras"], shares[number].mean(axis=0)))
        assert picked.keys() == {name for name, share in expected.items() if share >= 0.0006}
        assert all(abs(picked[name] - expected[name]) < 2e-3 for name in picked)
        assert written_shares(picked) == read["LoRAtorio picked"]
        assert "LoRAtorio steps" not in read
        assert Settings.from_infotext(read).pool == tuple(pool)


def test_nothing_is_said_where_nothing_is_picked(contract):
    composed = contract.composed(prompt=THREE)
    assert "LoRAtorio picked" not in composed.infotext
    assert "LoRAtorio steps" not in composed.info["extra_generation_params"]


def test_who_painted_what_as_pictures_and_data(contract):
    """Three pictures an image, behind the images, and each with its own image's infotext."""
    without = contract.composed(CHOSEN, prompt=PLAIN, batch_size=2, n_iter=2)
    shown = contract.composed(CHOSEN | {"show_maps": True}, prompt=PLAIN, batch_size=2, n_iter=2)
    assert len(shown.images) == len(without.images) + 12
    assert all(np.array_equal(*pair) for pair in zip(without.images, shown.images))
    assert len({picture.tobytes() for picture in shown.images[-12:]}) == 12
    infotexts = shown.info["infotexts"]
    assert len(infotexts) == len(shown.images)
    assert infotexts[-12:] == [text for text in infotexts[-16:-12] for _ in range(3)]
    data = shown.info["extra_generation_params"]["LoRAtorio steps"]
    maps = np.array(data["maps"])
    assert maps.shape[:2] == (4, len(data["loras"]))
    np.testing.assert_allclose(maps.sum(axis=1), 1, atol=5e-3)
    np.testing.assert_allclose(maps.mean(axis=(2, 3)), np.mean(data["shares"], axis=1), atol=5e-3)
    assert np.max(data["base"]) < 2e-3 and np.shape(data["base"]) == (4, 8)


def test_only_the_masked_part_was_painted(contract):
    """Where only the masked part is sampled, at another size, the weights lie on that part of the whole image."""
    image = contract.webui.txt2img(prompt="a red boat", seed=7, width=320, height=320).images[0]
    mask = np.zeros_like(image)
    mask[200:280, 40:120] = 255
    masked = {"mask": encode_image(mask), "inpaint_full_res": True, "inpaint_full_res_padding": 8, "mask_blur": 2}
    request = {"image": image, "prompt": TWO, "denoising_strength": 0.8, "width": 64, "height": 64, **masked}
    shown = contract.composed({"show_maps": True}, **request)
    painted = shown.images[-3].astype(int)
    assert painted.shape == image.shape
    grey = np.abs(painted - painted.mean(axis=2, keepdims=True)).max(axis=2) < 2
    assert grey[:180].all() and grey[:, 160:180].all(), "far from the mask: no colour"
    assert not grey[220:240, 70:90].any(), "under the mask"


def test_pictures_are_saved_beside_the_image_and_only_with_it(contract):
    def files():
        found = {path: path.stat().st_mtime_ns for path in contract.webui.data.rglob("*.png")}
        return set(found.items())

    before = files()
    contract.composed(CHOSEN | {"show_maps": True}, prompt=PLAIN)
    assert files() == before, "a request that saves nothing"
    shown = contract.composed(CHOSEN | {"show_maps": True}, prompt=PLAIN, save_images=True, host_options=SAVED)
    new = sorted(path for path, _ in files() - before)
    image = min(new, key=lambda path: len(path.name))
    kinds = ["painted", "maps", "shares"]
    assert sorted(new) == sorted([image, *(image.with_name(f"{image.stem}-loratorio-{kind}.png") for kind in kinds)])
    with Image.open(image.with_name(f"{image.stem}-loratorio-painted.png")) as picture:
        assert picture.info["parameters"] == shown.infotext
        assert np.array_equal(np.asarray(picture), shown.images[-3])


def test_a_pool_comes_back_from_an_infotext(contract):
    options = {"pool": ["unet_only:0.9", "rank_*", "lo?on"], "pool_weight": 0.7, "top_k": 2, "reselect_every": 2}
    composed = contract.composed(options, prompt=PLAIN)
    assert Settings.from_infotext(parameters(composed.infotext)) == Settings(enabled=True, **options)
    try:
        restored = contract.generate({"infotext": composed.infotext, "prompt": PLAIN})
    except RequestError as error:
        if contract.host in ("double", "a1111"):
            raise
        pytest.skip(f"this host's API cannot read even a plain image's infotext: {error}")
    assert equal(composed, restored)
    assert restored.infotext == composed.infotext


def test_off_is_off_with_a_pool(contract):
    off = contract.composed({"enabled": False, "pool": FIVE}, prompt=TWO)
    assert equal(off, contract.plain(prompt=TWO))
    assert "LoRAtorio" not in off.infotext


def test_an_error_in_the_middle_of_a_pool_leaves_nothing_behind(contract):
    before = contract.plain(prompt=TWO), contract.plain(prompt=PLAIN), contract.composed(CHOSEN, prompt=PLAIN)
    composition = {"LoRAtorio": {"args": [{"enabled": True, **CHOSEN}]}}
    sabotage = {"LoRAtorio sabotage": {"args": [{"error": "runtime", "step": 3}]}}
    with pytest.raises(RequestError, match="sabotaged"):
        contract.generate({"prompt": PLAIN}, composition | sabotage)
    assert equal(before[0], contract.plain(prompt=TWO))
    assert equal(before[1], contract.plain(prompt=PLAIN))
    assert mean(before[2].images, contract.composed(CHOSEN, prompt=PLAIN).images) == 0
