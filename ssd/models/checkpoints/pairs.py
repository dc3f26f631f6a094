"""Pairs of models: which token ids of a target its draft can be fed, and can draft.

A draft reads and writes its own ids. Everything else in the draft worker (candidates, noise, grammars, n-grams, the
keys' positions) uses the target's, and a ``VocabularyMap`` leads from one to the other at the edge of the model:

* **Fed**: every token of the target is fed as exactly one token of the draft, so that a sequence has the same positions
  in both. A token that the draft does not have is fed as an approximation (see ``_Fed``). That may cost acceptance. It
  cannot change tokens, since no verification rule assumes anything about how a draft computes its distribution.
* **Drafted**: the draft's logits of the tokens that both have become the target's, and all others are -inf. Their
  softmax is the draft's distribution renormalised over the common tokens, which is what candidates are drawn from and
  verified with. A token that the draft does not have is never drafted.

One map serves different tokenizers (``draft.vocabulary: shared``), pairs that differ in added tokens, and drafts whose
output head is trimmed to a part of the vocabulary. This is the token-level intersection of Timor et al. 2025 (arXiv
2502.05202), as in vLLM's ``use_heterogeneous_vocab``, with approximations in place of an unknown token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from ...errors import ModelError, first_line
from .loading import load_tokenizer, read_config
from .support import usable_positions
from .vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class VocabularyMap:
    """From the target's token ids to the draft's, and back."""

    to_draft: Tensor
    """``[V]`` int64, the draft's token that is fed for each of the target's."""
    to_target: Tensor
    """``[V_draft]`` int64, the target's token of each row of the draft's output head; -1: none."""

    @property
    def shared(self) -> int:
        """How many of the target's tokens can be drafted."""
        return int((self.to_target >= 0).sum())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pairing:
    """What the vocabularies of a target and its draft come to."""

    size: int
    """V: the target's token ids are below it."""
    map: VocabularyMap | None
    """None: the draft's ids are the target's."""

    @classmethod
    def alone(cls, tokenizer: Any, rows: int) -> Pairing:
        """Returns that of a target without a draft, whose output head has so many rows. Raises: ModelError."""
        return cls(size=_size(tokenizer.get_vocab(), "target", rows), map=None)


def paired_with(folder: Path, target: Any, target_rows: int, *, shared: bool) -> Pairing:
    """Compares the vocabulary of the draft in ``folder`` with its target's; arguments and errors as for ``paired``."""
    return paired(
        target,
        load_tokenizer(folder),
        target_rows=target_rows,
        draft_rows=read_config(folder).get_text_config().vocab_size,
        shared=shared,
        kept=kept_tokens(folder),
    )


MASKS = ("pard_token", "ptd_token_id")
"""Keys of a parallel draft's ``config.json`` that name its mask token, as vLLM reads them."""


def mask_token(draft: PretrainedConfig, wanted: bool | int | str) -> int | None:
    """Returns the token that a parallel draft is fed for candidates that are not known yet, in its own ids; None if the
    draft is not parallel.

    Args:
        draft: its configuration.
        wanted: ``draft.parallel``.

    Raises:
        ModelError: no mask token is known, or the draft has no such token.
    """
    if wanted is False:
        return None
    text = draft.get_text_config()
    named = [getattr(text, key, None) for key in MASKS]
    given = wanted if type(wanted) is int else next((token for token in named if token is not None), None)
    if given is None and wanted is True:
        raise ModelError(f"draft.parallel: config.json names no mask token ({' or '.join(MASKS)}); give its id instead")
    if given is not None and not (type(given) is int and 0 <= given < text.vocab_size):
        raise ModelError(f"the draft's mask token {given} is none of its {text.vocab_size} tokens")
    return given


def shorter_context(draft: PretrainedConfig, tokens: int) -> int | None:
    """Returns how many positions a draft knows, if that is fewer than ``tokens``; otherwise None."""
    positions = usable_positions(draft.get_text_config())
    return positions if positions is not None and positions < tokens else None


