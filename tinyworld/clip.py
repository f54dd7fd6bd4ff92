"""Writes the folder with CLIP's tokenizer and the tiny text encoder's configuration.

    python clip.py bpe_simple_vocab_16e6.txt.gz

The vocabulary is OpenAI CLIP's (MIT licence); the PyPI package `open_clip_torch` carries the file.
"""

import gzip
import json
import sys
from pathlib import Path

import model

END = "<|endoftext|>"


def letters() -> list[str]:
    """The 256 printable stand-ins for bytes, in CLIP's order: those printable by themselves come first."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def main(bpe: Path) -> None:
    """Writes vocab.json, merges.txt and the configurations."""
    lines = gzip.decompress(bpe.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    tokens = [*letters(), *(c + "</w>" for c in letters()), *("".join(m.split()) for m in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", END])}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": model.TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    model.CLIP.mkdir(parents=True, exist_ok=True)
    # A token a line: as one line of a megabyte it would drown every search of the repository.
    text = json.dumps(vocabulary, ensure_ascii=False, indent=0)
    (model.CLIP / "vocab.json").write_text(text + "\n", encoding="utf-8")
    (model.CLIP / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (model.CLIP / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    model.text_encoder().config.save_pretrained(model.CLIP)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
