"""What a start must not cost: importing models in a process that runs none, and compiling again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd.autograd_cache import check_cacheable

from ssd.config.load import load_config
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.plan import Plan


def test_fronts_and_clients_import_no_models() -> None:
    """That import takes as long as all their others."""
    fronts = "ssd.engine.llm, ssd.engine.async_engine, ssd.serving.run, ssd.serving.batch.run, ssd.cluster.batch"
    heavy = "{'transformers.modeling_utils', 'torch._dynamo'}"
    command = [sys.executable, "-c", f"import sys, {fronts}; print({heavy} & {{*sys.modules}})"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout == "set()\n"


@pytest.mark.parametrize("draft", ["noisy", None])
def test_compiled_code_is_found_in_the_cache(
    draft: str | None, tiny_config: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's cache silently skips a graph that contains a call it does not know."""
    names: list[str] = []
    compile_ = torch.compile

    def compiled(body: Callable[..., Any], **_options: Any) -> Callable[..., Any]:
        def backend(graph: fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
            check_cacheable(graph)
            names.append(body.__name__)
            return graph.forward

        return compile_(body, fullgraph=True, dynamic=False, backend=backend)

    monkeypatch.setattr(torch, "compile", compiled)
    speculation = {"lookahead": 2, "siblings": 1} if draft else {"lookahead": 2, "method": "self", "self": {}}
    raw = tiny_config(speculation=speculation, draft=draft)
    for worker in raw.keys() & {"target", "draft"}:
        raw[worker]["compile"] = True
    plan = Plan(config=load_config(raw), vocabulary=128, ends=(0,))
    build_verifier(plan)
    if draft:
        build_draft(plan)
    assert {*names} >= ({"decide", "tree", "chain"} if draft else {"decide", "skipped_step"})
