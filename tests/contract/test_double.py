"""The double itself: a host that composes as its reference script does, and that is left as it was found."""

import json
import logging
import sys
from shutil import copyfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.contract.double import Double, RequestError
from tests.contract.rows import Contract
from tests.gauge import Gauge
from tests.live.lora_files import CATALOGUE
from tests.live.webui import encode_image

PROMPT = "a cat on a hill"
TWO = f"{PROMPT} <lora:locon:0.8> <lora:down_blocks:1:0.7>"
LONG = "word " * 80


@pytest.fixture(scope="module")
def webui(tmp_path_factory):
    with Double(tmp_path_factory.mktemp("double")) as double:
        yield double


@pytest.fixture(scope="module")
def plain(webui):
    """The image without a LoRA, before anything else has happened."""
    return webui.txt2img(prompt=PROMPT)


@pytest.fixture(autouse=True)
def untouched(webui, plain):
    """After every test the plain image is the same still, and nothing is left registered."""
    yield
    assert difference(plain, webui.txt2img(prompt=PROMPT)) == 0
    callbacks = webui.module("modules.script_callbacks").callback_map
    registered = [each.callback for callbacks_of_a_kind in callbacks.values() for each in callbacks_of_a_kind]
    assert [each for each in registered if "loratorio_ext" in each.__module__] == []


def difference(first, second) -> int:
    return max(np.abs(a.astype(int) - b.astype(int)).max() for a, b in zip(first.images, second.images, strict=True))


SAID = {
    "NGMS: 4.0": {"s_min_uncond": 4.0},
    "NGMS all steps: True": {"s_min_uncond": 4.0, "host_options": {"s_min_uncond_all": True}},
    "Skip Early CFG: 0.4": {"host_options": {"skip_early_cond": 0.4}},
    "Pad conds: True": {"host_options": {"pad_cond_uncond": True}},
    "Pad conds v0: True": {"host_options": {"pad_cond_uncond_v0": True}},
}
"""What the infotext says where an option has taken effect."""


@pytest.mark.parametrize("word", SAID)
def test_an_option_takes_effect_and_says_so(webui, word):
    contract = Contract(webui, "double")
    before = contract.plain(prompt=LONG + TWO)
    after = contract.plain(prompt=LONG + TWO, **SAID[word])
    assert word in after.infotext
    assert word not in before.infotext
    assert difference(before, after) > 2


@pytest.mark.parametrize("payload", [{}, {"sampler_name": "DDIM"}, {"batch_size": 2}], ids=str)
@pytest.mark.parametrize("masked", [None, "whole picture", "only masked"])
def test_extension_composes_from_an_image(webui, payload, masked):
    image = webui.txt2img(prompt="a red boat").images[0]
    if masked:
        mask = np.zeros_like(image)
        mask[16:48, 24:] = 255
        payload = payload | {"mask": encode_image(mask), "mask_blur": 2, "inpainting_fill": 1}
        payload["inpaint_full_res"] = masked == "only masked"
    contract = Contract(webui, "double")
    unlike = 0.5 if masked else 1.0  # in the mean over the picture, of which the mask leaves a third to change
    ours = contract.assert_composes(unlike_merged=unlike, image=image, prompt=TWO, denoising_strength=0.8, **payload)
    changed = np.abs(ours.images[0].astype(int) - image)
    assert changed.mean() > 5
    if masked:
        assert changed[:8].max() <= 1


@pytest.mark.parametrize("recipe", CATALOGUE, ids=lambda recipe: recipe.name)
def test_every_kind_of_lora_changes_the_image(webui, plain, recipe):
    before = len(webui.log())
    merged = webui.txt2img(prompt=f"{PROMPT} <lora:{recipe.name}:1>")
    assert difference(plain, merged) > 10
    assert f'Lora hashes: "{recipe.name}:' in merged.infotext
    assert "Networks with errors" not in webui.log()[before:]


HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_second_pass_steps": 4}


