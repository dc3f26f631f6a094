"""The draft's last training stage: what is packed and what is minimised."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.pair.polish import Lessons, loss_of
from scripts.pair.recipe import Polishing, Teaching
from scripts.pair.teacher import write_shard

VOCABULARY = 48
STAGE = Polishing(rows=2, context=0)


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def lessons(tmp_path) -> Lessons:
    teaching = Teaching(rows=24, new_tokens=40, support=VOCABULARY - 1)
    for index, temperature in enumerate((0.0, 1.0)):
        prompts = torch.randint(1, VOCABULARY, (teaching.rows, 9 + index))
        save_file(write_shard(model(0), prompts, temperature, teaching, index), tmp_path / f"{index}.safetensors")
    return Lessons(tmp_path, STAGE)


def full(target: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities ``[length, V]`` of one continuation alone."""
    with torch.no_grad():
        return target(ids[None]).logits[0].log_softmax(-1)


def test_shards_hold_the_targets_distributions_and_its_own_words(lessons):
    target = model(0)
    for content in lessons.shards:
        prompt = int(content["prompt"])
        for line, length in enumerate(content["lengths"].tolist()):
            ids = content["ids"][line, : length + 1].long()
            expected = full(target, ids[:-1])
            values = expected.gather(-1, content["top"][line, :length].long())
            assert torch.allclose(values, content["logprobs"][line, :length].float(), atol=2e-2)
            if content["temperature"] == 0:
                assert ids[prompt:].tolist() == expected[prompt - 1 :].argmax(-1).tolist()


def test_an_epoch_shows_every_continuation_once(lessons):
    assert sorted(s for row in lessons._pack(3) for s in row) == list(range(len(lessons.samples)))


def test_the_loss_is_kl_and_rejection_of_every_continuation_alone(lessons):
    target, draft, batch = model(0), model(1), lessons.step(0)
    divergence, rejected = [], []
    for row in range(STAGE.rows):
        for name in range(int(batch.owner[row].max()) + 1):
            mine = batch.owner[row] == name
            p, q = (full(m, batch.ids[row, mine]) for m in (target, draft))
            divergence.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
            variation = (p.exp() - q.exp()).abs().sum(-1) / 2
            argmax = -q.gather(-1, p.argmax(-1, keepdim=True))[:, 0]
            rejected.append(torch.where(batch.greedy[row, mine], argmax, variation))
    assert batch.greedy.any()
    for share, expected in ((0.0, divergence), (1.0, rejected)):
        with torch.no_grad():
            assert loss_of(draft, batch, share).item() == pytest.approx(torch.cat(expected).mean().item(), rel=5e-3)
