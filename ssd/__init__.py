"""Speculative speculative decoding: the target's own tokens, faster.

::

    from ssd import LLM, SamplingParams

    with LLM("embedded") as llm:
        for output in llm.generate(["def main():\\n    "], SamplingParams(max_tokens=64)):
            print(output.text)

Importing this package is cheap: torch, transformers and Ray are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.load import load_config
    from .config.sections import Config
    from .engine.async_engine import AsyncEngine
    from .engine.llm import LLM
    from .errors import (
        ConfigError,
        LinkError,
        ModelError,
        OverloadedError,
        PipelineError,
        RequestError,
        SSDError,
        UsageError,
        WorkerError,
    )
    from .request.output import RequestOutput, SpeculationRecord, StreamEvent, TokenLogprob
    from .request.sampling_params import SamplingParams
    from .request.structured import StructuredOutputsParams
    from .serving.lane.client import AsyncClient, Client

__version__ = "0.1.0"

_HOMES = {
    "Config": "config.sections",
    "load_config": "config.load",
    "AsyncClient": "serving.lane.client",
    "AsyncEngine": "engine.async_engine",
    "Client": "serving.lane.client",
    "LLM": "engine.llm",
    "RequestOutput": "request.output",
    "SamplingParams": "request.sampling_params",
    "SpeculationRecord": "request.output",
    "StreamEvent": "request.output",
    "StructuredOutputsParams": "request.structured",
    "TokenLogprob": "request.output",
    "ConfigError": "errors",
    "LinkError": "errors",
    "ModelError": "errors",
    "OverloadedError": "errors",
    "PipelineError": "errors",
    "RequestError": "errors",
    "SSDError": "errors",
    "UsageError": "errors",
    "WorkerError": "errors",
}

__all__ = [
    "LLM",
    "AsyncClient",
    "AsyncEngine",
    "Client",
    "Config",
    "ConfigError",
    "LinkError",
    "ModelError",
    "OverloadedError",
    "PipelineError",
    "RequestError",
    "RequestOutput",
    "SSDError",
    "SamplingParams",
    "SpeculationRecord",
    "StreamEvent",
    "StructuredOutputsParams",
    "TokenLogprob",
    "UsageError",
    "WorkerError",
    "__version__",
    "load_config",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