@pytest.mark.parametrize("family", ["sd2v", "sdxl"])
def test_other_models(tmp_path, family):
    with Double(tmp_path, family=family) as webui:
        contract = Contract(webui, "double")
        for row in ({}, {"sampler_name": "DDIM"}, {"batch_size": 2, "prompt": f"{TWO} AND a dog :0.6"}, HIRES):
            contract.assert_composes(**{"prompt": TWO} | row)
        for options in ({}, {"pad_cond_uncond": True}, {"pad_cond_uncond_v0": True}):
            contract.assert_composes(prompt=LONG + TWO, host_options=options)


@pytest.mark.parametrize("asked, seen", [(None, True), ("ERROR", False)])
def test_warnings_are_seen_unless_the_user_asked_for_errors_only(tmp_path, monkeypatch, asked, seen):
    """On a host that by itself logs errors only, too, as Forge Neo does."""
    monkeypatch.delenv("SD_WEBUI_LOG_LEVEL", raising=False)
    if asked:
        monkeypatch.setenv("SD_WEBUI_LOG_LEVEL", asked)
    scripts = {
        "LoRAtorio": {"args": [{"enabled": True}]},
        "LoRAtorio sabotage": {"args": [{"error": "memory", "rows": 2}]},
    }
    with Double(tmp_path, level=logging.ERROR) as webui:
        webui.txt2img(prompt=TWO, alwayson_scripts=scripts)
        assert ("Out of memory with 6 rows in a batch: going on with 3" in webui.log()) == seen
    assert logging.getLogger("loratorio").level == logging.NOTSET


def test_a_listed_lora_is_in_the_weights(webui):
    networks, shared = webui.module("networks"), webui.module("modules.shared")
    layer = shared.sd_model.network_layer_mapping["diffusion_model_out_2"]
    own = layer.weight.clone()
    networks.load_networks(["locon"], [1.0], [0.5], [None])
    module = networks.loaded_networks[0].modules["diffusion_model_out_2"]
    down, up = module.down_model.weight, module.up_model.weight
    expected = own + 0.25 * (up.flatten(1) @ down.flatten(1)).reshape(own.shape)  # 0.5, and alpha / rank = 1/2
    networks.network_apply_weights(layer)
    assert np.allclose(layer.weight, expected, atol=1e-6)
    assert not np.allclose(layer.weight, own, atol=1e-3)
    networks.load_networks([])
    networks.network_apply_weights(layer)
    assert np.array_equal(layer.weight, own)


def test_a_missing_lora_is_skipped(webui):
    with_missing = webui.txt2img(prompt=f"{PROMPT} <lora:nowhere:1> <lora:lora:1>")
    assert difference(with_missing, webui.txt2img(prompt=f"{PROMPT}  <lora:lora:1>")) == 0
    assert "Couldn't find network with name nowhere" in webui.log()


@pytest.mark.parametrize(
    "scripts, status, text",
    [
        ({"No such script": {"args": []}}, 422, "Script 'No such script' not found"),
        ({"LoRAtorio": {"args": {"enabled": True}}}, 500, "KeyError"),
        ({"loratorio": {"args": [{"enabled": True, "patch_size": 0}]}}, 422, "patch_size"),
        ({"LoRAtorio": {"args": [{"enabled": True, "no_such_option": 0}]}}, 422, "no_such_option"),
    ],
)
def test_refusals(webui, scripts, status, text):
    with pytest.raises(RequestError) as caught:
        webui.txt2img(prompt=TWO, alwayson_scripts=scripts)
    assert caught.value.status == status
    assert text in caught.value.body


def test_exceptions_in_scripts_and_callbacks_are_only_logged(webui, plain):
    callbacks = webui.module("modules.script_callbacks")

    def fail(params):
        raise ValueError("as expected")

    callbacks.on_cfg_denoiser(fail)
    try:
        assert difference(plain, webui.txt2img(prompt=PROMPT)) == 0
    finally:
        callbacks.remove_callbacks_for_function(fail)
    assert webui.log().count("ValueError: as expected") == 8


