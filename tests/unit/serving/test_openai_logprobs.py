"""Bytes of tokens, and OpenAI's log-probability schemas where characters are split over tokens."""

from __future__ import annotations

from typing import Any

from ssd.request.output import TokenLogprob
from ssd.serving.openai.logprobs import TokenBytes, chat_logprobs, completion_logprobs
from ssd.testing.models.tiny import tiny_tokenizer

TEXT = "né 🐍\n日 x"


def test_bytes_of_byte_level_tokens() -> None:
    tokenizer = tiny_tokenizer(700)
    texts = TokenBytes(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(texts[token] for token in ids) == TEXT.encode()
    assert any(not _whole(texts[token]) for token in ids)  # some are parts of characters
    assert sum(texts.characters(token) for token in ids) == len(TEXT)


class SentencePieces:
    """How SentencePiece tokenizers answer."""

    pieces = ("▁the", "<0xF0>", "ly", "▁")

    def decode(self, ids: list[int], **_: Any) -> str:
        return ("the", "\ufffd", "ly", "")[ids[0]]

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.pieces[token]


def test_bytes_of_sentence_pieces() -> None:
    texts = TokenBytes(SentencePieces())
    assert [texts[token] for token in range(4)] == [b" the", b"\xf0", b"ly", b" "]


def test_schemas() -> None:
    tokenizer = tiny_tokenizer(700)
    texts = TokenBytes(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    tokens = [
        TokenLogprob(token_id=token, logprob=-2.0, rank=3, top=((ids[0], -0.5), (ids[-1], float("-inf"))))
        for token in ids
    ]
    told = completion_logprobs(tokens, texts, 100)
    for offset, token, shown in zip(told["text_offset"], ids, told["tokens"], strict=True):
        if _whole(texts[token]):
            assert TEXT[offset - 100 :].startswith(shown) and shown
        else:
            assert shown == "bytes:" + "".join(f"\\x{byte:02x}" for byte in texts[token])
    # The likeliest as asked for, best first, and the token itself.
    middle = told["top_logprobs"][2]
    assert list(middle.values()) == [-0.5, -9999.0, -2.0] and list(middle)[2] == told["tokens"][2]
    assert len(told["top_logprobs"][0]) == 2
    content = chat_logprobs(tokens, texts)["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == TEXT
    assert [likely["logprob"] for likely in content[0]["top_logprobs"]] == [-0.5, -9999.0]


def _whole(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
