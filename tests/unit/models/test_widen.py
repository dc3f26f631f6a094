import pytest
import torch
from transformers import LlamaConfig

from ssd.errors import ModelError
from ssd.testing.models.tiny import tiny_model
from ssd.testing.models.widen import head_places, parameter_count, sizes_for, widen

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(5))
# original heads, kv heads → new heads, kv heads
HEADS = [
    (4, 2, 4, 2),  # as they were
    (4, 2, 8, 4),  # same group
    (4, 2, 16, 4),  # larger group
    (6, 2, 32, 8),  # the embedded target's ratio to a common one
    (3, 1, 12, 2),
    (4, 4, 8, 8),  # no grouping
    (6, 2, 16, 8),  # smaller group: each kv head is copied
    (4, 1, 8, 8),  # group to no grouping
    (6, 1, 8, 2),  # a group of 6 in groups of 4: the second copy is partly used
]


def sizes(**changes):
    return (
        dict(hidden_size=192, intermediate_size=224, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=2)
        | changes
    )


def greedy(model, ids, count):
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count
        )


def assert_same(model, wide):
    with torch.no_grad():
        torch.testing.assert_close(wide(IDS).logits, model(IDS).logits, atol=1e-4, rtol=0)
    assert torch.equal(greedy(wide, IDS, 64), greedy(model, IDS, 64))


@pytest.mark.parametrize("heads, kv, new_heads, new_kv", HEADS)
def test_heads(heads, kv, new_heads, new_kv):
    model = tiny_model("llama", seed=heads, hidden_size=96, num_attention_heads=heads, num_key_value_heads=kv)
    wide = widen(model, **sizes(num_attention_heads=new_heads, num_key_value_heads=new_kv))
    assert_same(model, wide)
    assert wide.model.layers[0].self_attn.q_proj.out_features == new_heads * 16


@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"rms_norm_eps": 0.1}],
    ids=["plain", "tied", "biases", "large-eps"],
)
@pytest.mark.parametrize("hidden", [64, 96, 256])
def test_widths_layers_and_variants(overrides, hidden):
    model = tiny_model("llama", **overrides)
    wide = widen(model, **sizes(hidden_size=hidden, num_hidden_layers=5))
    assert_same(model, wide)
    assert wide.config.num_hidden_layers == len(wide.model.layers) == 5
    tied = wide.lm_head.weight.data_ptr() == wide.model.embed_tokens.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings


def test_same_sizes_are_the_same_model():
    model = tiny_model("llama", seed=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same = widen(model, **{name: getattr(model.config, name) for name in sizes()})
    for name, value in same.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in model.state_dict().items():  # and the original was left alone
        assert torch.equal(value, before[name]), name


def test_bfloat16_keeps_the_new_channels_exactly_zero():
    model = tiny_model("llama", seed=2)
    wide = widen(model, **sizes(hidden_size=256, num_hidden_layers=3), dtype=torch.bfloat16)
    assert {p.dtype for p in wide.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        states = wide(IDS, output_hidden_states=True).hidden_states
    for state in states:
        assert state[..., 64:].abs().max() == 0
        assert state[..., :64].abs().max() > 0
    # Four times the width: norm weights are halved, which bf16 does without rounding.
    expected = model.model.norm.weight.to(torch.bfloat16) / 2
    assert torch.equal(wide.model.norm.weight[:64], expected)


def test_saved_and_loaded(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    wide = widen(model, **sizes())
    wide.save_pretrained(tmp_path)
    assert_same(model, type(wide).from_pretrained(tmp_path).eval())


def test_the_callers_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    widen(tiny_model("llama"), **sizes())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 32}, "shrink hidden_size from 64 to 32"),
        ({"num_hidden_layers": 1}, "shrink num_hidden_layers"),
        ({"num_attention_heads": 9}, "multiple of new kv heads"),
        ({"num_attention_heads": 20}, "multiple of num_attention_heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ModelError, match=message):
        widen(tiny_model("llama"), **sizes(**changes))


def test_groups_that_do_not_fit():
    with pytest.raises(ModelError, match="at least 4 kv heads"):
        head_places(6, 2, 6, 3)  # groups of 2: each old group of 3 needs two kv heads


def test_only_llama():
    with pytest.raises(ModelError, match="qwen2"):
        widen(tiny_model("qwen2"), **sizes())


@pytest.mark.parametrize("role, parameters", [("target", 1e9), ("target", 8e9), ("draft", 1e8)])
def test_sizes_for_the_embedded_pair(role, parameters):
    common = dict(tie_word_embeddings=True, vocab_size=4096, head_dim=64)
    shape = dict(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2
    )
    if role == "draft":
        shape = dict(
            hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1
        )
    config = LlamaConfig(**common | shape)
    chosen = sizes_for(config, parameters)
    assert abs(parameter_count(config, **chosen) / parameters - 1) < 0.03
    head_places(
        config.num_attention_heads,
        config.num_key_value_heads,
        chosen["num_attention_heads"],
        chosen["num_key_value_heads"],
    )
    shallow = sizes_for(config, parameters, num_hidden_layers=config.num_hidden_layers * 4)
    assert shallow["num_hidden_layers"] == config.num_hidden_layers * 4


def test_parameter_count_is_exact():
    for tied in (True, False):
        model = tiny_model("llama", tie_word_embeddings=tied)
        assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())


def test_too_few_parameters():
    with pytest.raises(ModelError, match="never made smaller"):
        sizes_for(tiny_model("llama").config, 1000)
