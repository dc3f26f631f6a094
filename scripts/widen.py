"""Widens a Llama-architecture model: the same tokens at the cost of a larger model.

python scripts/widen.py ssd/data/embedded/target build/wide/target --parameters 1e9
python scripts/widen.py ssd/data/embedded/draft build/wide/draft --parameters 1e8 --layers 2 --hidden-size 2048
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssd.errors import ModelError
from ssd.testing.models.widen import sizes_for, widen

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
DTYPES = ("float32", "bfloat16", "float16")


def copy_tokenizer(source: Path, destination: Path) -> list[str]:
    """Copies the files of a tokenizer; returns their names."""
    files = sorted({path for pattern in TOKENIZER_FILES for path in source.glob(pattern)})
    for path in files:
        shutil.copyfile(path, destination / path.name)
    return [path.name for path in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", type=Path, help="model folder")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write")
    parser.add_argument("--parameters", type=float, required=True, help="approximate number, for example 1e9")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--hidden-size", type=int, help="by default chosen from --parameters")
    parser.add_argument("--layers", type=int, help="by default chosen from --parameters")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer to copy; by default SRC")
    args = parser.parse_args()
    if not (args.source / "config.json").exists():
        raise ModelError(f"{args.source} holds no model (no config.json)")
    config = AutoConfig.from_pretrained(args.source)
    if config.model_type != "llama":
        raise ModelError(f"only Llama-architecture models can be widened, not {config.model_type!r}")
    sizes = sizes_for(config, args.parameters, hidden_size=args.hidden_size, num_hidden_layers=args.layers)
    model = LlamaForCausalLM.from_pretrained(args.source, dtype="auto", use_safetensors=True)
    wide = widen(model, **sizes, dtype=getattr(torch, args.dtype))
    wide.save_pretrained(args.destination)
    files = copy_tokenizer(args.tokenizer or args.source, args.destination)
    print("sizes: " + ", ".join(f"{name} {value}" for name, value in sizes.items()))
    for path, which in ((args.source, model), (args.destination, wide)):
        count = sum(p.numel() for p in which.parameters())
        gigabytes = sum(p.numel() * p.element_size() for p in which.parameters()) / 1e9
        print(f"{path}: {count:,} parameters, {gigabytes:.2f} GB in {str(which.dtype).removeprefix('torch.')}")
    print(f"tokenizer files: {', '.join(files) or 'none found (give --tokenizer)'}")


if __name__ == "__main__":
    try:
        main()
    except ModelError as error:
        sys.exit(f"error: {error}")
