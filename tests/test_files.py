"""Model and LoRA files that are not what they should be: refused by name, never with a traceback."""

import json
import math
import random

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file

from loratorio_ext.errors import FileFormatError, LoRAtorioError, MissingFileError, SettingsError, UnsupportedError
from loratorio_ext.headers import existing, read_header
from loratorio_ext.hosts.diffusers import check_fit, composed, load_lora, load_pipeline
from loratorio_ext.hosts.diffusers_files import (
    ADAPTER_CONFIG_KEY,
    check_checkpoint,
    check_lora,
    same_file,
)
from loratorio_ext.standalone import tinyworld
from tests.tiny_pipelines import diffusers_layout, draw_lora, kohya, make_pipeline, peft, write_lora

# What diffusers' schedulers and PEFT warn of in themselves.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline("sd1")


@pytest.fixture
def changed(pipe, tmp_path):
    """``changed(change, layout, metadata)``: a good LoRA file's path, its tensors changed in place before."""

    def write(change=lambda values: None, layout="kohya", metadata=None, kind="attention"):
        path = write_lora(tmp_path / "lora.safetensors", pipe, kind, 1, layout, 2.0)
        values = load_file(path)
        change(values)
        save_file(values, path, metadata={"format": "pt", **(metadata or {})})
        return path

    return write


def some(values, ending):
    return next(name for name in values if name.endswith(ending))


def branches_equal(one, other):
    assert one.keys() == other.keys()
    for name, branch in one.items():
        assert torch.equal(branch.down, other[name].down) and torch.equal(branch.up, other[name].up)
        assert branch.scale == pytest.approx(other[name].scale)


class TestNumbers:
    """Damage in a file's numbers."""

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("ending", ["lora_down.weight", "lora_up.weight", ".alpha"])
    def test_what_is_not_finite(self, pipe, changed, ending, number):
        def damage(values):
            values[some(values, ending)].view(-1)[-1] = number

        path = changed(damage)
        with pytest.raises(FileFormatError, match=r"lora.safetensors is damaged: what it holds for unet\.\w+"):
            load_lora(pipe, path)

    @pytest.mark.parametrize("weight", [math.nan, math.inf, 1e6, "1", True])
    def test_multipliers(self, pipe, changed, weight):
        path = changed()
        with pytest.raises(SettingsError, match="lora must be a number from -100 to 100") as caught:
            load_lora(pipe, path, weight)
        assert caught.value.field == "te_weight"
        with pytest.raises(SettingsError) as caught:
            load_lora(pipe, path, 1.0, weight)
        assert caught.value.field == "unet_weight"

    @pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
    def test_a_damaged_model(self, tmp_path, component):
        broken = make_pipeline("sd1")
        next(getattr(broken, component).parameters()).data.view(-1)[0] = math.nan
        broken.save_pretrained(tmp_path / "model")
        with pytest.raises(FileFormatError, match=rf"model is damaged: {component}\.\S+ holds NaN"):
            load_pipeline(tmp_path / "model")

    def test_numbers_too_large_for_a_sum_are_finite(self, tmp_path):
        large = make_pipeline("sd1")
        next(large.unet.parameters()).data.fill_(3e38)
        large.save_pretrained(tmp_path / "model")
        load_pipeline(tmp_path / "model")


