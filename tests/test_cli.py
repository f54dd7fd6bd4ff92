"""The command line: what it writes, what it reports, and how it refuses."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loratorio_ext.errors import SettingsError, UnsupportedError
from loratorio_ext.infotext import LoraToken, infotext, join_prompt, split_prompt
from loratorio_ext.record import read_shares
from loratorio_ext.settings import OPTIONS, Settings

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("typer")

import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from loratorio_ext.cli import app, find_lora, parse_lora, parse_size
from loratorio_ext.hosts.diffusers import composed, generators, load_lora, load_pipeline, scheduler_for
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
            assert sum(step["weights"]) == pytest.approx(1, abs=1e-4)
            assert step["similarity"]["spread"] >= 0
        assert all(seconds >= 0 for seconds in report["seconds"].values())

    @pytest.mark.parametrize("method", ["composite", "switch", "merge"])
    def test_other_methods(self, folder, method):
        result = run(folder, "--json", "--lora", folder / "loras/hat.safetensors", method=method)
        assert result.exit_code == 0, result.output
        assert all("similarity" not in step for step in json.loads(result.stdout)["steps"])

    def test_a_random_seed_is_reported(self, folder):
        result = run(folder, "--json", "--lora", folder / "loras/hat.safetensors", seed=-1)
        assert 0 <= json.loads(result.stdout)["images"][0]["seed"] < 2**32

    def test_every_option_of_the_table_is_there(self):
        shown = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        for option in OPTIONS[1:]:
            assert f"--{option.name.replace('_', '-')} " in shown
        assert "--enabled" not in shown


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
            ("a.safetensors:nan", ("a.safetensors:nan", 1.0, 1.0)),
        ],
    )
    def test_lora(self, text, expected):
        path, te_weight, unet_weight = parse_lora(text)
        assert (str(path), te_weight, unet_weight) == expected

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

    @pytest.mark.parametrize("text", ["<lora:a:b>", "<lora:a:te=x>", "<lora:te=1>"])
    def test_bad_weights(self, text):
        with pytest.raises(SettingsError, match=text[1:-1]):
            split_prompt(text)

    @pytest.mark.parametrize("text", ["<lora:a:1:1:8>", "<lora:a:1:dyn=8>", "<hypernet:a:1>"])
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
            if {"diffusers", "peft", "transformers", "typer", "accelerate"} & set(imported(path))
        }
        assert users == {"loratorio_ext/hosts/diffusers.py", "loratorio_ext/cli.py"}

    def test_the_package_works_without_them(self):
        code = """
import sys
for name in ("diffusers", "peft", "transformers", "typer"):
    sys.modules[name] = None
import loratorio_ext, loratorio_ext.core, loratorio_ext.isolation, loratorio_ext.infotext, loratorio_ext.settings
try:
    import loratorio_ext.cli
except SystemExit as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=self.ROOT, capture_output=True, text=True, check=True)
        assert "sd-webui-loratorio[standalone]" in done.stdout
