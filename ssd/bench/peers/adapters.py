"""Other programs as arms of a comparison: subprocesses with the same cores, weights, dtype and prompts."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config.load import resolve_model_path
from ...config.sections import Config
from ...errors import PipelineError, RequestError
from ...request.output import RequestOutput, SpeculationRecord
from ...request.sampling_params import SamplingParams
from ..measure.interleave import Sample
from ..measure.prompts import Prompt

PEERS = {
    "transformers": ("transformers", False),
    "transformers-assisted": ("transformers", True),
    "vllm": ("vllm", False),
    "vllm-draft": ("vllm", True),
    "llama.cpp": ("llama_cpp", False),
    "llama.cpp-lookup": ("llama_cpp", False),
}
"""By name: the library, and whether it uses the draft."""
SINGLE = ("transformers-assisted", "llama.cpp", "llama.cpp-lookup")
"""Peers that take one prompt at a time."""
LOAD_S, RUN_S, LEAVE_S = 600.0, 600.0, 10.0
WORKER = Path(__file__).with_name("worker.py")


class PeerUnavailable(PipelineError):
    """A peer cannot run: its library is missing or does not support the models, or its process died."""

    def __init__(self, peer: str, why: str):
        super().__init__(f"{peer}: {why}")
        self.peer = peer


@dataclass(slots=True)
class Peer:
    """Another program, started and ready.

    Args:
        tokenizer: the target's, from transformers.
        batch: the largest number of prompts to complete together.
        python: the interpreter of the peer's environment.

    Raises:
        PeerUnavailable: it did not start; the message says why.
    """

    name: str
    config: Config
    tokenizer: Any
    batch: int = 1
    python: str = sys.executable
    version: str = field(default="", init=False)
    _process: subprocess.Popen = field(init=False, repr=False)
    _answers: queue.Queue = field(default_factory=queue.Queue, init=False, repr=False)

    def __post_init__(self) -> None:
        library, drafts = PEERS[self.name]
        target, draft = self.config.target, self.config.draft
        if drafts and draft is None:
            raise PeerUnavailable(self.name, "the configuration has no draft")
        cores = sorted({*(target.cores or ()), *((draft.cores or ()) if draft else ())})
        order = {
            "library": library,
            "target": str(resolve_model_path(target.model)),
            "draft": str(resolve_model_path(draft.model)) if drafts and draft is not None else None,
            "dtype": target.dtype,
            "lookup": self.name.endswith("-lookup"),
            "lookahead": self.config.speculation.depth,
            "max_model_len": self.config.engine.max_model_len,
            "batch": self.batch,
            "cores": cores,
            "threads": len(cores) or os.cpu_count() or 1,
        }
        try:
            self._process = subprocess.Popen(
                [self.python, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **_environment(library, cores)},
            )
        except OSError as error:
            raise PeerUnavailable(self.name, f"{self.python} does not start: {error}") from None
        threading.Thread(target=self._read, name=f"ssd-peer-{self.name}", daemon=True).start()
        try:
            self.version = self._ask({"load": order}, LOAD_S)["ready"]["version"]
        except PeerUnavailable:
            self.close()
            raise

    @property
    def most(self) -> int:
        """The largest number of prompts it completes together."""
        return 1 if self.name in SINGLE else self.batch

    def run(self, prompts: Sequence[Prompt], params: SamplingParams) -> Sample:
        """Completes the prompts as one batch. Raises PeerUnavailable if the peer fails."""
        ids = [list(self.tokenizer(prompt.text, add_special_tokens=True)["input_ids"]) for prompt in prompts]
        order = {
            "prompts": ids,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "seed": params.seed % 2**31,
        }
        found = self._ask({"run": order}, RUN_S)
        outputs = [
            RequestOutput(
                prompt=prompt.text,
                prompt_token_ids=tuple(asked),
                text=str(self.tokenizer.decode(tokens)),
                token_ids=tuple(tokens),
                finish_reason="length",
                speculation=SpeculationRecord(),
                decode_s=found["decode_s"],
            )
            for prompt, asked, tokens in zip(prompts, ids, found["outputs"], strict=True)
        ]
        return Sample(outputs=outputs, decode_s=found["decode_s"])

    def close(self) -> None:
        """Ends the peer's process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # an order was still in the buffer when the process ended
            self._process.stdin.close()
        for end in (lambda: None, self._process.terminate, self._process.kill):
            end()
            try:
                self._process.wait(LEAVE_S)
                return
            except subprocess.TimeoutExpired:
                continue

    def _ask(self, order: dict[str, Any], limit_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=limit_s)
        except (BrokenPipeError, queue.Empty) as error:
            what = f"no answer in {limit_s:g} s" if isinstance(error, queue.Empty) else "its process ended"
            raise PeerUnavailable(self.name, what) from None
        if line is None:
            raise PeerUnavailable(self.name, "its process ended; its own messages are above")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerUnavailable(self.name, " ".join(answer["error"].split())[:300])
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)


def parse_peers(names: str) -> tuple[str, ...]:
    """Splits ``"transformers, vllm"`` into names of peers. Raises RequestError if one is unknown."""
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in found:
        if name not in PEERS:
            raise RequestError(f"peer {name!r} is unknown; peers are {', '.join(PEERS)}")
    return found


def _environment(library: str, cores: Sequence[int]) -> dict[str, str]:
    common = {"HF_HUB_OFFLINE": "1"}
    if cores:
        common["OMP_NUM_THREADS"] = str(len(cores))
    if library == "vllm":
        # vLLM runs in the worker's own process, so that it has the worker's clock and cores.
        common |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        common["VLLM_LOGGING_LEVEL"] = "ERROR"
        if cores:
            common["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return common