class TestStructure:
    """Names, shapes and metadata that no LoRA has."""

    def test_rank_zero(self, pipe, changed):
        def empty(values):
            for ending in ("lora_down.weight", "lora_up.weight"):
                name = some(values, ending)
                shape = list(values[name].shape)
                shape[0 if "down" in ending else 1] = 0
                values[name] = torch.empty(shape)

        with pytest.raises(FileFormatError, match=r"is no LoRA: \S+ is empty, of shape \(0, \d+\)"):
            load_lora(pipe, changed(empty))

    def test_alpha_with_several_elements(self, pipe, changed):
        def several(values):
            values[some(values, ".alpha")] = torch.ones(3)

        with pytest.raises(FileFormatError, match=r"\S+\.alpha should be one number, and holds 3"):
            load_lora(pipe, changed(several))

    def test_whole_numbers(self, pipe, changed):
        def whole(values):
            name = some(values, "lora_up.weight")
            values[name] = values[name].to(torch.int32)

        with pytest.raises(FileFormatError, match=r"is of type I32, not floating point"):
            load_lora(pipe, changed(whole))

    def test_a_yes_or_no_of_ia3_is_no_damage(self, tmp_path):
        save_file({"a.weight": torch.ones(2), "a.on_input": torch.tensor(True)}, tmp_path / "a.safetensors")
        check_lora(read_header(tmp_path / "a.safetensors"))

    @pytest.mark.parametrize("shape", [(), (3,), (3, 16, 1), (3, 4, 4)])
    def test_shapes(self, pipe, changed, shape):
        def reshape(values):
            values[some(values, "lora_down.weight")] = torch.ones(shape)

        path = changed(reshape)
        if shape == (3, 16, 1):  # a trailing dimension of one says nothing
            assert load_lora(pipe, path).branches
        else:
            with pytest.raises(UnsupportedError, match="lora"):
                load_lora(pipe, path)

    def test_a_kernel_turned_on_its_side(self, pipe, changed):
        """As many numbers as the layer has, in a shape that only fails when it is computed with."""

        def turn(values):
            name = next(name for name, value in values.items() if "down" in name and value.shape[2:] == (3, 3))
            values[name] = values[name].reshape(*values[name].shape[:2], 9, 1).contiguous()

        with pytest.raises(UnsupportedError, match="1 of its .* do not fit"):
            load_lora(pipe, changed(turn, kind="convolutions"))

    def test_a_matrix_alone(self, pipe, changed):
        def take(values):
            del values[some(values, "lora_B.weight")]

        with pytest.raises(UnsupportedError, match="has no lora_B"):
            load_lora(pipe, changed(take, "peft"))

    @pytest.mark.parametrize(
        "text, said",
        [
            ("no JSON", "not JSON"),
            ("[1]", "no JSON object"),
            ("[" * 100_000, "nested too deep"),
            ('{"unet.lora_alpha": "8"}', "unet.lora_alpha is not what PEFT writes"),
            ('{"unet.lora_alpha": NaN}', "unet.lora_alpha is not what PEFT writes"),
            ('{"unet.lora_alpha": 1e400}', "unet.lora_alpha is not what PEFT writes"),
            ('{"unet.use_rslora": 3}', "unet.use_rslora is not what PEFT writes"),
            ('{"unet.alpha_pattern": [1]}', "unet.alpha_pattern is not what PEFT writes"),
            ('{"unet.alpha_pattern": {"to_q": []}}', "unet.alpha_pattern is not what PEFT writes"),
            ('{"unet.alpha_pattern": {"(a+)+b": 1}}', "unet.alpha_pattern is not what PEFT writes"),
        ],
    )
    def test_metadata(self, pipe, changed, text, said):
        path = changed(layout="peft", metadata={ADAPTER_CONFIG_KEY: text})
        with pytest.raises(FileFormatError, match=rf"lora.safetensors has {ADAPTER_CONFIG_KEY} .*{said}"):
            load_lora(pipe, path)

    def test_another_name(self, pipe, changed):
        path = changed()
        with pytest.raises(FileFormatError, match="must be named .safetensors"):
            load_lora(pipe, path.rename(path.with_suffix(".pt")))

    def test_a_folder(self, pipe, tmp_path):
        (tmp_path / "lora.safetensors").mkdir()
        with pytest.raises(FileFormatError, match="is a folder"):
            load_lora(pipe, tmp_path / "lora.safetensors")

    @pytest.mark.parametrize("name", ["nowhere", "a" * 5000, "a\0b"])
    def test_missing(self, name):
        with pytest.raises(MissingFileError, match="does not exist"):
            existing(name)


class TestLayouts:
    def test_layouts_mixed_in_one_file(self, pipe, tmp_path):
        """As diffusers' training scripts write it: attention in its own layout, what is beyond it in PEFT's."""
        drawn = draw_lora(pipe, "everything", 1)
        expected = load_lora(pipe, write_lora(tmp_path / "one.safetensors", pipe, "everything", 1, "peft")).branches
        attention = {key: value for key, value in drawn.items() if ".attn" in key[1] or "self_attn" in key[1]}
        beyond = {key: value for key, value in drawn.items() if key not in attention}
        assert attention and beyond
        values = {**diffusers_layout(pipe, attention), **peft(pipe, beyond)}
        save_file({name: value.contiguous() for name, value in values.items()}, tmp_path / "mixed.safetensors")
        branches_equal(load_lora(pipe, tmp_path / "mixed.safetensors").branches, expected)

    def test_a_text_encoder_beyond_attention_alone(self, pipe, tmp_path):
        drawn = {key: value for key, value in draw_lora(pipe, "text", 1).items() if ".mlp." in key[1]}
        for layout, name in ((peft, "a"), (kohya, "b")):
            values = {key: value.contiguous() for key, value in layout(pipe, drawn).items()}
            save_file(values, tmp_path / f"{name}.safetensors")
        one, other = (load_lora(pipe, tmp_path / f"{name}.safetensors").branches for name in "ab")
        assert one
        branches_equal(one, other)


