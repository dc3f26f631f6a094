"""The fixed recipe of the embedded pair: sizes, steps, seeds, and where its files go."""

from __future__ import annotations

from dataclasses import dataclass
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
    first_step: int = 0  # steps of the generation before: new data follows that which was seen


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A pair trained from scratch, or grown from the generation before it: wider MLPs whose new
    units first add nothing (:func:`ssd.testing.models.widen.widen`), so no learning is lost. The small
    one learns most of the language at half the cost a token."""

    name: str  # the folder below the root
    units: dict[str, int]  # MLP width of each role
    target: Stage
    draft: Stage
    samples: int  # sequences the target writes for the draft to learn from


GENERATIONS = (
    Generation(
        name="small",
        units={"target": 1024, "draft": 512},
        target=Stage(steps=600, rows=16, muon_lr=0.02, adamw_lr=3e-3),
        draft=Stage(steps=1000, rows=6, muon_lr=0.02, adamw_lr=3e-3, save_every=100),
        samples=1024,
    ),
    Generation(
        name="full",
        units={"target": 1920, "draft": 768},
        target=Stage(steps=440, rows=16, muon_lr=0.015, adamw_lr=2e-3, decay_share=0.6, first_step=600),
        draft=Stage(steps=1600, rows=6, muon_lr=0.015, adamw_lr=2e-3, decay_share=0.6, save_every=100, first_step=1000),
        samples=2048,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """Continuations by the finished target, with its distributions, for the last stage of the draft."""

    shards: int = 40
    rows: int = 96  # continuations of a shard
    shortest_prompt: int = 32
    longest_prompt: int = 96
    new_tokens: int = 96
    support: int = 32  # likeliest tokens kept of every distribution
    fewest_share: float = 0.08  # a shard ends when fewer of its rows still go on
    # One shard after the other; the cycles' lengths have no common factor.
    kinds: tuple[str, ...] = ("code", "code", "code", "prose")
    temperatures: tuple[float, ...] = (0.0, 1.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Polishing:
    """The draft's last stage. Rows hold SEQUENCE tokens of continuations, laid end to end.

    The first 450 steps of the shipped draft followed the learning rates of a run of 600.
    """

    steps: int = 800
    rows: int = 4
    muon_lr: float = 0.01
    adamw_lr: float = 1.5e-3
    warmup_steps: int = 40
    decay_share: float = 0.7
    save_every: int = 175
    first_step: int = 0
    context: int = 8  # first positions of a continuation that are not learnt: the target, too, only guesses
    kept: float = 0.5  # share of the weights it started from in the weights it ends with
    acceptance: float = 0.5  # share of the loss that is acceptance, the rest is forward KL


TEACHING = Teaching()
POLISHING = Polishing()


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    root: Path
    generation: Generation = GENERATIONS[-1]

    def path(self, name: str) -> Path:
        return self.root / self.generation.name / name

    def polished(self, name: str) -> Path:
        """Returns a path of the draft's last stage."""
        return self.root / "polished" / name

    def grown_from(self) -> Recipe | None:
        """Returns the recipe of the generation before, if there is one."""
        place = GENERATIONS.index(self.generation)
        return Recipe(root=self.root, generation=GENERATIONS[place - 1]) if place else None


def model_config(role: str, units: int) -> LlamaConfig:
    """Llama architecture for ``target`` or ``draft`` with MLPs of ``units``.

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
            intermediate_size=units,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            **common,
        )
    if role == "draft":
        return LlamaConfig(
            hidden_size=192,
            intermediate_size=units,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            **common,
        )
    raise ValueError(f"role must be 'target' or 'draft', not {role!r}")
