"""Pairs whose token ids differ: what stands for what, and what is fed for tokens that the draft does not have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssd.errors import ModelError
from ssd.models.checkpoints.pairs import Pairing, VocabularyMap, kept_tokens, paired
from ssd.models.checkpoints.vocabulary import Vocabulary
from ssd.testing.models.tiny import tiny_tokenizer

WORDS = ["\u2581", "the", "\u2581the", "\u2581\u2581", "caf\u00e9", "\u2581th", "\u2581cat", "a", "b", "\n"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """A byte-fallback vocabulary that marks spaces with U+2581, as Llama 2's and Gemma's."""
    names = ["<unk>", "<s>", "</s>", *BYTES, *words]
    made = Tokenizer(
        models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level(words: Sequence[str] = ("\u0120the", "\u0120\u0120", "caf\u00c3\u00a9", "\u0120cat", "at")) -> Any:
    """A byte-level vocabulary, as GPT-2's: all bytes as characters, then words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, *words]
    made = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<|endoftext|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def mapped(target: Any, draft: Any, **given: Any) -> VocabularyMap:
    found = pair(target, draft, shared=True, **given)
    assert found.map is not None
    return found.map


def pair(target: Any, draft: Any, *, draft_rows: int | None = None, **given: Any) -> Pairing:
    rows = max(draft.get_vocab().values()) + 1 if draft_rows is None else draft_rows
    return paired(target, draft, target_rows=max(target.get_vocab().values()) + 1, draft_rows=rows, **given)


def drafted(target: Any, draft: Any) -> dict[str, str]:
    """By spelling: the target's tokens that can be drafted, and the draft's tokens that stand for them."""
    found = mapped(target, draft)
    theirs, ours = ({i: n for n, i in t.get_vocab().items()} for t in (draft, target))
    return {ours[t]: theirs[row] for row, t in enumerate(found.to_target.tolist()) if t >= 0}


def fed(target: Any, draft: Any, token: str, **given: Any) -> str:
    names = {i: n for n, i in draft.get_vocab().items()}
    return names[int(mapped(target, draft, **given).to_draft[target.get_vocab()[token]])]


@pytest.mark.parametrize(
    ("token", "counterpart"),
    [
        ("\u2581the", "\u0120the"),  # a space before a word
        ("\u2581\u2581", "\u0120\u0120"),  # spaces alone
        ("\u2581", "\u0120"),
        ("caf\u00e9", "caf\u00c3\u00a9"),  # a character of two bytes
        ("a", "a"),
        ("\n", "\u010a"),  # a token of the text, not its byte token
        ("<0xC3>", "\u00c3"),  # a part of a character
        ("<s>", "<|im_start|>"),  # by role
        ("</s>", "<|im_end|>"),
    ],
    ids=str,
)
def test_tokens_that_stand_for_the_same(token: str, counterpart: str) -> None:
    both = drafted(sentencepiece(), byte_level())
    assert both[token] == counterpart
    assert drafted(byte_level(), sentencepiece())[counterpart] == token


def test_spellings_of_one_text_are_one_token() -> None:
    """``<0x61>`` and ``a`` are one byte; text is spelled with the word."""
    both = drafted(sentencepiece(), byte_level())
    assert "<0x61>" not in both
    assert len(set(both.values())) == len(both)
    assert fed(sentencepiece(), byte_level(), "<0x61>") == "a"


def test_a_word_is_not_the_word_after_a_space() -> None:
    both = drafted(sentencepiece(), byte_level())
    assert "the" not in both
    assert both["\u2581the"] == "\u0120the"


@pytest.mark.parametrize(
    ("token", "known"),
    [("the", "e"), ("\u2581th", "h"), ("\u2581cat", "\u0120cat"), ("caf\u00e9", "caf\u00c3\u00a9")],
    ids=str,
)
def test_a_token_that_the_draft_lacks_is_fed_as_its_longest_ending(token: str, known: str) -> None:
    assert fed(sentencepiece(), byte_level(), token) == known


def test_every_token_is_fed_as_one_token_of_the_draft() -> None:
    for target, draft in ((sentencepiece(), byte_level()), (byte_level(), sentencepiece())):
        found = mapped(target, draft)
        assert found.to_draft.shape == (max(target.get_vocab().values()) + 1,)
        assert set(found.to_draft.tolist()) <= set(draft.get_vocab().values())
        back = found.to_draft[found.to_target.clamp(min=0)]
        rows = torch.arange(len(found.to_target))
        assert torch.equal(back[found.to_target >= 0], rows[found.to_target >= 0])


def test_different_tokenizers_are_refused_with_the_share_that_both_have() -> None:
    with pytest.raises(
        ModelError, match=r"different tokenizers.*draft\.vocabulary=shared.* 26\d tokens.*\(\d+%"
    ) as error:
        pair(sentencepiece(), byte_level())
    assert "\n" not in str(error.value)


