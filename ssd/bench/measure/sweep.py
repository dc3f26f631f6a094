"""``ssd bench``: measures a configuration, settings around it, and other programs on the same prompts."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...config.load import load_config
from ...config.sections import Config
from ...request.methods import WITH_DRAFT
from ...request.sampling_params import SamplingParams
from ..peers.adapters import Peer, PeerUnavailable
from .compare import Comparison, compare
from .interleave import Launch, MethodArm, Progress, Runs
from .prompts import Prompt
from .settings import Beside, Sweep

if TYPE_CHECKING:
    from ...engine.llm import LLM

BATCH = "engine.max_batch"
PEER_TOKENS = 8
"""Tokens a peer generates to show that it works."""
TIMELINE_TOKENS = 48
"""Tokens of the requests whose rounds are recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """What a bench measures."""

    methods: Sequence[str] = ("none", *WITH_DRAFT)
    peers: Sequence[str] = ()
    """Names of :data:`ssd.bench.peers.adapters.PEERS`."""
    vllm_python: str | None = None
    """Python of an environment with vLLM; needed by the vLLM peers."""
    sweeps: Sequence[Sweep] = ()
    besides: Sequence[Beside] = ()
    """Alternatives that take turns with every setting, each with the method of its own configuration."""
    runs: Runs = field(default_factory=lambda: Runs(repeat=3))
    """``batch`` is ignored: each setting runs ``engine.max_batch`` prompts together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    """One setting to measure."""

    key: str | None
    """The swept key; None: the configuration as given."""
    value: str | None
    config: Config
    besides: dict[str, Config]
    """Alternatives at this setting, by name."""

    @property
    def label(self) -> str:
        return f"{self.key}={self.value}" if self.key else "as configured"

    @property
    def batch(self) -> int:
        return self.config.engine.max_batch


def bench(
    launch: Launch,
    config: Config,
    prompts: Sequence[Prompt],
    options: BenchOptions,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures all settings and returns the figures, ready for JSON.

    ``settings`` begins with the configuration as given, then follow the swept values; each has the keys of
    ``ssd compare --json``. Peers run with the configuration as given, and with those swept batches they can run.
    Peers that cannot take part are listed under ``skipped`` with the reason.

    Raises:
        UsageError: configuration, sweeps or prompts are wrong; found before anything is started.
    """
    report = progress or (lambda done, total, label: None)
    points = list(_points(config, options))
    figures: list[dict[str, Any]] = []
    with ExitStack() as stack:
        peers = _Peers(stack)
        peers.start(config, prompts, options, most=max(point.batch for point in points), report=report)
        for point in points:
            report(0, 1, f"starting, {point.label}")
            figures.append(_measured(launch, point, prompts, options, peers, report))
        versions = {peer.name: peer.version for peer in peers.running}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "models": {"target": config.target.model, "draft": config.draft.model if config.draft else None},
        "dtype": config.target.dtype,
        "max_tokens": options.runs.max_tokens,
        "repeat": options.runs.repeat,
        "peers": versions,
        "skipped": peers.skipped,
        "settings": figures,
    }


class _Peers:
    """The peers that run, and why the others do not."""

    def __init__(self, stack: ExitStack):
        self.running: list[Peer] = []
        self.skipped: dict[str, str] = {}
        self._stack = stack

    def start(
        self, config: Config, prompts: Sequence[Prompt], options: BenchOptions, *, most: int, report: Progress
    ) -> None:
        """Starts every peer and lets it generate a few tokens. ``most``: prompts it has to run together."""
        from ...engine.front import make_plan

        tokenizer = make_plan(config)[0] if options.peers else None
        for name in options.peers:
            report(0, 1, f"starting {name}")
            python = {}
            if name.startswith("vllm"):
                if options.vllm_python is None:
                    self.skipped[name] = "give --vllm-python, the Python of an environment that has vllm"
                    continue
                python = {"python": options.vllm_python}
            try:
                peer = Peer(name, config, tokenizer, most, **python)
                self._stack.callback(peer.close)
                # A peer that does not work is found here rather than in the middle of the measurement.
                trial = SamplingParams(temperature=options.runs.temperature, max_tokens=PEER_TOKENS)
                peer.run(prompts[: peer.most], trial)
            except PeerUnavailable as error:
                self.skipped[name] = str(error)
            else:
                self.running.append(peer)

    def give_up(self, error: PeerUnavailable) -> None:
        """Continues without peers: their figures cannot be trusted after one of them died."""
        self.running, self.skipped[error.peer] = [], f"{error}; measured again without peers"


def _measured(
    launch: Launch,
    point: _Point,
    prompts: Sequence[Prompt],
    options: BenchOptions,
    peers: _Peers,
    report: Progress,
) -> dict[str, Any]:
    """Starts the pipelines of one setting and measures them."""
    runs = replace(options.runs, batch=point.batch)

    def progress(done: int, total: int, label: str) -> None:
        report(done, total, f"{point.label}: {label}")

    with ExitStack() as started:
        llm = started.enter_context(launch(point.config))
        beside = [
            MethodArm(started.enter_context(launch(other)), other.speculation.method, name)
            for name, other in point.besides.items()
        ]

        def measured(with_peers: Sequence[Peer]) -> Comparison:
            return compare(
                llm, prompts, runs, methods=options.methods, beside=beside, peers=with_peers, progress=progress
            )

        able = [peer for peer in peers.running if peer.most >= point.batch] if point.key in (None, BATCH) else []
        try:
            comparison = measured(able)
        except PeerUnavailable as error:
            peers.give_up(error)
            comparison = measured([])
        figures = {"sweep": point.key, "value": point.value, **_sizes(point.config), **comparison.to_json()}
        if point.key is None:
            params = replace(runs.params, max_tokens=TIMELINE_TOKENS)
            figures["rounds"] = {m: _rounds(llm, prompts[: point.batch], params, m) for m in options.methods}
        figures["degraded"] = llm.degraded
    return figures


def _points(config: Config, options: BenchOptions) -> Iterator[_Point]:
    swept = [(sweep.key, value) for sweep in options.sweeps for value in sweep.values]
    settings = [(None, None, config)]
    settings += [(key, value, load_config(config, [f"{key}={value}"])) for key, value in swept]
    for key, value, at in settings:
        besides = {beside.name: load_config(at, beside.settings) for beside in options.besides}
        yield _Point(key=key, value=value, config=at, besides=besides)


def _sizes(config: Config) -> dict[str, Any]:
    speculation = config.speculation
    return {"budget": speculation.forecast.budget, "siblings": speculation.siblings, "rows": speculation.rows}


def _rounds(llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, method: str) -> list[dict[str, Any]]:
    """Returns the rounds of one batch, recorded after all measuring."""
    with llm.watch() as rounds:
        llm.generate([prompt.text for prompt in prompts], replace(params, method=method))  # type: ignore[arg-type]
    return [asdict(one) for one in rounds]