class TestModels:
    def test_a_lora(self, pipe, tmp_path):
        path = write_lora(tmp_path / "lora.safetensors", pipe, "everything", 1)
        with pytest.raises(FileFormatError, match="is a LoRA, not a model; give it with --lora"):
            load_pipeline(path)

    @pytest.mark.parametrize(
        "part, missing",
        [
            ("model.diffusion_model.", "no text encoder and no VAE"),
            ("first_stage_model.", "no UNet or transformer and no text encoder"),
        ],
    )
    def test_a_part(self, tmp_path, part, missing):
        values = load_file(tinyworld.weights() / "tinyworld.safetensors")
        save_file({name: value for name, value in values.items() if name.startswith(part)}, tmp_path / "a.safetensors")
        with pytest.raises(FileFormatError, match=f"is not a whole model: it holds {missing}"):
            load_pipeline(tmp_path / "a.safetensors", config=tinyworld.weights())

    def test_what_diffusers_stumbles_over(self, tmp_path):
        """A part of a part: found by diffusers alone, and told as any other bad file."""
        values = load_file(tinyworld.weights() / "tinyworld.safetensors")
        for name in [name for name in values if "output_blocks" in name]:
            del values[name]
        save_file(values, tmp_path / "a.safetensors")
        with pytest.raises(FileFormatError, match="diffusers cannot load .*a.safetensors"):
            load_pipeline(tmp_path / "a.safetensors", config=tinyworld.weights())

    @pytest.mark.parametrize(
        "index", ["[]", "{}", '{"_class_name": 3}', '{"_class_name": "logging"}', '{"_class_name": ["a", "b"]}', "no"]
    )
    def test_configurations(self, tmp_path, index):
        (tmp_path / "model_index.json").write_text(index)
        for call in ((tmp_path,), (tinyworld.weights() / "tinyworld.safetensors", tmp_path)):
            with pytest.raises(FileFormatError, match="diffusers cannot load"):
                load_pipeline(*call)

    def test_nothing_is_unpickled(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "model")
        file = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
        with pytest.raises(FileFormatError, match="diffusers cannot load"):
            load_pipeline(tmp_path / "model")

    def test_the_tiny_world_is_a_whole_model(self):
        check_checkpoint(read_header(tinyworld.weights() / "tinyworld.safetensors"))
        for name in tinyworld.loras():
            check_lora(read_header(tinyworld.weights() / f"lora/{name}.safetensors"))


def test_one_file_by_several_paths(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "c").hardlink_to(tmp_path / "a")
    (tmp_path / "d").touch()
    same = {same_file(path) for path in (tmp_path / "a", tmp_path / "b", tmp_path / "c", tmp_path / "x/../a")}
    assert len({same_file(tmp_path / name) for name in "abc"}) == 1 and len(same) <= 2
    assert same_file(tmp_path / "d") != same_file(tmp_path / "a")


# --- damaged at random ------------------------------------------------------------------------------------------------


def header_size(data):
    return 8 + int.from_bytes(data[:8], "little")


def truncated(data, rng):
    return data[: rng.randrange(rng.choice((header_size(data), len(data))))]


def flipped(data, rng):
    """A bit or a few of the header the other way round."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(header_size(data)) if rng.random() < 0.9 else rng.randrange(8)
        data[place % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


def rewritten(data, rng):
    """One entry of the header replaced, and its length set right: what random bits seldom reach."""
    size = header_size(data)
    header = json.loads(data[8:size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = dict(header[name])
    match rng.randrange(7):
        case 0:
            entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "U8", "C64", "X"])
        case 1:
            entry["shape"] = rng.choice([[], [0], [1], entry["shape"][::-1], [*entry["shape"], 1], [-1], [2**63], "x"])
        case 2:
            entry["data_offsets"] = rng.choice([[0, 0], entry["data_offsets"][::-1], [0, 2**62], [0], None])
        case 3:
            header["__metadata__"] = rng.choice([[], {"a": 1}, {ADAPTER_CONFIG_KEY: "[" * 9999}, {"": ""}, None])
        case 4:
            other = rng.choice(["", ".", "lora_unet_.lora_down.weight", "unet..lora_A.weight", "\ud800", "a" * 9999])
            header[other] = header.pop(name)
        case 5:
            del header[name]
        case 6:
            header[name.replace("unet", "text_encoder_2").replace("lora_te", "lora_te9")] = header.pop(name)
    if name in header:
        header[name] = entry
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[size:]


@pytest.mark.parametrize("damage", [truncated, flipped, rewritten])
@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_damaged_files(pipe, tmp_path, damage, layout):
    """Of 2,007 files every one is a LoRA that fits, or refused in words."""
    drawn = {key: value for key, value in draw_lora(pipe, "everything", 1, rank=1).items() if "mid" in key[1]}
    values = {"kohya": kohya, "diffusers": diffusers_layout, "peft": peft}[layout](pipe, drawn, 1.0)
    source, path = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    config = json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 1}, "unet.use_rslora": False})
    metadata = {"format": "pt", ADAPTER_CONFIG_KEY: config}
    save_file({name: value.contiguous() for name, value in values.items()}, source, metadata=metadata)
    data, rng = source.read_bytes(), random.Random(f"{layout} {damage.__name__}")
    outcomes = set()
    for _ in range(223):
        path.write_bytes(damage(data, rng))
        try:
            lora = load_lora(pipe, path)
            check_fit(lora.name, lora.branches, pipe)
            outcomes.add("LoRA")
        except LoRAtorioError as error:
            assert "bad" in str(error), error
            outcomes.add(type(error).__name__)
    assert "FileFormatError" in outcomes


def test_a_lora_of_another_pipeline_is_refused_when_it_is_composed(pipe, changed):
    lora = load_lora(pipe, changed())
    other = make_pipeline("sdxl")
    with pytest.raises(UnsupportedError, match="another architecture"), composed(other, [lora]):
        pass
