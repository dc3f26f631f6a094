"""``ssd bench``: a configuration, and values swept around it, measured on prompts beside peers."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ...config.load import Config, load_config
from ...errors import RequestError
from ...request.sampling_params import SamplingParams
from ..peers.adapters import Peer, PeerUnavailable
from .arms import MethodArm, Progress
from .compare import compare
from .prompts import Prompt

if TYPE_CHECKING:
    from ...engine.llm import LLM

BATCH = "engine.max_batch"
TIMELINE_TOKENS = 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Values of one configuration key; each is a start of the pipeline of its own."""

    key: str
    values: tuple[str, ...]


def parse_sweep(given: str) -> Sweep:
    """``KEY=1..6`` (whole numbers, both ends) or ``KEY=a,b,c``.

    Raises:
        RequestError: it is neither.
    """
    key, _, text = given.partition("=")
    low, dots, high = text.partition("..")
    if dots and low.isdigit() and high.isdigit() and int(low) <= int(high):
        values = tuple(str(value) for value in range(int(low), int(high) + 1))
    else:
        values = tuple(part.strip() for part in text.split(",")) if not dots else ()
    if not key.strip() or not values or not all(values):
        raise RequestError(f"--sweep {given!r} must look like KEY=1..6 or KEY=4,8,16")
    return Sweep(key=key.strip(), values=values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """Settings that take turns with the configuration's own, in a pipeline of their own."""

    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        return ", ".join(setting.rpartition(".")[2] for setting in self.settings)


def parse_beside(given: str) -> Beside:
    """``"KEY=VALUE KEY=VALUE .."``.

    Raises:
        RequestError: it is not.
    """
    settings = tuple(given.split())
    if not settings or not all("=" in setting for setting in settings):
        raise RequestError(f'--beside {given!r} must look like KEY=VALUE or "KEY=VALUE KEY=VALUE"')
    return Beside(settings=settings)


def bench(
    config: Config,
    prompts: Sequence[Prompt],
    *,
    methods: Sequence[str] = ("none", "sd", "ssd"),
    peers: Sequence[str] = (),
    vllm_python: str | None = None,
    sweeps: Sequence[Sweep] = (),
    besides: Sequence[Beside] = (),
    temperature: float = 0.0,
    seed: int = 0,
    max_tokens: int = 128,
    repeat: int = 3,
    launch: Callable[[Config], LLM] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Figures ready for JSON. ``settings`` has the configuration's own first, then each swept value;
    every one has the names of ``ssd compare --json``. ``besides`` take turns with every one of them, by its method.
    Peers run beside the configuration's own setting, and beside swept batches that they can do. The batch is
    ``engine.max_batch``.

    Peers that cannot take part are listed under ``skipped`` with the reason.

    Raises:
        UsageError: configuration, sweeps or prompts are wrong (found before anything is started).
    """
    from ...engine.front import make_plan
    from ...engine.llm import LLM

    points = list(_points(config, sweeps))
    others = [{other.name: load_config(point, other.settings) for other in besides} for _, _, point in points]
    skipped: dict[str, str] = {}
    settings = []
    largest = max(point.engine.max_batch for _, _, point in points)
    with ExitStack() as stack:
        running: list[Peer] = []
        tokenizer = make_plan(config)[0] if peers else None
        for name in peers:
            if progress is not None:
                progress(0, 1, f"starting {name}")
            python = {"python": vllm_python} if name.startswith("vllm") and vllm_python else {}
            if name.startswith("vllm") and not vllm_python:
                skipped[name] = "give --vllm-python, the Python of an environment that has vllm"
                continue
            try:
                peer = Peer(name, config, tokenizer, largest, **python)  # type: ignore[arg-type]
                stack.callback(peer.close)
                # Better now than in the middle of the measuring.
                peer.run(prompts[: peer.most], SamplingParams(temperature=temperature, max_tokens=8))
            except PeerUnavailable as error:
                skipped[name] = str(error)
            else:
                running.append(peer)
        for (key, value, point), alternatives in zip(points, others, strict=True):
            label = f"{key}={value}" if key else "as configured"
            if progress is not None:
                progress(0, 1, f"starting, {label}")
            with ExitStack() as started:
                llm, batch = started.enter_context((launch or LLM)(point)), point.engine.max_batch
                arms = [
                    MethodArm(started.enter_context((launch or LLM)(other)), other.speculation.method, name)
                    for name, other in alternatives.items()
                ]
                beside = [peer for peer in running if peer.most >= batch] if key in (None, BATCH) else []
                measure = partial(
                    compare,
                    llm,
                    prompts,
                    methods=methods,
                    temperature=temperature,
                    seed=seed,
                    max_tokens=max_tokens,
                    repeat=repeat,
                    batch=batch,
                    beside=arms,
                    progress=_labelled(progress, label),
                )
                try:
                    comparison = measure(peers=beside)
                except PeerUnavailable as error:  # one died: nobody's figures can be trusted, and others might follow
                    running, skipped[error.peer] = [], f"{error}; measured again without peers"
                    comparison = measure(peers=[])
                figures = {"sweep": key, "value": value, **_sizes(point), **comparison.to_json()}
                if key is None:
                    params = SamplingParams(temperature=temperature, seed=seed, max_tokens=TIMELINE_TOKENS)
                    figures["rounds"] = {m: _rounds(llm, prompts[:batch], params, m) for m in methods}
                figures["degraded"] = llm.degraded
            settings.append(figures)
        versions = {peer.name: peer.version for peer in running}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "models": {"target": config.target.model, "draft": config.draft.model if config.draft else None},
        "dtype": config.target.dtype,
        "max_tokens": max_tokens,
        "repeat": repeat,
        "peers": versions,
        "skipped": skipped,
        "settings": settings,
    }


def _points(config: Config, sweeps: Sequence[Sweep]) -> Iterator[tuple[str | None, str | None, Config]]:
    yield None, None, config
    for sweep in sweeps:
        for value in sweep.values:
            yield sweep.key, value, load_config(config, [f"{sweep.key}={value}"])


def _sizes(config: Config) -> dict[str, Any]:
    speculation = config.speculation
    return {"budget": speculation.forecast.budget, "siblings": speculation.siblings, "rows": speculation.rows}


def _rounds(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, method: str) -> list[dict[str, Any]]:
    """A few rounds watched, after all measuring."""
    from dataclasses import replace

    with llm.watch() as rounds:
        llm.generate([prompt.text for prompt in prompts], replace(params, method=method, ignore_eos=True))  # type: ignore[arg-type]
    return [asdict(one) for one in rounds]


def _labelled(progress: Progress | None, label: str) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total, what: progress(done, total, f"{label}: {what}")
