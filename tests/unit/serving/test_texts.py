"""Texts over HTTP, for tokenizers of other kinds than the embedded one: words with spaces, bytes, special tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.serving.openai.jobs import server_defaults
from ssd.testing.twins import pipeline
from ssd.testing.twins.served import Served
from tests.unit.engine.test_detokenize_kinds import EMOJI, bytes_of, ids_of, tokenizer

HEAD = 320
"""Rows of the head: more than the tokenizer has tokens."""


def save(folder: Path, *, generation: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """A model whose tokenizer keeps spaces in words, and adds a beginning-of-text token."""
    made = tokenizer("strip")
    torch.manual_seed(0)
    values: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1} | config
    model = LlamaForCausalLM(LlamaConfig(vocab_size=HEAD, num_attention_heads=2, max_position_embeddings=256, **values))
    model.save_pretrained(folder)
    inner = made.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 1)])
    made.save_pretrained(folder)
    inner.post_processor = processors.TemplateProcessing(single="$0", special_tokens=[])
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def settings(folder: Path, **server: Any) -> dict[str, Any]:
    return {
        "target": {"model": str(folder), "dtype": "float32", "compile": False},
        "speculation": {"method": "none"},
        "engine": {"max_batch": 2, "max_model_len": 128, "start_timeout_s": 120.0},
        "server": server,
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(config=settings(save(tmp_path_factory.mktemp("words"), eos_token_id=2)), launch=InprocPipeline)
    yield server
    server.close()


def ask(served: Served, **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "Hello", "temperature": 0, **body}
    status, _, text = served.ask("POST", "/v1/completions", body)
    assert status == 200, text
    return json.loads(text)


def streamed(served: Served, **body: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "prompt": "Hello", "temperature": 0, "stream": True, **body}
    status, _, text = served.ask("POST", "/v1/completions", body)
    assert status == 200, text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def forced(*tokens: str) -> dict[str, Any]:
    return {"allowed_token_ids": ids_of("strip", *tokens), "max_tokens": 1}


def test_the_first_word_keeps_its_space(served: Served) -> None:
    answer = ask(served, **forced("▁world"), logprobs=1)
    choice = answer["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"]) == (" world", [" world"])
    assert ask(served, **forced("▁world"))["choices"][0]["text"] == " world"


def test_a_stop_string_with_a_space_at_the_first_token(served: Served) -> None:
    choice = ask(served, **(forced("▁world") | {"max_tokens": 3}), stop=" world")["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


@pytest.mark.parametrize("said", [" world", "world", f"{EMOJI} ok", f" {EMOJI}"])
def test_a_choice_is_what_it_says(served: Served, said: str) -> None:
    asked = {"structured_outputs": {"choice": [said]}, "max_tokens": 40}
    assert ask(served, **asked)["choices"][0]["text"] == said
    chunks = streamed(served, **asked, logprobs=0)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == said


@pytest.mark.parametrize("include", [False, True])
def test_a_special_token_as_stop_string(served: Served, include: bool) -> None:
    asked = {**forced("<|tool|>"), "max_tokens": 5, "include_stop_str_in_output": include}
    choice = ask(served, **asked, stop="<|tool|>")["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("<|tool|>" if include else "", "stop")
    answer = ask(served, **asked)
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("", 5)
    assert ask(served, **asked, skip_special_tokens=False)["choices"][0]["text"] == 5 * "<|tool|>"


def test_special_tokens_around_a_prompt(served: Served) -> None:
    def count(**body: Any) -> int:
        return ask(served, **forced("a"), **body)["usage"]["prompt_tokens"]

    assert count() == count(add_special_tokens=True) == count(add_special_tokens=False) + 1


def test_the_last_token_of_a_text(served: Served) -> None:
    asked = ask(served, **forced("</s>"), logprobs=1)["choices"][0]
    assert (asked["text"], asked["logprobs"]["tokens"], asked["logprobs"]["text_offset"]) == ("", ["</s>"], [0])


SCRIPT = ("▁Hello", "<|tool|>", *bytes_of(EMOJI), "▁", "ok", "▁world")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Every answer is the script, again and again."""
    ids = ids_of("strip", *SCRIPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "scripted_token", lambda _prompt, _seed, position, _size: ids[position % len(ids)])
        server = Served(config=settings(save(tmp_path_factory.mktemp("scripted"), eos_token_id=2)))
        yield server
        server.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7, 12, 14, 15, 17, 18, 19])
