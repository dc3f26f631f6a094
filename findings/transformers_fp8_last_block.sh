#!/usr/bin/env bash
# transformers 5.23.0: FP8 weights whose last block is smaller than the others are dequantised with the wrong scales.
#
# A fine-grained FP8 checkpoint has a scale for every block of `weight_block_size` numbers; a size that is no multiple of
# the block leaves a smaller last block. `Fp8Dequantize` does not read the block size: it divides the weight evenly among
# its scales. 96 rows with blocks of 64 become 48 and 48 where the checkpoint has 64 and 32, and nothing says so. Where
# the division has a remainder, loading fails instead. Seen in integrations/finegrained_fp8.py (`_dequantize_one`).
#
# Output seen (CPU, Python 3.11):
#   stored: rows 0..63 are 1.0, rows 64..95 are 8.0
#   loaded: rows 0..47 are 1.0, rows 48..95 are 8.0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  "transformers==5.23.0" "torch==2.13.0" "accelerate==1.15.0" "numpy==2.3.5"

cat >"$folder/run.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1]) / "model"
size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(folder)
stored = load_file(folder / "model.safetensors")
name = "model.layers.0.mlp.up_proj.weight"
stored[name] = torch.ones(96, 64).to(torch.float8_e4m3fn)
stored[f"{name}_scale_inv"] = torch.tensor([[1.0], [8.0]])
save_file(stored, folder / "model.safetensors", {"format": "pt"})
config = json.loads((folder / "config.json").read_text())
config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 64]}
(folder / "config.json").write_text(json.dumps(config))

model = AutoModelForCausalLM.from_pretrained(
    folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
)
rows = model.get_parameter(name)[:, 0]
border = int((rows == 1).sum())
print("stored: rows 0..63 are 1.0, rows 64..95 are 8.0")
print(f"loaded: rows 0..{border - 1} are {rows[0]}, rows {border}..95 are {rows[-1]}")
assert border == 48, "transformers behaves differently now"
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder"
