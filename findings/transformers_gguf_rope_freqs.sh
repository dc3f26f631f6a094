#!/usr/bin/env bash
# transformers 5.24.0: the tensor `rope_freqs.weight` of a GGUF file is not read, so Llama 3.1 and later lose their scaling.
#
# llama.cpp's converter writes the scaling of Llama 3.1 (`rope_type: llama3`) as factors of the rotary frequencies into
# that tensor and into no key of the header. transformers loads such a file without a warning, with the frequencies of
# plain rotary embeddings: every position is then encoded in another way than in the original model. Nothing in
# modeling_gguf_pytorch_utils.py or integrations/ggml.py names the tensor.
#
# Output seen (CPU, Python 3.11):
#   factors in the file: [1.0, 1.0, 8.0, 8.0]
#   rope type: default
#   frequencies loaded over plain ones: [1.0, 1.0, 1.0, 1.0]
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  "transformers==5.24.0" "torch==2.13.0" "accelerate==1.15.0" "gguf==0.19.0" "numpy==2.3.5"

cat >"$folder/run.py" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, GgufConfig

folder = Path(sys.argv[1])
hidden, heads, tokens = 32, 4, [chr(number) for number in range(33, 97)]
writer = GGUFWriter(folder / "tiny.gguf", "llama")
writer.add_context_length(64)
writer.add_embedding_length(hidden)
writer.add_block_count(1)
writer.add_feed_forward_length(hidden)
writer.add_head_count(heads)
writer.add_head_count_kv(heads)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_freq_base(10000.0)
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("gpt2")
writer.add_token_list(tokens)
writer.add_token_types([TokenType.NORMAL] * len(tokens))
writer.add_token_merges([])
factors = np.array([1, 1, 8, 8], dtype=np.float32)
writer.add_tensor("rope_freqs.weight", factors)
writer.add_tensor("token_embd.weight", np.ones((len(tokens), hidden), dtype=np.float32))
writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
    writer.add_tensor(f"blk.0.{name}.weight", np.eye(hidden, dtype=np.float32))
for name in ("attn_norm", "ffn_norm"):
    writer.add_tensor(f"blk.0.{name}.weight", np.ones(hidden, dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file="tiny.gguf", quantization_config=GgufConfig(dequantize=True)
)
plain = 10000.0 ** (-np.arange(0, hidden // heads, 2) / (hidden // heads))
ratio = (model.model.rotary_emb.inv_freq.numpy() / plain).round(4).tolist()
print("factors in the file:", factors.tolist())
print("rope type:", model.config.rope_parameters["rope_type"])
print("frequencies loaded over plain ones:", ratio)
assert ratio == [1.0] * 4, "transformers behaves differently now"
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder"