def test_tokenizers_without_a_common_token_are_refused() -> None:
    def one(word: str) -> Any:
        made = Tokenizer(models.WordLevel({word: 0, word * 2: 1}, unk_token=word))
        return PreTrainedTokenizerFast(tokenizer_object=made)

    with pytest.raises(ModelError, match="no token in common"):
        pair(one("x"), one("y"), shared=True)


def test_equal_tokenizers_need_no_map() -> None:
    for shared in (False, True):
        assert pair(tiny_tokenizer(128), tiny_tokenizer(128), shared=shared).map is None


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
def test_tokens_added_to_the_target_are_never_drafted(special: bool) -> None:
    target = tiny_tokenizer(128)
    target.add_tokens([AddedToken("<|user|>", special=special)], special_tokens=special)
    found = pair(target, tiny_tokenizer(128))
    assert found.size == 129
    assert found.map is not None
    assert found.map.to_target.tolist() == list(range(128))
    assert found.map.to_draft[:128].tolist() == list(range(128))
    assert 0 <= found.map.to_draft[128] < 128


def test_tokens_added_to_the_draft_are_never_drafted() -> None:
    draft = tiny_tokenizer(128)
    draft.add_tokens([AddedToken("<think>", special=False)])
    found = pair(tiny_tokenizer(128), draft)
    assert found.size == 128
    assert found.map is not None
    assert found.map.to_target.tolist() == [*range(128), -1]


def test_special_tokens_under_other_names_are_fed_and_not_drafted() -> None:
    """A chat model gives names to the reserved tokens of its base model."""
    target, draft = tiny_tokenizer(128), tiny_tokenizer(128)
    target.add_special_tokens({"additional_special_tokens": ["<|header|>"]})
    draft.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>"]})
    found = pair(target, draft)
    assert found.map is not None
    assert found.map.to_draft[128] == 128
    assert found.map.to_target[128] == -1


def test_a_word_added_under_the_id_of_a_word_is_another_tokenizer() -> None:
    target = tiny_tokenizer(128)
    target.add_tokens([AddedToken("<think>", special=False)])
    with pytest.raises(ModelError, match="different tokenizers"):
        pair(target, tiny_tokenizer(129))


def test_the_vocabulary_reads_roles_and_bytes() -> None:
    found = Vocabulary.of(sentencepiece())
    assert found.named == {1: "bos", 2: "eos"}
    assert found.spoken[found.ids["\u2581the"]] == b" the"
    assert found.by_bytes[b"a"] == found.ids["a"]


def trimmed(folder: Path, kept: Sequence[int], known: Sequence[bool] | None = None, name: str = "draft_vocab") -> Path:
    tensors = {"d2t": torch.tensor([token - row for row, token in enumerate(kept)])}
    if known is not None:
        tensors["t2d"] = torch.tensor(list(known))
    save_file(tensors, folder / f"{name}.safetensors")
    return folder


def test_the_rows_of_a_trimmed_head_are_read(tmp_path: Path) -> None:
    assert kept_tokens(tmp_path) is None
    assert kept_tokens(trimmed(tmp_path, [3, 5, 4], [False, False, False, True, True, True])) == [3, 5, 4]


@pytest.mark.parametrize(
    ("kept", "known", "message"),
    [
        ([3, 3], None, "twice"),
        ([-1, 3], None, "below 0"),
        ([0, 1], [True, False, True], "t2d and d2t"),
    ],
    ids=["repeated", "negative", "disagreeing"],
)
def test_wrong_maps_of_trimmed_heads(tmp_path: Path, kept: list[int], known: list[bool] | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        kept_tokens(trimmed(tmp_path, kept, known))


def test_a_trimmed_head_with_a_whole_embedding() -> None:
    found = pair(tiny_tokenizer(128), tiny_tokenizer(128), kept=[7, 100, 9])
    assert found.map is not None
    assert found.map.to_target.tolist() == [7, 100, 9]
    assert found.map.to_draft.tolist() == list(range(128))


def test_a_trimmed_head_with_a_trimmed_embedding() -> None:
    found = pair(tiny_tokenizer(128), tiny_tokenizer(128), kept=[7, 100, 9], draft_rows=3)
    assert found.map is not None
    assert found.map.to_draft[[7, 100, 9]].tolist() == [0, 1, 2]
    assert set(found.map.to_draft.tolist()) <= {0, 1, 2}


def test_trimmed_heads_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="embedding has 5 rows"):
        pair(tiny_tokenizer(128), tiny_tokenizer(128), kept=[7, 100, 9], draft_rows=5)
    with pytest.raises(ModelError, match="token 128"):
        pair(tiny_tokenizer(128), tiny_tokenizer(128), kept=[7, 128])
