"""What all stages share: the device, the time left, results so far, and widened pairs."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from transformers import AutoConfig, LlamaForCausalLM

from ssd.config.load import resolve_model_path
from ssd.testing.models.widen import sizes_for, widen

SEED = 1


@dataclass(frozen=True, kw_only=True)
class Size:
    """A widened pair: approximate numbers of parameters, and the layers of the draft."""

    name: str
    target: float
    draft: float
    draft_layers: int


SIZES = {
    "1b": Size(name="1b", target=1e9, draft=0.1e9, draft_layers=2),
    "8b": Size(name="8b", target=8e9, draft=0.2e9, draft_layers=2),
    "30b": Size(name="30b", target=30e9, draft=1e9, draft_layers=4),
}
TINY = Size(name="tiny", target=1.4e5, draft=1e5, draft_layers=2)


@dataclass(kw_only=True)
class Bench:
    """Runs the parts of a stage and keeps their results; a part that succeeded before is not run again.

    Args:
        out: folder of ``stage-NAME.json``.
        budget_s: seconds after which no further part begins.
        pair: folders of the target and the draft to widen.
    """

    device: torch.device
    out: Path
    tiny: bool
    budget_s: float
    pair: tuple[Path, Path]
    began: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    stage: str = ""

    def open(self, stage: str, have: Path) -> None:
        """Begins a stage with the earlier results in the folder ``have``, if there are any."""
        self.stage, self.began, self.skipped = stage, time.monotonic(), []
        path = have / f"stage-{stage}.json"
        self.results = json.loads(path.read_text())["parts"] if path.is_file() else {}

    def part(self, name: str, run: Callable[[], Any]) -> None:
        """Runs a part and keeps its result, unless it succeeded before or the time is spent.

        An exception of the part becomes its result.
        """
        if name in self.results and not failed(self.results[name]):
            return
        if time.monotonic() - self.began > self.budget_s:
            self.skipped.append(name)
            return
        print(f"[{time.monotonic() - self.began:5.0f} s] {self.stage}: {name}", flush=True)
        try:
            found = run()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error).strip()[:600]}"}
            print(f"  {found['error']}", flush=True)
        self.results[name] = found
        self.write()

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        record = {"stage": self.stage, "facts": facts(self.device), "tiny": self.tiny, "parts": self.results}
        (self.out / f"stage-{self.stage}.json").write_text(json.dumps(record, indent=1))

    def sizes(self, *names: str) -> list[Size]:
        return [TINY] if self.tiny else [SIZES[name] for name in names]

    def target(self, size: Size) -> LlamaForCausalLM:
        return self._widened(self.pair[0], size.target, None)

    def draft(self, size: Size) -> LlamaForCausalLM:
        return self._widened(self.pair[1], size.draft, size.draft_layers)

    def _widened(self, folder: Path, parameters: float, layers: int | None) -> LlamaForCausalLM:
        narrow = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(self.device)
        sizes = sizes_for(AutoConfig.from_pretrained(folder), parameters, num_hidden_layers=layers)
        wide = widen(narrow, **sizes, dtype=torch.bfloat16, seed=SEED)
        wide.config.max_position_embeddings = 1 << 17  # beyond the trained positions only times are measured
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # workers use other streams than this thread
        return wide.requires_grad_(False)

    def seconds(self, run: Callable[[], Any], *, repeats: int = 30) -> float:
        """Returns the median time of a call in seconds, by device events, after warm-up calls."""
        repeats = 3 if self.tiny else repeats
        for _ in range(3):
            run()
        if self.device.type != "cuda":
            return statistics.median(_wall(run) for _ in range(repeats))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3

    def bandwidth(self) -> float:
        """Returns bytes read and written per second by a copy much larger than the caches."""
        source = torch.randint(0, 255, ((1 << 24) if self.tiny else (1 << 32),), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source), repeats=10)

    def clear(self) -> None:
        gc.collect()  # workers and their graphs refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def failed(part: dict[str, Any]) -> bool:
    """Returns whether a part raised an exception, or found something wrong."""
    return "error" in part or part.get("ok") is False


def embedded_pair() -> tuple[Path, Path]:
    """Returns the folders of the shipped target and draft."""
    return resolve_model_path("embedded/target"), resolve_model_path("embedded/draft")


def facts(device: torch.device) -> dict[str, Any]:
    """Returns the date, the device and the versions the results belong to."""
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d %H:%M"), "python": python_version(), "device": str(device)}
    for package in ("torch", "transformers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "memory_gb": round(card.total_memory / 1e9, 1), "cuda": torch.version.cuda}
        found["multiprocessors"] = card.multi_processor_count
    return found


def _wall(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
