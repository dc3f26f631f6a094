"""Checks that draft and target have the same vocabulary."""

from __future__ import annotations

from typing import Any

from ...errors import ModelError


def shared_vocabulary(target_tokenizer: Any, draft_tokenizer: Any, target_size: int, draft_size: int) -> int:
    """Returns the number of token ids that both models may emit.

    Heads that are padded beyond the tokenizer (Qwen's 151936 and 152064 over one vocabulary) are allowed:
    the padding is cut off on both sides.

    Args:
        target_tokenizer: the target's.
        draft_tokenizer: the draft's.
        target_size: rows of the target's output head.
        draft_size: rows of the draft's output head.

    Raises:
        ModelError: the tokenizers disagree on a token, or a head is smaller than its tokenizer.
    """
    target_ids, draft_ids = target_tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    if target_ids != draft_ids:
        tokens = sorted(set(target_ids) | set(draft_ids), key=lambda t: (target_ids.get(t, draft_ids.get(t)), t))
        token = next(t for t in tokens if target_ids.get(t) != draft_ids.get(t))
        raise ModelError(
            f"draft and target have different tokenizers: token {token!r} is {target_ids.get(token)} in the target "
            f"and {draft_ids.get(token)} in the draft; use a draft trained with the target's tokenizer"
        )
    # Ids need not be contiguous, so the number of tokens is not a bound.
    size = max(target_ids.values()) + 1
    for name, head in (("target", target_size), ("draft", draft_size)):
        if head < size:
            raise ModelError(f"the {name}'s output head has {head} rows for a tokenizer of {size} tokens")
    return size
