"""End ids and sampling defaults of model folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Gemma3Config, LlamaConfig, PretrainedConfig

from ssd.errors import ModelError
from ssd.models.checkpoints.generation_config import FILE, end_ids, sampling_defaults


def written(folder: Path, content: Any) -> Path:
    (folder / FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def ends(folder: Path, config: PretrainedConfig, tokenizer_end: int | None = 2) -> tuple[int, ...]:
    return end_ids(folder, config, SimpleNamespace(eos_token_id=tokenizer_end), vocabulary=100)


@pytest.mark.parametrize(
    ("file", "config", "tokenizer_end", "wanted"),
    [
        (None, 5, 2, (2, 5)),
        (None, [5, 7], None, (5, 7)),
        (None, None, 2, (2,)),
        (None, None, None, ()),
        ({}, [5, 7], 2, (2, 5, 7)),
        ({"eos_token_id": None}, 5, 2, (2, 5)),
        ({"eos_token_id": 9}, [5, 7], 2, (2, 9)),
        ({"eos_token_id": [9, 0, 9]}, 5, None, (0, 9)),
        ({"eos_token_id": []}, 5, 2, (2,)),
    ],
    ids=str,
)
def test_end_ids(tmp_path: Path, file: Any, config: Any, tokenizer_end: int | None, wanted: tuple[int, ...]) -> None:
    if file is not None:
        written(tmp_path, file)
    assert ends(tmp_path, LlamaConfig(eos_token_id=config), tokenizer_end) == wanted


def test_end_ids_of_a_model_with_images(tmp_path: Path) -> None:
    """Whose configuration has a part for text."""
    config = Gemma3Config(eos_token_id=[1, 6])
    config.get_text_config().eos_token_id = None
    assert ends(tmp_path, config) == (1, 2, 6)
    config.get_text_config().eos_token_id = 3
    assert ends(tmp_path, config) == (2, 3)


@pytest.mark.parametrize("outside", [100, 9999, -1])
def test_end_ids_outside_the_vocabulary(tmp_path: Path, outside: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert ends(written(tmp_path, {"eos_token_id": [5, outside]}), LlamaConfig(eos_token_id=7)) == (2, 5)
    assert f"end-of-text ids {outside} are ignored: token ids are below 100" in caplog.text


@pytest.mark.parametrize(
    "content", ["{", "[]", "\ud800", '{"eos_token_id": "2"}', '{"eos_token_id": [true]}'], ids=repr
)
def test_files_that_say_nothing_sensible(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ModelError, match=FILE) as error:
        ends(tmp_path, LlamaConfig())
    assert "\n" not in str(error.value)


def test_sampling_defaults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sampling_defaults(tmp_path) == {}
    given = {"temperature": 0.6, "top_k": -1, "top_p": 0.95, "min_p": None, "do_sample": True, "max_new_tokens": 9}
    assert sampling_defaults(written(tmp_path, given)) == {"temperature": 0.6, "top_k": 0, "top_p": 0.95}
    with caplog.at_level(logging.WARNING):
        assert sampling_defaults(written(tmp_path, {"top_k": 2.5, "repetition_penalty": 1.1})) == {
            "repetition_penalty": 1.1
        }
    assert "top_k" in caplog.text and "repetition_penalty" not in caplog.text