def paired(
    target: Any,
    draft: Any,
    *,
    target_rows: int,
    draft_rows: int,
    shared: bool = False,
    kept: Sequence[int] | None = None,
) -> Pairing:
    """Compares the vocabularies of a pair.

    Heads that are padded beyond the tokenizer (Qwen's 151936 and 152064 over one vocabulary) are allowed: the padding
    is cut off on both sides.

    Args:
        target: the target's tokenizer.
        draft: the draft's tokenizer.
        target_rows: rows of the target's output head.
        draft_rows: rows of the draft's input embedding, and of its output head unless that is trimmed.
        shared: allow different tokenizers.
        kept: the ids, in the draft's tokenizer, of the rows of a trimmed output head; see ``kept_tokens``.

    Raises:
        ModelError: the tokenizers do not fit, or a head is smaller than its tokenizer.
    """
    size = _size(target.get_vocab(), "target", target_rows)
    if kept is None:
        _size(draft.get_vocab(), "draft", draft_rows)
        if target.get_vocab() == draft.get_vocab():
            return Pairing(size=size, map=None)
    ours, theirs = Vocabulary.of(target), Vocabulary.of(draft)
    if kept is not None and max(kept, default=0) >= theirs.size:
        raise ModelError(f"the trimmed vocabulary has token {max(kept)}; the draft's tokenizer has {theirs.size}")
    conflict = _conflict(ours, theirs)
    if conflict is None:
        counterparts = {token: token for name, token in ours.ids.items() if theirs.ids.get(name) == token}
    else:
        counterparts = _counterparts(ours, theirs)
        if not shared:
            raise ModelError(
                f"draft and target have different tokenizers: token {conflict!r} is {ours.ids.get(conflict)} in the "
                f"target and {theirs.ids.get(conflict)} in the draft; set draft.vocabulary=shared to draft the "
                f"{len(counterparts)} tokens that both have ({len(counterparts) / len(ours.ids):.0%} of the target's), "
                "or use a draft trained with the target's tokenizer"
            )
    if not counterparts:
        raise ModelError("draft and target have no token in common; use another draft")
    return Pairing(size=size, map=_map(ours, theirs, counterparts, conflict is None, draft_rows, kept))


def _size(ids: Mapping[str, int], name: str, rows: int) -> int:
    """Returns one more than the largest id. Raises: ModelError: the output head has fewer rows."""
    size = max(ids.values()) + 1  # ids need not be contiguous
    if rows < size:
        raise ModelError(f"the {name}'s output head has {rows} rows for a tokenizer of {size} tokens")
    return size


def _conflict(target: Vocabulary, draft: Vocabulary) -> str | None:
    """Returns the first token, by id, because of which two tokenizers are different; None if there is none. Tokens
    added to one of them do not count, and neither do special tokens of other names under the same id."""

    def apart(token: int, one: Vocabulary, other: Vocabulary) -> bool:
        return token in one.added and (token not in other.tokens or token in other.special)

    by_id = {**draft.ids, **target.ids}
    for name in sorted(by_id, key=lambda name: (by_id[name], name)):
        ours, theirs = target.ids.get(name), draft.ids.get(name)
        if ours is None and theirs is not None and apart(theirs, draft, target):
            continue
        if theirs is None and ours is not None and apart(ours, target, draft):
            continue
        if ours != theirs:
            return name
    return None


def _counterparts(target: Vocabulary, draft: Vocabulary) -> dict[int, int]:
    """Returns the draft's token of each token of the target that both have. Each token of the draft stands for one."""
    found: dict[int, int] = {}
    taken: set[int] = set()
    spare = target.byte_tokens
    for token in sorted(target.tokens, key=lambda token: (token in spare, token)):  # byte tokens last
        other = target.counterpart(token, draft)
        if other is not None and other not in taken:
            found[token] = other
            taken.add(other)
    return found


