"""The fixed recipe of the embedded pair: sizes, steps, seeds, and where its files go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import LlamaConfig

VOCABULARY = 4096
SEQUENCE = 512
SEED = 20261122


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One training run. ``tokens_per_step`` counts predicted tokens; learning rates follow
    warm-up, constant, linear decay to zero over the last ``decay_share`` of the steps."""

    steps: int
    rows: int  # sequences of SEQUENCE tokens a step
    muon_lr: float
    adamw_lr: float
    warmup_steps: int = 40
    decay_share: float = 0.5
    code_share: float = 0.7
    save_every: int = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    root: Path
    target: Stage = field(default_factory=lambda: Stage(steps=600, rows=16, muon_lr=0.02, adamw_lr=3e-3))
    draft: Stage = field(default_factory=lambda: Stage(steps=1000, rows=6, muon_lr=0.02, adamw_lr=3e-3, save_every=100))
    samples: int = 1024  # sequences the target writes for the draft to learn from

    def path(self, name: str) -> Path:
        return self.root / name


def model_config(role: str) -> LlamaConfig:
    """Llama architecture for ``target`` (about 11 M parameters) or ``draft`` (about 1.5 M).

    The draft is shallow and wide: its latency is its depth.
    """
    common = dict(
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        head_dim=64,
        rms_norm_eps=1e-5,
    )
    if role == "target":
        return LlamaConfig(
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            **common,
        )
    if role == "draft":
        return LlamaConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            **common,
        )
    raise ValueError(f"role must be 'target' or 'draft', not {role!r}")
