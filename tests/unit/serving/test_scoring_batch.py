"""Scored prompts in batch files: what the server answers to the same body."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ssd.config.load import load_config
from ssd.serving.batch.run import Batch
from ssd.testing.twins.pipeline import ScriptedPipeline
from ssd.testing.twins.served import Served

SCORED: dict[str, dict[str, Any]] = {
    "echo": {"prompt": "def main", "max_tokens": 0, "logprobs": 1, "echo": True},
    "echo of ids": {"prompt": [[4, 9, 11], [5]], "max_tokens": 2, "logprobs": 0, "echo": True, "seed": 1},
    "prompt_logprobs": {"prompt": "def main", "max_tokens": 2, "prompt_logprobs": 2, "seed": 2},
    "token ids": {"prompt": "x", "max_tokens": 4, "return_token_ids": True, "logprobs": 1, "seed": 3},
}


@pytest.mark.parametrize("plain", [False, True], ids=["openai", "plain"])
def test_as_the_server_answers(plain: bool, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = {name: body for name, body in SCORED.items() if not plain or name != "echo of ids"}
    lines = [
        {"id": name, **body}
        if plain
        else {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", **body}}
        for name, body in bodies.items()
    ]
    source.write_text("\n".join(json.dumps(line) for line in lines))
    config = load_config("embedded", ["engine.max_batch=3", "server.model_name=tiny"])
    asyncio.run(Batch(config, source, out, launch=partial(ScriptedPipeline, round_s=0.001)).run())
    records = [json.loads(line) for line in out.read_text().splitlines()]
    served = Served()
    try:
        for record in records:
            name = record["id"] if plain else record["custom_id"]
            asked = {"model": "tiny", **({"temperature": 0.0} if plain else {}), **bodies[name]}
            status, _, text = served.ask("POST", "/v1/completions", asked)
            assert status == 200
            found = record if plain else record["response"]["body"]["choices"]
            expected = json.loads(text)["choices"]
            if plain:
                for field in ("text", "finish_reason", "logprobs", "prompt_logprobs", "token_ids", "prompt_token_ids"):
                    assert found.get(field) == expected[0].get(field)
            else:
                assert found == expected
    finally:
        served.close()
    assert len(records) == len(bodies)