def test_infotext_fills_in_what_the_request_leaves_open(webui):
    options = {"enabled": True, "patch_size": 2, "temperature": 0.5}
    first = webui.txt2img(prompt=TWO, alwayson_scripts={"LoRAtorio": {"args": [options]}})
    again = webui.txt2img(prompt=TWO, infotext=first.infotext)
    assert difference(first, again) == 0
    assert again.infotext == first.infotext
    off = webui.txt2img(prompt=TWO, infotext=first.infotext, alwayson_scripts={"LoRAtorio": {"args": [False]}})
    assert difference(off, webui.txt2img(prompt=TWO)) == 0


def test_the_interpreter_is_left_as_it_was(tmp_path):
    def host_modules():
        names = ("modules", "networks", "gradio", "extra_networks_lora", "loratorio_ext")
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}

    before, path = host_modules(), list(sys.path)
    with Double(tmp_path) as webui:
        webui.txt2img(prompt=TWO)
    assert host_modules() == before
    assert sys.path == path


@pytest.mark.parametrize(
    "prompt, steps, hires_steps, expected",
    [
        ("a cat", 8, None, [(8, "a cat")]),
        ("a [cat:dog:0.5]", 8, None, [(4, "a cat"), (8, "a dog")]),
        ("a [cat:3]", 8, None, [(3, "a "), (8, "a cat")]),
        ("a [cat::3]", 8, None, [(3, "a cat"), (8, "a ")]),
        ("a [b:[c:d:2]:1]", 3, None, [(1, "a b"), (2, "a c"), (3, "a d")]),
        ("[cat|dog]", 3, None, [(1, "cat"), (2, "dog"), (3, "cat")]),
        ("a [cat:dog:0.5]", 8, 8, [(8, "a dog")]),
        ("a [cat:dog:1.5]", 8, 8, [(4, "a cat"), (8, "a dog")]),
    ],
)
def test_prompt_schedules(webui, prompt, steps, hires_steps, expected):
    assert webui.module("modules.prompt_parser").schedule(prompt, steps, hires_steps, False) == expected


@pytest.mark.parametrize(
    "edit, encodings", [(False, 2), (True, 4)], ids=["same prompt", "another prompt in each batch"]
)
def test_batches_share_what_was_prepared(webui, monkeypatch, edit, encodings):
    """The base and the LoRA that speaks to the text encoder are encoded once for a prompt, and anew for another."""
    a1111 = webui.module("loratorio_ext.hosts.a1111")
    processing = webui.module("modules.processing").StableDiffusionProcessing
    seen = []
    encode, parse = a1111.encode, processing.parse_extra_network_prompts

    def vary(p):
        p.prompts = [prompt.replace("cat", f"cat {p.seeds[0]}") if edit else prompt for prompt in p.prompts]
        return parse(p)

    monkeypatch.setattr(a1111, "encode", lambda p: seen.append(p.prompts) or encode(p))
    monkeypatch.setattr(processing, "parse_extra_network_prompts", vary)
    webui.txt2img(prompt=TWO, n_iter=2, alwayson_scripts={"LoRAtorio": {"args": [True]}})
    assert len(seen) == encodings


@pytest.mark.parametrize("payload, sizes", [({"n_iter": 2}, [2]), (HIRES, [2, 2])], ids=["two batches", "hires"])
def test_what_fits_is_measured_once_for_images_of_one_size(webui, monkeypatch, payload, sizes):
    """The first call of a pass holds the host's own rows, and tells how many the next ones may hold."""
    a1111, gauges, calls = webui.module("loratorio_ext.hosts.a1111"), [], []

    def gauge(device):
        gauges.append(Gauge(free=400))
        return gauges[-1]

    monkeypatch.setattr(a1111.CudaMemory, "of", gauge)
    hook = webui.module("modules.shared").sd_model.model.register_forward_pre_hook(
        lambda module, args: calls.append(len(args[0]))
    )
    composition = {"LoRAtorio": {"args": [True]}}
    try:
        split = webui.txt2img(prompt=TWO, alwayson_scripts=composition, **payload)
    finally:
        hook.remove()
    assert [size for each in gauges for size in each.batches] == sizes
    assert max(calls) == 4 and set(calls) == {2, 4}
    monkeypatch.undo()
    assert difference(split, webui.txt2img(prompt=TWO, alwayson_scripts=composition, **payload)) <= 1


