import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssd.testing.models.tiny import (
    ARCHITECTURES,
    EOS_ID,
    RECURRENT_ARCHITECTURES,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
)

PROMPT = torch.tensor([[10, 20, 30, 40, 50]])


def greedy(model, ids, count):
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_wanders_and_gaps_are_wide(architecture):
    model = tiny_model(architecture)
    ids = greedy(model, PROMPT, 20)
    assert len(set(ids[0, 5:].tolist())) > 3
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape == (1, 25, 128)
    best = logits.topk(2, dim=-1).values
    # Far above fp32 rounding at every position.
    assert (best[..., 0] - best[..., 1]).min() > 1e-3
    assert (best[..., 0] - best[..., 1]).median() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_position_matters(architecture):
    """The first of 12 tokens, within two windows, changes the last one's logits."""
    model = tiny_model(architecture)
    ids = torch.arange(12).unsqueeze(0) + 5
    other = ids.clone()
    other[0, 0] = 99
    with torch.no_grad():
        assert (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max() > 1e-3


def test_a_short_window_hides_the_past():
    model = tiny_model("mistral")
    ids = torch.arange(20).unsqueeze(0) + 5
    other = ids.clone()
    other[0, 0] = 99
    with torch.no_grad():
        assert torch.equal(model(ids).logits[0, -1], model(other).logits[0, -1])


@pytest.mark.parametrize("architecture", ARCHITECTURES + RECURRENT_ARCHITECTURES)
def test_saved_folder_loads(architecture, tmp_path):
    save_tiny(tmp_path, architecture, seed=3)
    assert list(tmp_path.glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = model(PROMPT).logits
        assert logits.shape == (1, 5, 128)
        assert torch.equal(logits, tiny_model(architecture, seed=3)(PROMPT).logits)
    assert model.config.eos_token_id == EOS_ID
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return the tin hat\n"
    assert tokenizer.encode(text) == tiny_tokenizer(128).encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.eos_token_id, len(tokenizer)) == (EOS_ID, 128)


def test_seed_dtype_and_random_state():
    before = torch.random.get_rng_state()
    first, again, other = (tiny_model("llama", seed=s) for s in (1, 1, 2))
    half = tiny_model("llama", seed=1, dtype=torch.bfloat16)
    assert torch.equal(before, torch.random.get_rng_state())
    weight = first.lm_head.weight
    assert torch.equal(weight, again.lm_head.weight)
    assert not torch.equal(weight, other.lm_head.weight)
    assert torch.equal(weight.to(torch.bfloat16), half.lm_head.weight)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_overrides():
    model = tiny_model("gemma3", num_hidden_layers=3, vocab_size=200)
    assert len(model.model.layers) == len(model.config.layer_types) == 3
    assert model(PROMPT).logits.shape[-1] == 200


def test_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="lama"):
        tiny_model("lama")


@pytest.mark.parametrize("size", [16, 101, 128, 320, 512, 4096])
def test_tokenizer_size(size):
    tokenizer = tiny_tokenizer(size)
    assert len(tokenizer) == tokenizer.vocab_size == size
    ids = tokenizer.encode("Some text, 3 + 4.")
    assert max(ids) < size
    if size >= 101:
        assert tokenizer.decode(ids) == "Some text, 3 + 4."
    if size >= 324:
        assert tokenizer.decode(tokenizer.encode("naïve → 日本 🐍")) == "naïve → 日本 🐍"


def test_padded_vocabulary(tmp_path):
    save_tiny(tmp_path, "qwen2", vocab_size=160, tokenizer_vocab_size=128)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 128
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 160