def _map(
    target: Vocabulary,
    draft: Vocabulary,
    counterparts: Mapping[int, int],
    alike: bool,
    draft_rows: int,
    kept: Sequence[int] | None,
) -> VocabularyMap:
    head = list(range(draft.size)) if kept is None else list(kept)
    # A trimmed draft may have a whole embedding, or one that is trimmed as its head is.
    trimmed = kept is not None and draft_rows < draft.size
    if trimmed and draft_rows != len(head):
        wanted = f"{len(head)} (its trimmed vocabulary) or {draft.size} (its tokenizer)"
        raise ModelError(f"the draft's embedding has {draft_rows} rows; it must have {wanted}")
    places = {token: row for row, token in enumerate(head)} if trimmed else {row: row for row in draft.tokens}
    fed = _Fed(target, draft, places)
    to_draft = torch.zeros(target.size, dtype=torch.int64)
    for token in target.tokens:
        other = counterparts.get(token)
        if other is None and alike and token in draft.tokens:  # a special token under another name
            other = token
        to_draft[token] = places[other] if other in places else fed.approximation(token)
    back = {other: token for token, other in counterparts.items()}
    return VocabularyMap(to_draft=to_draft, to_target=torch.tensor([back.get(token, -1) for token in head]))


class _Fed:
    """What is fed for tokens of the target that the draft does not have.

    A token with bytes is fed as the longest token of the draft that ends the same: what follows depends most on the
    last bytes. (Greedy text of Gemma 3 270M, SmolLM2-135M's likeliest common token: it is Gemma's next one in 65.1 % of
    the places in code if the whole text is re-encoded, 62.0 % so, 60.2 % with the longest beginning, 54.2 % with an
    unknown token; 4.8 % of the tokens are unknown. In English prose none is.) A special token is fed as a line break,
    because most of them separate parts of a text.

    Args:
        places: row of the embedding of each token of the draft that has one.
    """

    def __init__(self, target: Vocabulary, draft: Vocabulary, places: Mapping[int, int]):
        self._target, self._draft, self._places = target, draft, places
        self._known = {raw: places[token] for raw, token in draft.by_bytes.items() if token in places}
        self._separator = self._known.get(b"\n", 0)

    def approximation(self, token: int) -> int:
        """Returns the row of the draft's embedding to use for a token of the target."""
        other = self._target.counterpart(token, self._draft)  # a second spelling of the same bytes
        if other is not None and other in self._places:
            return self._places[other]
        raw = self._target.spoken.get(token, b"")
        endings = (self._known.get(raw[start:]) for start in range(len(raw)))
        return next((row for row in endings if row is not None), self._separator)


def kept_tokens(folder: Path) -> list[int] | None:
    """Returns the ids, in the draft's tokenizer, of the rows of a trimmed output head; None if it is not trimmed.

    A trimmed draft has EAGLE-3's tensor ``d2t`` in one of its safetensors files, for example in
    ``draft_vocab.safetensors``: row r of the head stands for token r + d2t[r]. A tensor ``t2d`` (one bool for each
    token) is optional and must name the same tokens.

    Raises:
        ModelError: the tensors are no such map.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                names = {"d2t", "t2d"} & {*opened.keys()}
                tensors |= {name: opened.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read ({first_line(error)})") from error
    offsets, known = tensors.get("d2t"), tensors.get("t2d")
    if offsets is None:
        return None
    if offsets.ndim != 1 or not len(offsets) or offsets.is_floating_point():
        raise ModelError(f"{folder}: d2t must be a list of integers, one for each row of the output head")
    kept = (torch.arange(len(offsets)) + offsets.to(torch.int64)).tolist()
    if min(kept) < 0 or len(set(kept)) < len(kept):
        raise ModelError(f"{folder}: d2t names a token twice, or one below 0; row r stands for token r + d2t[r]")
    if known is not None and known.flatten().nonzero().flatten().tolist() != sorted(kept):
        raise ModelError(f"{folder}: t2d and d2t name different tokens")
    return kept