def test_the_pools_menu(webui):
    """Folders and LoRAs that the host lists, and after the button is pressed those that came since."""
    ui = webui.module("loratorio_ext.ui")
    assert ui.pool_choices() == sorted(recipe.name for recipe in CATALOGUE)
    folder = webui.data / "models" / "Lora" / "styles"
    folder.mkdir()
    tags = {"ss_tag_frequency": json.dumps({"10_x": {"oil <b>": 3}}), "ss_output_name": "oil"}
    save_file(load_file(folder.parent / "lora.safetensors"), folder / "oil.safetensors", metadata=tags)
    try:
        webui.module("loratorio_ext.hosts.webui").list_anew()
        assert ui.pool_choices()[0] == "styles/*" and "styles/oil" in ui.pool_choices()
        assert "<b>oil</b>: oil &lt;b&gt;" in ui.words_of(["styles/*", "lora"])
        assert ui.words_of([]) == ui.words_of(None) == ui.words_of(["lora"]) == ""
        assert "did you mean oil?" in ui.words_of(["oyl"])
        assert "&lt;script&gt;" in ui.words_of(["<script>"])
    finally:
        (folder / "oil.safetensors").unlink()
        folder.rmdir()
        webui.module("networks").list_available_networks()


def test_a_pool_typed_by_hand_and_presets(webui):
    ui, gradio = webui.module("loratorio_ext.ui"), webui.module("gradio")
    settings = webui.module("loratorio_ext.settings")
    pool, (_, line, _) = ui.menu_inputs(settings.OPTION["pool"], "pool")
    add = line.listeners["submit"]
    assert add(" lora:0.8 ", None)[0]["value"] == ["lora:0.8"]
    update, emptied = add("rank*", ["lora", "rank*"])
    assert update["value"] == ["lora", "rank*"] and emptied == ""
    assert {"lora", "rank*"} <= set(update["choices"])
    assert add("  ", ["lora"])[0]["value"] == ["lora"]

    components, _ = ui.build_ui("txt2img")
    by_name = dict(zip(settings.OPTION, components))
    assert isinstance(by_name["pool"], gradio.Dropdown) and by_name["pool"].value == []
    assert isinstance(by_name["show_maps"], gradio.Checkbox)
    assert settings.Settings.from_args([component.value for component in components]) == settings.Settings()


def test_the_panel_proposes_loras_for_every_pass(webui):
    ui, settings = webui.module("loratorio_ext.ui"), webui.module("loratorio_ext.settings")
    folder = webui.data / "models" / "Lora"
    names = ["speed/lcm-lora-8steps", "zz<b>_slider"]
    (folder / "speed").mkdir()
    for name in names:
        copyfile(folder / "lora.safetensors", folder / f"{name}.safetensors")
    try:
        webui.module("networks").list_available_networks()
        menu, (_, line, words) = ui.menu_inputs(settings.OPTION["everywhere"], "everywhere")
        assert menu.properties["choices"][:2] == names and {"lora", "speed/*"} <= set(menu.properties["choices"])
        assert "<b>speed/lcm-lora-8steps</b>" in words.value and "zz&lt;b&gt;_slider" in words.value
        assert names[0] not in menu.listeners["change"]([names[0]]) and menu.listeners["change"](names) == ""
        assert line.listeners["submit"](" *turbo* ", [names[0]])[0]["value"] == [names[0], "*turbo*"]
    finally:
        for name in names:
            (folder / f"{name}.safetensors").unlink()
        (folder / "speed").rmdir()
        webui.module("networks").list_available_networks()