def test_text_tokens_and_pieces_agree(scripted: Served, stream: bool, limit: int) -> None:
    asked = {"max_tokens": limit, "logprobs": 0}
    answers = streamed(scripted, **asked) if stream else [ask(scripted, **asked)]
    choices = [answer["choices"][0] for answer in answers if answer["choices"]]
    ids = (2 * ids_of("strip", *SCRIPT))[:limit]
    wanted = tokenizer("strip").decode(ids_of("strip", "a") + ids, skip_special_tokens=True)[1:]
    assert "".join(choice["text"] for choice in choices) == wanted
    told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    offsets = [at for part in told for at in part["text_offset"]]
    tokens = [token for part in told for token in part["tokens"]]
    assert len(offsets) == limit and offsets == sorted(offsets)
    for at, token in zip(offsets, tokens, strict=True):
        assert token.startswith(("bytes:", "<|")) or wanted[at:].startswith(token)


@pytest.mark.parametrize("stop", [" ok", "😁", "😂 o", "o<|tool|>", "<|tool|>😀", "Hello<|tool|>😀😁", "k world"])
@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_end_text_and_tokens(scripted: Served, stop: str, include: bool) -> None:
    shown = "".join([" Hello", "<|tool|>", EMOJI, " ok world", " Hello", "<|tool|>"])
    asked = {"max_tokens": 25, "stop": stop, "include_stop_str_in_output": include, "logprobs": 0}
    whole = ask(scripted, **asked)["choices"][0]
    pieces = [answer["choices"][0] for answer in streamed(scripted, **asked) if answer["choices"]]
    if stop not in shown:
        assert whole["finish_reason"] == "length"
        return
    text = shown[: shown.index(stop)].replace("<|tool|>", "") + (stop if include else "")
    assert (whole["text"], whole["finish_reason"]) == (text, "stop")
    assert "".join(piece["text"] for piece in pieces) == text and pieces[-1]["finish_reason"] == "stop"
    assert sum(len(piece["logprobs"]["tokens"]) for piece in pieces if piece["logprobs"]) == len(
        whole["logprobs"]["tokens"]
    )


@pytest.mark.parametrize("generation", [None, {"temperature": 0.5}], ids=["without_file", "file_without_key"])
def test_end_ids_of_the_configuration(generation: Any, tmp_path: Path) -> None:
    served = Served(config=settings(save(tmp_path, generation=generation, eos_token_id=[5, 7])), launch=InprocPipeline)
    try:
        for end in (5, 7, 2):
            answer = ask(served, logit_bias={str(end): 100}, max_tokens=32)
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == 1
    finally:
        served.close()


@pytest.mark.parametrize("ends", [[2, 9999], [2, 300]], ids=["beyond_the_head", "padding"])
def test_end_ids_outside_the_vocabulary(ends: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        served = Served(config=settings(save(tmp_path, generation={"eos_token_id": ends})), launch=InprocPipeline)
    try:
        assert f"end-of-text ids {ends[1]} are ignored" in caplog.text
        answer = ask(served, structured_outputs={"choice": ["ok"]}, max_tokens=32)
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("ok", "stop")
    finally:
        served.close()


def test_sampling_defaults_of_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generation = {"top_k": 1, "temperature": 0.6, "do_sample": True, "min_p": 7}
    folder = save(tmp_path, generation=generation, eos_token_id=2)
    with caplog.at_level(logging.WARNING):
        served = Served(config=settings(folder), launch=InprocPipeline)
    try:
        assert "temperature=0.6, top_k=1" in caplog.text and "min_p" in caplog.text
        base = {"model": "tiny", "prompt": "Hello", "max_tokens": 12, "ignore_eos": True}
        texts = [json.loads(served.ask("POST", "/v1/completions", base | {"seed": n})[2]) for n in range(3)]
        greedy = ask(served, **base, top_k=0)
        assert {text["choices"][0]["text"] for text in texts} == {greedy["choices"][0]["text"]}
        hot = base | {"top_k": -1, "temperature": 2.0}
        others = [json.loads(served.ask("POST", "/v1/completions", hot | {"seed": n})[2]) for n in range(3)]
        assert len({text["choices"][0]["text"] for text in others}) > 1
    finally:
        served.close()
    from ssd.config.load import load_config

    assert server_defaults(load_config(settings(folder, generation_config="none"))) == {}


def test_prompts_with_the_largest_id(served: Served) -> None:
    largest = max(tokenizer("strip").get_vocab().values())
    assert ask(served, prompt=[1, largest], **forced("a"))["choices"][0]["text"] == "a"
