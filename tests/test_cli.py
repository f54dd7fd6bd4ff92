"""The command line: what it writes, what it reports, and how it refuses."""

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loratorio_ext import __version__
from loratorio_ext.errors import SettingsError, UnsupportedError
from loratorio_ext.infotext import LoraToken, infotext, join_prompt, split_prompt
from loratorio_ext.parts import parts_of_tag
from loratorio_ext.record import read_shares
from loratorio_ext.samplers import SAMPLERS
from loratorio_ext.settings import OPTIONS, Settings

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("typer")

import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from loratorio_ext.cli import app
from loratorio_ext.hosts.diffusers import composed, generators, load_lora, load_pipeline, scheduler_for
from loratorio_ext.standalone.report import EXIT_CODES, INTERRUPTED, UNFORESEEN, written
from loratorio_ext.standalone.requests import Requested, find_lora, parse_lora, parse_size
from tests.tiny_pipelines import make_pipeline, write_lora

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning")]

WEBUI_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""How AUTOMATIC1111's WebUI takes an infotext's last line apart."""


def read_infotext(path):
    """(prompt, negative prompt, parameters) of a PNG."""
    *lines, last = Image.open(path).info["parameters"].split("\n")
    prompt = [line for line in lines if not line.startswith("Negative prompt: ")]
    negative = [line.removeprefix("Negative prompt: ") for line in lines if line.startswith("Negative prompt: ")]
    values = {
        key: json.loads(value) if value.startswith('"') else value for key, value in WEBUI_PARAMETER.findall(last)
    }
    return "\n".join(prompt), "\n".join(negative), values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and LoRAs for it, one of them a level deeper, and one of another architecture."""
    folder = tmp_path_factory.mktemp("cli")
    pipe = make_pipeline("sd1")
    pipe.save_pretrained(folder / "model")
    (folder / "loras/deep").mkdir(parents=True)
    write_lora(folder / "loras/hat.safetensors", pipe, "everything", 1, "kohya", 2.0)
    write_lora(folder / "loras/deep/cat.safetensors", pipe, "attention", 2, "peft")
    write_lora(folder / "xl.safetensors", make_pipeline("sdxl"), "everything", 3)
    (folder / "broken.safetensors").write_bytes(b"no header here")
    return folder