def test_claims_are_text_in_the_panel_and_when_pasted(webui):
    ui, settings = webui.module("loratorio_ext.ui"), webui.module("loratorio_ext.settings")
    components, pasted = ui.build_ui("txt2img")
    by_name = dict(zip(settings.OPTION, components))
    assert isinstance(by_name["loras"], webui.module("gradio").Textbox) and by_name["loras"].value == ""
    said = settings.Settings(enabled=True, loras=by_name["loras"].properties["placeholder"], everywhere=["lcm"])
    assert said.loras["knight"] == {"at": "left", "share": 2.0}
    values = [read(said.to_infotext()) for _, read in pasted]
    assert isinstance(values[list(settings.OPTION).index("loras")], str)
    assert settings.Settings.from_args(values) == said
    assert dict(pasted)[by_name["loras"]]({}) == ""


def test_embeddings_in_a_pools_files_are_known_to_their_own_lora_alone(webui, plain):
    folder = webui.data / "models" / "Lora"
    lora = load_file(folder / "unet_only.safetensors")
    width = next(value.shape[1] for key, value in load_file(folder / "lora.safetensors").items()
                 if key.startswith("lora_te") and "down" in key)  # fmt: skip
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(4))
    save_file(lora | {"bundle_emb.zorp.string_to_param.*": vectors}, folder / "bundled.safetensors")
    try:
        contract = Contract(webui, "double")
        before = contract.plain(prompt="a zorp")
        by_pool = contract.composed({"pool": ["bundled", "locon"]}, prompt="a zorp")
        assert difference(before, contract.plain(prompt="a zorp")) == 0
        assert webui.module("modules.sd_hijack").model_hijack.embedding_db.word_embeddings == {}
        by_prompt = contract.composed(prompt="a zorp <lora:bundled:1> <lora:locon:1>")
        assert difference(by_pool, by_prompt) <= 1
        assert difference(by_pool, contract.composed({"pool": ["unet_only", "locon"]}, prompt="a zorp")) > 2
    finally:
        webui.txt2img(prompt=PROMPT)
        (folder / "bundled.safetensors").unlink()
        webui.module("networks").list_available_networks()


def test_a_pass_that_never_asks_for_the_composition_is_an_error(webui, monkeypatch):
    """As on a host that takes no notice of what is registered with it."""
    callbacks = webui.module("modules.script_callbacks")
    monkeypatch.setattr(callbacks, "on_cfg_denoiser", lambda callback: None)
    with pytest.raises(RequestError) as caught:
        webui.txt2img(prompt=TWO, alwayson_scripts={"LoRAtorio": {"args": [True]}})
    assert caught.value.status == 422
    assert "without ever asking for the composition" in caught.value.body


def test_the_pools_limits_are_the_hosts_settings(webui):
    shared, limits = webui.module("modules.shared"), webui.module("loratorio_ext.hosts.limits")
    options = {"enabled": True, "pool": ["rank_*", "locon"]}
    for name, value in ((limits.MOST_FILES, 2), (limits.MOST_GIB, 1e-6)):
        shared.opts.set(name, value)
        try:
            with pytest.raises(RequestError) as caught:
                webui.txt2img(prompt=PROMPT, alwayson_scripts={"LoRAtorio": {"args": [options]}})
            assert caught.value.status == 422 and "rank_*" in caught.value.body
        finally:
            shared.opts.data.pop(name)


def test_a_pools_files_are_read_once(webui, monkeypatch):
    """And anew when they change; those that no pool needs any more are forgotten."""
    networks, read = webui.module("networks"), []
    load = networks.load_network
    monkeypatch.setattr(networks, "load_network", lambda name, entry: read.append(name) or load(name, entry))

    def pooled(*pool):
        read.clear()
        webui.txt2img(prompt=PROMPT, alwayson_scripts={"LoRAtorio": {"args": [{"enabled": True, "pool": pool}]}})
        return sorted(read)

    pooled("text_only")
    assert pooled("rank_1", "locon") == ["locon", "rank_1"]
    assert pooled("rank_1", "locon:0.5") == []
    path = webui.data / "models" / "Lora" / "rank_1.safetensors"
    path.touch()
    assert pooled("rank_1") == ["rank_1"]
    assert pooled("locon") == ["locon"]


