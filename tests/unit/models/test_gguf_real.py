"""SmolLM2 and Gemma 3 straight from the GGUF files in their packages: weights and tokenizers are transformers'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from ssd.config.model_paths import resolve_model_path
from ssd.errors import ModelError
from ssd.models.checkpoints.gguf_file import GgufFile
from ssd.models.checkpoints.loading import load_model, load_tokenizer, read_config
from ssd.models.cpu.blocks_linear import BlocksEmbedding, BlocksLinear
from ssd.models.runner import can_compile
from ssd.testing.real import PACKAGED, installed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
HOSTILE = (
    "",
    " ",
    "   leading, trailing   ",
    "a\n\n\n\tb\r\nc\u2028d\u00a0e",
    "<|im_start|>user\nHi<|im_end|> <bos>x<eos> <start_of_turn>model\n<end_of_turn><mask><pad>",
    "<|im_st art|> <|endoftext|> <unused99> [multimodal]",
    "naïve façade — “quotes” ‘single’ … ©®™ ½ ² ﬁ ﷺ",
    "日本語のテキスト。中文文本，한국어 हिन्दी العربية עברית ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 \U0001f9ff",
    "e\u0301 vs \u00e9, a\u0308\u0323, \u200b zero \u200d width \ufeff",
    "\x00\x01\x02\x7f\x80\x9f",
    "x" * 500,
    "▁▁ ▁a Ġb Ċ",
    "1234567890 3.14159 1,000,000 0xDEADBEEF ١٢٣ 五",
    "def f(x):\n\treturn {'a': [x**2, \"b\\n\"]}  # it's\n    \n",
    "don't I'll we've THEY'RE o'clock",
    "https://example.com/a?b=c&d=%20#e user@host.org C:\\path\\file",
)


@pytest.fixture(scope="module", params=sorted(PACKAGED))
def file(request: pytest.FixtureRequest) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    with pytest.MonkeyPatch.context() as patch:
        try:
            patch.syspath_prepend(str(installed(request.param)))
        except ModelError as error:
            pytest.skip(str(error))
        return resolve_model_path(PACKAGED[request.param])


def test_tokenizer_is_that_of_transformers(file: Path) -> None:
    reference = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = load_tokenizer(file)
    size = read_config(file).get_text_config().vocab_size
    assert ours.get_vocab() == {token: id for token, id in reference.get_vocab().items() if id < size}
    for text in HOSTILE:
        for special in (True, False):
            ids = reference(text, add_special_tokens=special).input_ids
            assert ours(text, add_special_tokens=special).input_ids == ids, text
            assert ours.decode(ids) == reference.decode(ids), text
            assert ours.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True), text
    assert ours.chat_template == reference.chat_template
    assert ours.all_special_ids == [id for id in reference.all_special_ids if id < size]


@pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")
def test_packed_weights_are_those_of_transformers(file: Path) -> None:
    reference = load_model(file, dtype="float32", device="cpu", max_positions=64)
    model = load_model(file, dtype="float32", device="cpu", max_positions=64, weights="packed")
    expected = dict(reference.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, BlocksLinear | BlocksEmbedding):
            outputs, depth = expected[f"{name}.weight"].shape
            for rows in torch.arange(outputs).split(16384):
                found = torch.ops.ssd.blocks_rows(rows, module.packed, module.kind, outputs, depth)
                assert torch.equal(found, expected[f"{name}.weight"][rows]), name
    assert not [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name, value in model.named_parameters():
        assert name.endswith("packed") or torch.equal(value, expected[name]), name
    held = sum({weight.data_ptr(): weight.nbytes for weight in model.parameters()}.values())
    stored = sum(tensor.nbytes for tensor in GgufFile.read(file).tensors.values())
    assert held < 1.03 * stored
    ids = torch.tensor([load_tokenizer(file)("The capital of France is Paris, and the capital of Italy is").input_ids])
    with torch.no_grad():
        ours, theirs = model(ids).logits, reference(ids).logits
    assert (ours - theirs).abs().max() < 1e-3
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