def run(folder, *arguments, **options):
    """The command with a model, a prompt and few steps, unless said otherwise."""
    given = {"model": folder / "model", "prompt": "a cat", "steps": 2, "size": "64x64", "seed": 7, "device": "cpu"}
    given |= {"out": folder / "out.png", **options}
    listed = [str(part) for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    return CliRunner().invoke(app, ["generate", *listed, *map(str, arguments)])


def refused(result, code, pattern):
    assert result.exit_code == code, result.output
    assert re.search(pattern, result.output.replace("\n", " ")), result.output


class TestGenerate:
    def test_images_are_those_of_the_python_interface(self, folder):
        chosen = {"patch_size": 2, "relativity": 1.0}
        call = {"negative": "dark: or not", "cfg": 4.0, "sampler": "DPM++ 2M Karras", "batch": 2}
        files = ("--lora", f"{folder}/loras/hat.safetensors:0.5:0.8", "--lora", f"{folder}/loras/deep/cat.safetensors")
        result = run(folder, *files, **call, **chosen)
        assert result.exit_code == 0, result.output
        written = [folder / "out-0.png", folder / "out-1.png"]
        assert result.stdout.split() == [str(path) for path in written]

        pipe = load_pipeline(folder / "model")
        pipe.scheduler = scheduler_for(pipe, "DPM++ 2M Karras")
        loras = [
            load_lora(pipe, folder / "loras/hat.safetensors", 0.5, 0.8),
            load_lora(pipe, folder / "loras/deep/cat.safetensors"),
        ]
        with composed(pipe, loras, **chosen):
            expected = pipe(
                "a cat",
                negative_prompt="dark: or not",
                num_inference_steps=2,
                guidance_scale=4.0,
                width=64,
                height=64,
                num_images_per_prompt=2,
                generator=generators([7, 8]),
            ).images
        for path, image in zip(written, expected):
            assert Image.open(path).tobytes() == image.tobytes()

        prompt, negative, values = read_infotext(written[1])
        assert prompt == "a cat <lora:hat:0.5:0.8><lora:cat:1>" and negative == "dark: or not"
        assert values["Seed"] == "8" and values["Steps"] == "2" and values["CFG scale"] == "4.0"
        assert values["Sampler"] == "DPM++ 2M" and values["Schedule type"] == "Karras" and values["Size"] == "64x64"
        assert Settings.from_infotext(values) == Settings(enabled=True, **chosen)

    def test_an_image_depends_on_its_own_seed(self, folder):
        lora = ("--lora", folder / "loras/hat.safetensors")
        run(folder, *lora, batch=2, seed=3)
        run(folder, *lora, seed=4, out=folder / "single.png")
        one, other = (torch.tensor(list(Image.open(folder / name).tobytes())) for name in ("out-1.png", "single.png"))
        assert (one - other).abs().max() <= 1

    def test_a_pool_is_chosen_from_the_folder(self, folder):
        """The same image as with the files named one by one; what was picked is in the infotext and in pictures."""
        dir_ = folder / "loras"
        chosen = ("--pool", "hat:0.5:0.8", "--pool", "deep/*", "--top-k", "1", "--reselect-every", "2", "--show-maps")
        result = run(folder, *chosen, lora_dir=dir_, out=folder / "pool.png")
        assert result.exit_code == 0, result.output
        by_file = ("--lora", f"{dir_}/hat.safetensors:0.5:0.8", "--lora", f"{dir_}/deep/cat.safetensors")
        run(folder, *by_file, top_k=1, reselect_every=2, out=folder / "files.png")
        # Evaluated in the pool's order, which is the order given here.
        assert Image.open(folder / "pool.png").tobytes() == Image.open(folder / "files.png").tobytes()
        prompt, _, values = read_infotext(folder / "pool.png")
        assert prompt == "a cat"
        assert Settings.from_infotext(values).pool == ("hat:0.5:0.8", "deep/*")
        shares = read_shares(values["LoRAtorio picked"])
        assert set(shares) <= {"hat", "cat"} and sum(shares.values()) == pytest.approx(1, abs=2e-3)
        assert {file.name for file in folder.glob("pool-*.png")} == {
            "pool-painted.png",
            "pool-shares.png",
            "pool-maps.png",
        }

    def test_a_lora_in_prompt_and_pool_takes_part_once(self, folder):
        dir_ = folder / "loras"
        both = run(folder, "--json", "--pool", "*:0.1", prompt="a cat <lora:hat:0.5>", lora_dir=dir_)
        report = json.loads(both.stdout)
        assert [each["weights"] for each in report["loras"]] == [[0.5, 0.5]]
        assert [each["file"] for each in report["pool"]] == [str(dir_ / "deep/cat.safetensors")]

    def test_what_does_not_fit_is_left_out_of_the_pool_by_name(self, folder):
        (folder / "mixed").mkdir()
        for source in ("xl.safetensors", "broken.safetensors", "loras/hat.safetensors"):
            (folder / "mixed" / source.rpartition("/")[2]).write_bytes((folder / source).read_bytes())
        result = run(folder, "--pool", "*", lora_dir=folder / "mixed", out=folder / "mixed.png")
        assert result.exit_code == 0, result.output
        for name in ("xl", "broken"):
            assert f"{name} is left out of the pool" in result.output
        run(folder, "--lora", folder / "loras/hat.safetensors", out=folder / "hat.png")
        assert Image.open(folder / "mixed.png").tobytes() == Image.open(folder / "hat.png").tobytes()
        refused(run(folder, "--pool", "xl", lora_dir=folder / "mixed"), 5, "no LoRA of the pool can be composed")

    def test_pools_that_are_refused(self, folder):
        refused(run(folder, "--pool", "hat"), 2, "--lora-dir")
        refused(run(folder, "--pool", "hot", lora_dir=folder / "loras"), 2, "did you mean hat")
        refused(run(folder, "--pool", "../xl", lora_dir=folder / "loras"), 2, "there is no LoRA '../xl'")
        refused(run(folder, "--pool", "hat", lora_dir=folder / "nowhere"), 3, "is not a folder")

    def test_report(self, folder):
        prompt = "a cat <lora:cat:0.5> in a hat <lora:hat:1:0.25>"
        result = run(folder, "--json", prompt=prompt, lora_dir=folder / "loras", preset="paper", patch_size=8)
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert report["images"] == [{"file": str(folder / "out.png"), "seed": 7}]
        assert [lora["weights"] for lora in report["loras"]] == [[0.5, 0.5], [1.0, 0.25]]
        assert report["options"]["patch_size"] == 8 and report["options"]["temperature_mode"] == "fixed"
        assert report["call"]["prompt"] == "a cat  in a hat"
        assert [step["step"] for step in report["steps"]] == [0, 1]
        for step in report["steps"]:
            assert len(step["similarity"]["mean"]) == len(step["similarity"]["lowest"]) == len(step["weights"]) == 2
            assert step["loras"] == step["similarity"]["loras"] == ["cat", "hat"]
            assert sum(step["weights"]) == pytest.approx(1, abs=1e-4)
            assert step["similarity"]["spread"] >= 0
        assert all(seconds >= 0 for seconds in report["seconds"].values())

    @pytest.mark.parametrize("method", ["composite", "switch", "merge"])
    def test_other_methods(self, folder, method):
        result = run(folder, "--json", "--lora", folder / "loras/hat.safetensors", method=method)
        assert result.exit_code == 0, result.output
        assert all("similarity" not in step for step in json.loads(result.stdout)["steps"])

    def test_half_precision(self, folder):
        result = run(folder, "--json", "--lora", folder / "loras/hat.safetensors", dtype="bfloat16")
        assert json.loads(result.stdout)["model"]["dtype"] == "torch.bfloat16", result.output

    def test_a_random_seed_is_reported(self, folder):
        result = run(folder, "--json", "--lora", folder / "loras/hat.safetensors", seed=-1)
        assert 0 <= json.loads(result.stdout)["images"][0]["seed"] < 2**32

    def test_every_option_of_the_table_is_there(self):
        shown = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        for option in OPTIONS[1:]:
            assert f"--{option.name.replace('_', '-')} " in shown
        assert "--enabled" not in shown


class TestClaims:
    """Where, when and how much each LoRA acts, in tags and as options."""

    def test_tags(self, folder, tmp_path):
        hat, cat = folder / "loras/hat.safetensors", folder / "loras/deep/cat.safetensors"
        prompt = "a cat <lora:cat:0.5:at=left:steps=0-0.5>"
        call = {"lora": f"{hat}:0.5:0.8:share=2", "lora_dir": folder / "loras", "patch_size": 2, "sampler": "DDIM"}
        result = run(folder, "--json", prompt=prompt, **call, cfg=4.0, out=tmp_path / "out.png")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert [each["parts"] for each in report["loras"]] == [{"at": "left", "steps": "0-0.5"}, {"share": 2.0}]
        assert [step["loras"] for step in report["steps"]] == [["cat", "hat"], ["hat"]]
        assert [len(step["weights"]) for step in report["steps"]] == [2, 1]

        pipe = load_pipeline(folder / "model")
        pipe.scheduler = scheduler_for(pipe, "DDIM")
        loras = [load_lora(pipe, cat, 0.5, at="left", steps="0-0.5"), load_lora(pipe, hat, 0.5, 0.8, share=2)]
        with composed(pipe, loras, patch_size=2):
            expected = pipe(
                "a cat",
                negative_prompt="",
                num_inference_steps=2,
                guidance_scale=4.0,
                width=64,
                height=64,
                generator=generators([7]),
            ).images[0]
        assert Image.open(tmp_path / "out.png").tobytes() == expected.tobytes()
        written = read_infotext(tmp_path / "out.png")[0]
        assert written == "a cat <lora:cat:0.5:at=left:steps=0-0.5><lora:hat:0.5:0.8:share=2>"

        again = run(folder, prompt=written, **{**call, "lora": hat}, cfg=4.0, out=tmp_path / "lost.png")
        assert "are one LoRA" in again.output  # the last one's weights and parts hold
        del call["lora"]
        run(folder, prompt=written, **call, cfg=4.0, out=tmp_path / "again.png")
        assert Image.open(tmp_path / "again.png").tobytes() == expected.tobytes()
        assert Image.open(tmp_path / "lost.png").tobytes() != expected.tobytes()

    def test_options_say_the_same(self, folder, tmp_path):
        """By name, by folder, by pattern of a pool; and pasted from the infotext."""
        call = {"lora_dir": folder / "loras", "patch_size": 2}
        tags = "a cat <lora:hat:0.5:at=0-0-0.4-1><lora:cat:1:base=1>"
        run(folder, prompt=tags, **call, out=tmp_path / "tags.png")
        named = ("--loras", '{"hat": {"at": "0-0-0.4-1"}}', "--everywhere", "deep/*")
        for prompt, pool in (
            ("a cat <lora:hat:0.5><lora:cat:1>", ()),
            ("a cat", ("--pool", "hat:0.5", "--pool", "c*")),
        ):
            result = run(folder, "--json", *named, *pool, prompt=prompt, **call, out=tmp_path / "options.png")
            report = json.loads(result.stdout)
            found = {Path(each["file"]).stem: each["parts"] for each in (*report["loras"], *report["pool"])}
            assert found == {"hat": {"at": "0-0-0.4-1"}, "cat": {"base": True}} and report["notes"] == []
            assert [step["loras"] for step in report["steps"]] == [["hat"], ["hat"]]
            assert Image.open(tmp_path / "options.png").tobytes() == Image.open(tmp_path / "tags.png").tobytes()
            settings = Settings.from_infotext(read_infotext(tmp_path / "options.png")[2])
            assert settings.loras == {"hat": {"at": "0-0-0.4-1"}} and settings.everywhere == ("deep/*",)

    def test_all_in_every_pass(self, folder, tmp_path):
        result = run(folder, "--json", "--show-maps", "--everywhere", "*", lora=folder / "loras/hat.safetensors")
        assert result.exit_code == 0, result.output
        for step in json.loads(result.stdout)["steps"]:
            assert step["loras"] == step["weights"] == [] and "similarity" not in step

    def test_what_is_not_heeded_is_told(self, folder, tmp_path):
        lora = f"{folder}/loras/hat.safetensors:at=left"
        for options, note in (
            ({"method": "switch"}, "method switch knows no place"),
            ({"method": "merge"}, "method merge knows no place"),
            ({"loras": '{"hot": {"share": 2}}'}, "loras.hot is no LoRA of this image"),
            ({"everywhere": "lcm*"}, "everywhere: lcm* is no LoRA of this image"),
        ):
            result = run(folder, "--json", lora=lora, **options, out=tmp_path / "out.png")
            assert result.exit_code == 0, result.output
            assert json.loads(result.stdout)["notes"][0].startswith(note)
            assert note in read_infotext(tmp_path / "out.png")[2]["LoRAtorio note"]
            assert result.stderr.count(note) == 1 and "Warning" not in result.stderr

    def test_refusals(self, folder):
        hat = f"{folder}/loras/hat.safetensors"
        refused(run(folder, lora=f"{hat}:at=lft"), 2, "at in --lora .*did you mean left")
        refused(run(folder, lora=f"{hat}:0.5:lbw=1"), 5, "says lbw, of which nothing is known here")
        refused(run(folder, lora=f"{hat}:at=left:base=1"), 2, "hat says at of a LoRA that is in every pass")
        refused(run(folder, "--everywhere", "*", lora=f"{hat}:share=2"), 2, "hat says share of a LoRA")
        refused(run(folder, lora=hat, loras='{"hat": {"at": "lft"}}'), 2, "loras.hat.at must be .*did you mean left")
        refused(run(folder, lora=hat, loras="{"), 2, "loras must be a mapping of LoRA names")


def damaged(source, path, change):
    """A copy of a LoRA file, its tensors changed in place."""
    values = load_file(source)
    change(values)
    save_file(values, path)
    return path


def write_number(ending, number):
    """Writes a number into a LoRA's first tensor of this kind."""

    def change(values):
        next(value for name, value in values.items() if name.endswith(ending)).view(-1)[0] = number

    return change


class TestNothingSilent:
    """What went otherwise than asked is in the infotext, in the report, and on stderr."""

    def noted(self, result, path, pattern):
        assert result.exit_code == 0, result.output
        note = read_infotext(path)[2]["LoRAtorio note"]
        assert re.search(pattern, note), note
        assert note in json.loads(result.stdout)["notes"] and note in result.stderr
        return json.loads(result.stdout)

    def test_a_lora_that_adds_nothing(self, folder, tmp_path):
        hat, out = folder / "loras/hat.safetensors", tmp_path / "out.png"
        cat = damaged(
            folder / "loras/deep/cat.safetensors", tmp_path / "nil.safetensors", lambda values: values.clear()
        )
        result = run(folder, "--json", "--lora", hat, "--lora", cat, out=out)
        report = self.noted(result, out, "nil adds nothing to the model .* takes no part")
        assert report["inert"] == ["nil"] and all(step["weights"] == [1.0] for step in report["steps"])
        run(folder, "--lora", hat, out=tmp_path / "alone.png")
        assert Image.open(out).tobytes() == Image.open(tmp_path / "alone.png").tobytes()

    def test_at_weight_zero_it_is_the_bare_model(self, folder, tmp_path):
        result = run(folder, "--json", "--lora", f"{folder}/loras/hat.safetensors:0", out=tmp_path / "out.png")
        self.noted(result, tmp_path / "out.png", "hat adds nothing")

    @pytest.mark.parametrize("way", ["same", "dots", "link", "prompt"])
    def test_one_file_by_two_paths(self, folder, tmp_path, way):
        hat, out = folder / "loras/hat.safetensors", tmp_path / "out.png"
        (tmp_path / "link.safetensors").symlink_to(hat)
        other = {"same": hat, "dots": folder / "loras/deep/../hat.safetensors", "link": tmp_path / "link.safetensors"}
        if way == "prompt":
            call = {"prompt": "a cat <lora:hat:1>", "lora_dir": folder / "loras"}
        else:
            call = {"lora": other[way]}
        result = run(folder, "--json", "--lora", f"{hat}:0.5", **call, out=out)
        report = self.noted(result, out, "are one LoRA, which takes part once, at weight 0.5:0.5|at weight 1:1")
        assert len(report["loras"]) == 1 and all(step["weights"] == [1.0] for step in report["steps"])

    def test_a_linked_file_of_a_pool(self, folder, tmp_path):
        (tmp_path / "a.safetensors").symlink_to(folder / "loras/hat.safetensors")
        (tmp_path / "b.safetensors").symlink_to(folder / "loras/hat.safetensors")
        result = run(folder, "--json", "--pool", "*", lora_dir=tmp_path, out=tmp_path / "out.png")
        assert len(json.loads(result.stdout)["pool"]) == 1

    def test_damage_in_a_pool(self, folder, tmp_path):
        """NaN, several alphas, metadata that is no JSON: each is left out by name, and the rest composes."""
        hat, cat = folder / "loras/hat.safetensors", folder / "loras/deep/cat.safetensors"
        for name, change in {
            "nan": write_number(".lora_up.weight", math.nan),
            "inf": write_number(".alpha", math.inf),
            "alphas": lambda values: values.update({"lora_unet_conv_in.alpha": torch.ones(2)}),
            "rank": lambda values: values.update({"lora_unet_conv_in.lora_up.weight": torch.ones(16, 0)}),
        }.items():
            damaged(hat, tmp_path / f"{name}.safetensors", change)
        save_file(load_file(cat), tmp_path / "json.safetensors", metadata={"lora_adapter_metadata": "[" * 100_000})
        (tmp_path / "good.safetensors").write_bytes(hat.read_bytes())
        out = tmp_path / "out.png"
        result = run(folder, "--json", "--pool", "*", lora_dir=tmp_path, out=out)
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert [Path(each["file"]).stem for each in report["pool"]] == ["good"]
        assert set(report["left_out"]) == {"nan", "inf", "alphas", "rank", "json"}
        assert len(report["notes"]) == 5 and "; ".join(report["notes"]) == read_infotext(out)[2]["LoRAtorio note"]
        run(folder, "--lora", hat, out=tmp_path / "hat.png")
        assert Image.open(out).tobytes() == Image.open(tmp_path / "hat.png").tobytes()

    def test_a_prompt_longer_than_the_model_reads(self, folder, tmp_path):
        lora = ("--lora", folder / "loras/hat.safetensors")
        result = run(folder, "--json", *lora, prompt="x " * 75 + "and the rest", out=tmp_path / "out.png")
        self.noted(
            result, tmp_path / "out.png", "the prompt is longer than the model reads; not read is: and the rest$"
        )

    def test_quiet(self, folder):
        result = run(folder, "--quiet", "--lora", f"{folder}/loras/hat.safetensors:0")
        assert result.exit_code == 0 and result.output == ""
        assert run(folder, "--quiet").stderr.startswith("LoRAtorio: no LoRA given")

    @pytest.mark.parametrize(
        "sampler, said",
        [("DPM++ 2M", "SGM Uniform"), ("euler", "Uniform"), ("dpm2 KARRAS", "Karras"), ("ddim", "Automatic")],
    )
    def test_the_schedule_that_ran(self, folder, tmp_path, sampler, said):
        out = tmp_path / "out.png"
        run(folder, "--lora", folder / "loras/hat.safetensors", sampler=sampler, out=out)
        values = read_infotext(out)[2]
        assert values["Schedule type"] == said and values["Sampler"].lower() == sampler.lower().removesuffix(" karras")


class TestErrorReports:
    @pytest.mark.parametrize(
        "options, code, kind, field, value",
        [
            ({"steps": 0}, 2, "SettingsError", "steps", "0"),
            ({"steps": "many"}, 2, "SettingsError", "steps", "many"),
            ({"patch_size": 65}, 2, "SettingsError", "patch_size", 65),
            ({"preset": "magic"}, 2, "SettingsError", "preset", "magic"),
            ({"pool_gib": "inf"}, 2, "SettingsError", "pool_gib", "inf"),
            ({"cfg": "nan"}, 2, "SettingsError", "cfg", "nan"),
            ({"sampler": "magic"}, 2, "SettingsError", "sampler", "magic"),
            ({"size": "100000x100000"}, 2, "SettingsError", "size", "100000x100000"),
            ({"device": "cuda:99"}, 2, "SettingsError", "device", "cuda:99"),
            ({"device": "meta"}, 2, "SettingsError", "device", "meta"),
            ({"device": "nonsense"}, 2, "SettingsError", "device", "nonsense"),
            ({"dtype": "int8"}, 2, "SettingsError", "dtype", "int8"),
            ({"offload": "sequential"}, 2, "SettingsError", "offload", "sequential"),
            ({"offload": "model"}, 2, "SettingsError", "offload", "model"),
            ({"offload": "disk"}, 2, "SettingsError", "offload", "disk"),
            ({"lora": "{}/loras/hat.safetensors:nan"}, 2, "SettingsError", "lora", "nan"),
            ({"lora": "{}/loras"}, 4, "FileFormatError", "lora", "{}/loras"),
            ({"lora": "{}/loras/hot.safetensors"}, 3, "MissingFileError", "lora", "{}/loras/hot.safetensors"),
            ({"lora": "{}/broken.safetensors"}, 4, "FileFormatError", "lora", "{}/broken.safetensors"),
            ({"model": "{}/loras/hat.safetensors"}, 4, "FileFormatError", "model", "{}/loras/hat.safetensors"),
            ({"model": "{}/nowhere"}, 3, "MissingFileError", "model", "{}/nowhere"),
            ({"config": "{}/nowhere"}, 3, "MissingFileError", "config", "{}/nowhere"),
            ({"lora": "{}/xl.safetensors"}, 5, "UnsupportedError", "lora", "{}/xl.safetensors"),
            ({"out": "{}/out.jpg"}, 2, "SettingsError", "out", "{}/out.jpg"),
            ({"out": "{}/broken.safetensors/out.png"}, 6, "WriteError", "out", "{}/broken.safetensors/out.png"),
            ({"prompt": "<lora:cet:1>", "lora_dir": "{}/loras"}, 3, "MissingFileError", "prompt", "cet"),
        ],
        ids=str,
    )
    def test_every_error_names_field_and_value(self, folder, options, code, kind, field, value):
        options = {name: str(each).replace("{}", str(folder)) for name, each in options.items()}
        result = run(folder, "--json", **{"lora": folder / "loras/hat.safetensors", **options})
        assert result.exit_code == code, result.output
        error = json.loads(result.stdout)["error"]
        value = value.replace("{}", str(folder)) if isinstance(value, str) else value
        assert (error["kind"], error["field"], error["value"], error["exit_code"]) == (kind, field, value, code)
        assert error["message"] and error["message"] in " ".join(result.stderr.split())
        assert error["allowed"] or code in (3, 4, 5) or value == "many"

    def test_what_the_options_may_be(self, folder):
        result = run(folder, "--json", "--lora", folder / "loras/hat.safetensors", steps=0)
        assert json.loads(result.stdout)["error"]["allowed"] == "from 1 to 1000"

    def test_hints(self, folder):
        refused(run(folder, "--lora", folder / "loras/het.safetensors"), 3, "did you mean hat.safetensors")
        refused(run(folder, prompt="<lora:cet:1>", lora_dir=folder / "loras"), 3, "did you mean cat")
        refused(run(folder, "--lora", folder / "loras"), 4, "is a folder; --lora takes a file")

    def test_a_lora_by_its_name_in_the_folder(self, folder):
        result = run(folder, "--json", "--lora", "cat:0.5", lora_dir=folder / "loras")
        assert json.loads(result.stdout)["loras"] == [
            {"file": str(folder / "loras/deep/cat.safetensors"), "weights": [0.5, 0.5], "parts": {}}
        ]
        refused(run(folder, "--lora", "cet", lora_dir=folder / "loras"), 3, "did you mean cat")

    def test_an_image_of_no_numbers_is_never_written(self, folder, tmp_path):
        """Finite numbers that overflow in the model: no black picture."""
        hat = folder / "loras/hat.safetensors"
        loud = damaged(hat, tmp_path / "loud.safetensors", lambda values: [v.fill_(1e30) for v in values.values()])
        result = run(folder, "--json", "--lora", loud, out=tmp_path / "out.png")
        refused(result, 5, "after step 1 the image holds NaN or infinity")
        assert json.loads(result.stdout)["error"]["kind"] == "UnsupportedError"
        assert not (tmp_path / "out.png").exists()

    def test_damage(self, folder, tmp_path):
        hat = folder / "loras/hat.safetensors"
        nan = damaged(hat, tmp_path / "nan.safetensors", write_number(".lora_down.weight", math.nan))
        refused(run(folder, "--lora", nan), 4, "nan.safetensors is damaged")

    def test_a_large_pool(self, folder):
        pool = ("--pool", "*", "--lora-dir", folder / "loras")
        refused(
            run(folder, *pool, pool_files=1), 2, r"holds 2 LoRAs .* '\*' brings 2 .* at most 1 LoRAs .*--pool-files"
        )
        refused(run(folder, *pool, pool_gib=1e-6), 2, "may hold .* at most 0.00 GiB in all")
        assert run(folder, *pool, pool_files=0, pool_gib=0).exit_code == 0

    @pytest.mark.parametrize(
        "error, said", [(RuntimeError("oh"), "unforeseen"), (MemoryError("oh"), "not enough memory")]
    )
    def test_the_unforeseen(self, folder, monkeypatch, error, said):
        def fail(*_):
            raise error

        monkeypatch.setattr("loratorio_ext.cli.find_model", fail)
        result = run(folder, "--json")
        refused(result, 1, f"{said}.*oh")
        report = json.loads(result.stdout)["error"]
        assert report["kind"] == type(error).__name__ and report["exit_code"] == 1

    def test_an_interrupt(self, folder, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("loratorio_ext.cli.find_model", interrupt)
        result = run(folder, "--json")
        assert result.exit_code == 130 and json.loads(result.stdout)["error"]["exit_code"] == 130

    def test_numbers_that_json_has_no_word_for(self):
        report = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": math.inf}, "d": "NaN"}
        assert json.loads(written(report)) == {"a": [None, [1.5, None]], "b": {"c": None}, "d": "NaN"}


class TestHelp:
    def shown(self, *arguments):
        result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0
        return " ".join(result.output.split())

    def test_version(self):
        assert self.shown("--version") == f"loratorio {__version__}"

    def test_samplers(self):
        text = self.shown("generate", "--help")
        for sampler in SAMPLERS:
            assert sampler in text

    def test_every_exit_code(self):
        text = self.shown("generate", "--help").partition("Exit codes:")[2]
        documented = (Path(__file__).parents[1] / "docs/diffusers.md").read_text()
        for code in (0, *EXIT_CODES.values(), UNFORESEEN, INTERRUPTED):
            assert re.search(rf"\b{code} [a-zA-Z]", text)
            assert f"\n| {code} |" in documented


class TestRefusals:
    def test_missing_files(self, folder):
        lora = ("--lora", folder / "loras/hat.safetensors")
        refused(run(folder, *lora, model=folder / "nowhere"), 3, "nowhere does not exist")
        refused(run(folder, "--lora", folder / "nowhere.safetensors:0.5"), 3, "nowhere.safetensors does not exist")
        refused(run(folder, prompt="<lora:dog:1>", lora_dir=folder / "loras"), 3, "no dog.safetensors in")
        refused(run(folder, prompt="<lora:dog:1>", lora_dir=folder / "nowhere"), 3, "nowhere is not a folder")

    def test_unreadable_files(self, folder):
        refused(run(folder, "--lora", folder / "broken.safetensors"), 4, "broken.safetensors is not a safetensors file")
        lora = ("--lora", folder / "loras/hat.safetensors")
        refused(run(folder, *lora, model=folder / "broken.safetensors"), 4, "not a safetensors file")
        refused(run(folder, *lora, model=folder / "loras"), 4, "no model_index.json")

    def test_another_architecture(self, folder):
        result = run(folder, "--lora", folder / "xl.safetensors")
        refused(result, 5, r"xl was made for another architecture .*StableDiffusionPipeline.*layers do not fit .*\(3, ")

    def test_another_kind_of_network(self, folder, tmp_path):
        save_file({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
        refused(run(folder, "--lora", tmp_path / "loha.safetensors"), 5, "loha .*hada_w1_a")
        refused(run(folder, prompt="<hypernet:a:1>"), 5, "<hypernet:a:1>")

    def test_no_lora(self, folder):
        refused(run(folder), 2, "no LoRA given")
        refused(run(folder, prompt="<lora:hat:1>"), 2, "hat.*--lora-dir")

    @pytest.mark.parametrize("size", ["60x64", "64x63", "64", "0x64", "-8x64", "64X64", "axb"])
    def test_sizes(self, folder, size):
        refused(run(folder, "--lora", folder / "loras/hat.safetensors", size=size), 2, "divisible by 8")

    @pytest.mark.parametrize("option", [option for option in OPTIONS if option.low is not None], ids=lambda o: o.name)
    def test_options_out_of_range(self, folder, option):
        result = run(folder, "--lora", folder / "loras/hat.safetensors", **{option.name: option.kind(option.high + 1)})
        refused(result, 2, f"{option.name} must be {re.escape(option.allowed)}")

    @pytest.mark.parametrize(
        "options",
        [
            {"method": "magic"},
            {"preset": "magic"},
            {"sampler": "magic"},
            {"sampler": "DDIM Karras"},
            {"start": 0.5, "end": 0.5},
            {"patch_size": "many"},
            {"steps": 0},
            {"cfg": 0},
            {"batch": 0},
            {"dtype": "int8"},
        ],
        ids=str,
    )
    def test_bad_options(self, folder, options):
        refused(run(folder, "--lora", folder / "loras/hat.safetensors", **options), 2, "")


class TestParsing:
    @pytest.mark.parametrize(
        "text, expected",
        [
            ("a.safetensors", ("a.safetensors", 1.0, 1.0)),
            ("a.safetensors:0.5", ("a.safetensors", 0.5, 0.5)),
            ("a.safetensors:-1:.25", ("a.safetensors", -1.0, 0.25)),
            ("C:/x/a.safetensors:2", ("C:/x/a.safetensors", 2.0, 2.0)),
            ("C:/x/a.safetensors", ("C:/x/a.safetensors", 1.0, 1.0)),
            ("a:b.safetensors:0", ("a:b.safetensors", 0.0, 0.0)),
            ("a.safetensors:1e-2", ("a.safetensors", 0.01, 0.01)),
            ("a.SAFETENSORS:2", ("a.SAFETENSORS", 2.0, 2.0)),
            ("robot:0.5:1", ("robot", 0.5, 1.0)),
            ("a.safetensors/b", ("a.safetensors/b", 1.0, 1.0)),
            ("", (".", 1.0, 1.0)),
        ],
    )
    def test_lora(self, text, expected):
        found = parse_lora(text)
        assert (str(found.path), found.te_weight, found.unet_weight) == expected and found.parts == {}

    @pytest.mark.parametrize(
        "items, weights, parts",
        [
            ("at=left", (1.0, 1.0), {"at": "left"}),
            ("0.5:at=Center:share=.5", (0.5, 0.5), {"at": "centre", "share": 0.5}),
            ("0.5:1:steps=0-0.50: base = 0", (0.5, 1.0), {"steps": "0-0.5", "base": False}),
            ("te=0.2:at=0.0-0-0.25-1:unet=3", (0.2, 3.0), {"at": "0-0-0.25-1"}),
            ("base=1:0.3", (0.3, 0.3), {"base": True}),
        ],
    )
    @pytest.mark.parametrize("file", ["a.safetensors", "C:/x/a.safetensors", "robot"])
    def test_parts(self, file, items, weights, parts):
        found = parse_lora(f"{file}:{items}")
        assert found == Requested(Path(file), *weights, parts)
        token = split_prompt(f"<lora:{found.path.stem}:{items}>")[1][0]
        assert token == found.token and split_prompt(str(token))[1] == [token]
        assert parts_of_tag(str(token)[1:-1].split(":")[1:]) == parts  # as a WebUI reads it

    @given(
        st.floats(0.01, 100),
        st.sampled_from(["left", "centre", "0-0.1-0.333333-1"]),
        st.sampled_from(["0-0.5", "0.1-1"]),
        st.booleans(),
    )
    def test_tokens_keep_what_they_say(self, share, at, steps, base):
        token = LoraToken("a", 0.5, 1.0, {"share": share, "at": at, "steps": steps, "base": base})
        assert split_prompt(f"x {token}") == ("x ", [token])

    @pytest.mark.parametrize(
        "part, said",
        [
            ("at=lft", "at in .*must be one of left, .*'lft'; did you mean left"),
            ("share=0", "share in .*a number from 0.01 to 100"),
            ("steps=0.5", "steps in .*first-last"),
            ("base=2", "base in .*0 or 1"),
            ("shrae=2", "has a part 'shrae'; did you mean share"),
            ("mask=x", "mask in .*option loras"),
            ("at=left:at=top", "at in .*said twice"),
        ],
    )
    def test_bad_parts(self, part, said):
        with pytest.raises(SettingsError, match=said) as caught:
            split_prompt(f"<lora:a:0.5:{part}>")
        assert f"<lora:a:0.5:{part}>" in str(caught.value)
        with pytest.raises(SettingsError, match=said) as caught:
            parse_lora(f"a.safetensors:0.5:{part}")
        assert f"--lora a.safetensors:0.5:{part}" in str(caught.value)

    def test_unknown_parts(self):
        for wrong, hint in (("steqs", "steps"), ("unte", "unet"), ("zzz", "(it may say te, unet, at, share")):
            with pytest.raises((SettingsError, UnsupportedError), match=re.escape(hint)):
                split_prompt(f"<lora:a:0.5:{wrong}=1>")
            with pytest.raises((SettingsError, UnsupportedError), match=f"--lora .*{wrong}"):
                parse_lora(f"a.safetensors:{wrong}=1")

    @pytest.mark.parametrize("weights", ["nan", "inf", "-inf", "1e6", "100.1", "abc", "", "1:", "1:x", "1_0", "1:2:3"])
    @pytest.mark.parametrize("file", ["a.safetensors", "C:/x/a.safetensors", "robot"])
    def test_weights_of_files_that_are_none(self, file, weights):
        with pytest.raises(SettingsError, match=re.escape(f"{file}:{weights}")) as caught:
            parse_lora(f"{file}:{weights}")
        assert caught.value.field == "lora" and caught.value.allowed

    def test_size(self):
        assert parse_size("512x768") == (512, 768)

    @pytest.mark.parametrize(
        "text, tokens",
        [
            ("<lora:a>", [LoraToken("a")]),
            ("<lora:a b-c:0.5>", [LoraToken("a b-c", 0.5, 0.5)]),
            ("<lora:a:0.5:0>", [LoraToken("a", 0.5, 0.0)]),
            ("<lora:a:unet=0.5>", [LoraToken("a", 1.0, 0.5)]),
            ("<lora:a:0.5:te=0.1>", [LoraToken("a", 0.1, 0.1)]),
            ("<lora:a:1><lora:b:2><lora:a:3>", [LoraToken("a", 3, 3), LoraToken("b", 2, 2)]),
            ("<lora:>", []),
        ],
    )
    def test_prompt(self, text, tokens):
        rest, found = split_prompt(f"x {text} y")
        assert found == tokens
        assert rest == ("x <lora:> y" if not tokens else "x  y")
        assert split_prompt(join_prompt("", found))[1] == tokens

    @pytest.mark.parametrize(
        "text",
        ["<lora:a:b>", "<lora:a:te=x>", "<lora:te=1>", "<lora:a:nan>", "<lora:a:inf>", "<lora:a:1e9>", "<lora:a:>"],
    )
    def test_bad_weights(self, text):
        with pytest.raises(SettingsError, match=text[1:-1]) as caught:
            split_prompt(text)
        assert caught.value.field == "prompt"

    @pytest.mark.parametrize(
        "text",
        ["<lora:a:1:1:8>", "<lora:a:1:dyn=8>", "<hypernet:a:1>", "<lora:a:1:lbw=0,1>", "<lora:a:1:start=5:stop=9>"],
    )
    def test_unsupported_tokens(self, text):
        with pytest.raises(UnsupportedError, match=text[1:-1]):
            split_prompt(text)

    def test_ambiguous_name(self, tmp_path):
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.safetensors").touch()
        with pytest.raises(SettingsError, match="'a' may be any of"):
            find_lora("a", tmp_path)

    def test_infotext_quotes_what_would_break_the_line(self):
        text = infotext("a\nb", "", {"Steps": 3, "Odd": 'x, y: "z"', "None": None})
        assert text == 'a\nb\nSteps: 3, Odd: "x, y: \\"z\\""'


def imported(path):
    """Top-level packages that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


class TestIndependence:
    ROOT = Path(__file__).parents[1]

    def test_only_the_standalone_files_import_the_standalone_packages(self):
        files = [*self.ROOT.glob("*.py"), *self.ROOT.glob("scripts/*.py"), *self.ROOT.glob("loratorio_ext/**/*.py")]
        users = {
            str(path.relative_to(self.ROOT))
            for path in files
            if {"compel", "diffusers", "lycoris", "peft", "transformers", "typer", "accelerate"} & set(imported(path))
        }
        standalone = {f"loratorio_ext/standalone/{name}.py" for name in ("options", "quiet")}
        hosts = {f"loratorio_ext/hosts/{name}.py" for name in ("diffusers", "diffusers_loras", "lycoris", "prompts")}
        assert users == hosts | {"loratorio_ext/cli.py"} | standalone

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--sampler", "magic"],
            ["--dtype", "int8"],
            ["--offload", "disk"],
            ["--size", "1x1"],
            ["--out", "out.jpg"],
            ["--pool", "magic"],
            ["--lora", "nowhere.safetensors"],
            ["--lora", "pyproject.toml"],
            ["--model", "nowhere"],
            ["--model", "README.md"],
            ["--config", "nowhere"],
        ],
        ids=" ".join,
    )
    def test_what_is_wrong_is_said_before_anything_slow_is_imported(self, arguments):
        code = """
import sys
from loratorio_ext.cli import app
try:
    app(sys.argv[1:])
finally:
    print("slow:", *({"torch", "diffusers", "transformers"} & set(sys.modules)))
"""
        given = ["generate", "--model", "tinyworld", "--prompt", "<lora:comet_quiet:1>", *arguments]
        done = subprocess.run([sys.executable, "-c", code, *given], cwd=self.ROOT, capture_output=True, text=True)
        assert done.returncode in (2, 3, 4) and done.stderr.startswith("LoRAtorio: "), done.stderr
        assert done.stdout.strip() == "slow:"

    def test_the_package_works_without_them(self):
        code = """
import sys
for name in ("diffusers", "peft", "safetensors", "transformers", "typer"):
    sys.modules[name] = None
import loratorio_ext, loratorio_ext.core, loratorio_ext.isolation, loratorio_ext.infotext, loratorio_ext.settings
try:
    import loratorio_ext.cli
except SystemExit as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=self.ROOT, capture_output=True, text=True, check=True)
        assert "pip install '.[standalone]'" in done.stdout