def damaged(webui, name, change):
    """A copy of a LoRA's file with one of the UNet's matrices changed."""
    folder = webui.data / "models" / "Lora"
    tensors = load_file(folder / "lora.safetensors")
    for key in tensors:
        if "unet" in key and "lora_up" in key:
            tensors[key] = change(tensors[key])
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_with_the_files_name(webui, number):
    path = damaged(webui, "damaged", lambda tensor: torch.full_like(tensor, number))
    try:
        with pytest.raises(RequestError) as caught:
            webui.txt2img(prompt=f"{TWO} <lora:damaged:1>", alwayson_scripts={"LoRAtorio": {"args": [True]}})
        assert caught.value.status == 422 and str(path) in caught.value.body
        script = {"LoRAtorio": {"args": [{"enabled": True, "pool": ["damaged", "rank_1"]}]}}
        pooled = webui.txt2img(prompt=PROMPT, alwayson_scripts=script)
        assert "damaged is left out of the pool" in pooled.infotext
    finally:
        path.unlink()


def test_a_file_of_zeros_takes_no_share(webui):
    path = damaged(webui, "nothing", torch.zeros_like)
    scripts = {"LoRAtorio": {"args": [{"enabled": True, "preset": "paper"}]}}
    try:
        prompt = f"{PROMPT} <lora:down_blocks:1> <lora:nothing:0:1>"
        found = webui.txt2img(prompt=prompt, alwayson_scripts=scripts)
        alone = webui.txt2img(prompt=f"{PROMPT} <lora:down_blocks:1>", alwayson_scripts=scripts)
        assert difference(found, alone) == 0
    finally:
        path.unlink()


def test_two_loras_of_one_name_are_told_apart(webui):
    """By their places below the LoRA folder, as soon as both take part."""
    module = webui.module("loratorio_ext.hosts.a1111_loras")

    class Found:
        def __init__(self, path):
            self.network_on_disk = webui.module("networks").NetworkOnDisk("a", str(path))

    folder = webui.data / "models" / "Lora"
    assert module.labels([Found(folder / "a.safetensors"), Found(folder / "sub" / "a.safetensors")]) == ["a", "sub/a"]
    assert module.labels([Found(folder / "sub" / "a.safetensors")]) == ["a"]


def test_a_difference_survives_storage_in_eight_bits(webui):
    """A full difference is not itself rounded to float8, where it would vanish."""
    loras, shared = webui.module("loratorio_ext.hosts.a1111_loras"), webui.module("modules.shared")
    networks = webui.module("networks")
    network = networks.load_network("loha", networks.available_networks["loha"])
    name, module = next((name, each) for name, each in network.modules.items() if not loras.is_text_encoder(each))
    layer = shared.sd_model.network_layer_mapping[name]
    network.unet_multiplier = 1e-4
    expected = loras.full_delta(networks, module, layer).weight
    weight = layer.weight
    try:
        layer.weight = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
        found = loras.full_delta(networks, module, layer).weight
    finally:
        layer.weight = weight
    assert expected.abs().max() < 1e-3
    torch.testing.assert_close(found.float(), expected)


def test_a_line_a_generation_and_one_a_step_if_wanted(webui, capsys):
    shared, limits = webui.module("modules.shared"), webui.module("loratorio_ext.hosts.limits")
    scripts = {"LoRAtorio": {"args": [{"enabled": True}]}}
    before = webui.txt2img(prompt=TWO, n_iter=2, alwayson_scripts=scripts).info
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("LoRAtorio")]
    assert "loratorio of locon, down_blocks; 16 model calls of 6 rows, 67% of which are a LoRA's alone" in line
    shared.opts.set(limits.LOG_STEPS, True)
    try:
        info = webui.txt2img(prompt=TWO, n_iter=2, alwayson_scripts=scripts).info
    finally:
        shared.opts.data.pop(limits.LOG_STEPS)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("LoRAtorio: step")]
    assert len(lines) == 16 and all("locon 0." in line for line in lines)
    for name in ("infotexts", "extra_generation_params"):
        assert info[name] == before[name], "a log is no part of the answer"
    webui.txt2img(prompt=TWO)
    assert capsys.readouterr().out == ""


def test_a_look_at_what_will_be_composed(webui):
    """Who is found and who is not, the cost, the preset, and what will be refused, before anything is made."""
    ui, settings = webui.module("loratorio_ext.ui"), webui.module("loratorio_ext.settings")

    def look(prompt, preset="default", styles=None, **options):
        values = settings.Settings(**options)
        args = [getattr(values, option.name) for option in settings.OPTIONS]
        found, sets, below = ui.look(prompt, styles, preset, *args)
        return found["value"], sets, below

    preset, sets, below = look(f"{TWO} <lora:no&where:1>", patch_size=8)
    assert preset == "custom" and "Patch size 8" in sets
    assert "<b>locon</b> 0.8" in below and "<b>down_blocks</b> 1, 0.7" in below
    assert 'no&amp;where</b> 1, <b class="loratorio-bad">not found' in below
    assert "2 LoRAs: a step takes about as long as 3 plain ones" in below
    assert look(TWO, "default", refresh=1)[0] == "balanced"
    assert "did you mean lora?" in look("", pool=["loraa"])[2]
    assert ui.look("", None, "fast", True, "no method")[0]["value"] == "custom"
    shared, style = webui.module("modules.shared"), webui.module("modules.styles").PromptStyle
    shared.prompt_styles.styles["mine"] = style("mine", "<lora:rank_1:0.5> {prompt} <lora:locon:0.3>")
    below = look(TWO, styles=["mine"])[2]
    assert "<b>rank_1</b> 0.5, from a style" in below and "<b>locon</b> 0.3</li>" in below and "3 LoRAs: " in below
    assert "from a style" not in look(TWO, styles=[])[2]
    many = look("", pool=["*"])[2]
    assert many.count("from the pool") == min(len(CATALOGUE), ui.MOST_SHOWN)


def test_a_loras_picture_and_what_it_was_made_for(webui):
    folder = webui.data / "models" / "Lora"
    ui, pool = webui.module("loratorio_ext.ui"), webui.module("loratorio_ext.pool")
    (folder / "lora.preview.png").write_bytes(b"")
    try:
        (lora,) = [lora for lora in ui.listed_loras() if lora.name == "lora"]
        assert "thumb?filename=" in ui.thumbnail(lora) and "lora.preview.png" in ui.thumbnail(lora)
    finally:
        (folder / "lora.preview.png").unlink()
    assert ui.thumbnail(lora) == ""
    covered = pool.Listed("top hat", "/top hat.safetensors", "top hat", metadata={"ssmd_cover_images": "[...]"})
    assert 'src="./sd_extra_networks/cover-images?page=lora&amp;item=top%20hat"' in ui.thumbnail(covered)
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    preview = webui.module("loratorio_ext.preview")
    seen = preview.Seen("a", "1", pool.Listed("a", "/a", "a", metadata=metadata))
    assert ui.remarks(seen, "SD 1") == ['<b class="loratorio-bad">made for SDXL, not SD 1</b>']
    assert ui.remarks(seen, "SDXL") == ui.remarks(seen, None) == []
    missing = preview.Seen("b", "1", styled=True)
    assert ui.remarks(missing, "SD 1") == ['<b class="loratorio-bad">not found</b>', "from a style"]


def test_the_first_screen_is_short_and_everything_is_there(webui):
    ui, settings = webui.module("loratorio_ext.ui"), webui.module("loratorio_ext.settings")
    assert [option.name for option in settings.OPTIONS if option.group == ""] == ["enabled", "show_maps"]
    components, _ = ui.build_ui("txt2img", prompt=object(), styles=object())
    assert len(components) == len(settings.OPTIONS) and len({id(each) for each in components}) == len(components)
    assert all(len(option.hint) <= len(option.help) and option.hint.endswith((".", "!")) for option in settings.OPTIONS)
    assert {"preset", "sets", "found", "look", "advanced"}.isdisjoint(settings.OPTION), "two elements of one id"
    grouped = [row for row in ui.rows_of(settings.OPTIONS[1:])]
    assert [option for row in grouped for option in row] == list(settings.OPTIONS[1:])
    assert all(len(row) <= 2 for row in grouped)
