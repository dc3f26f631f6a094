"""The sections of a configuration, their keys and defaults; method and forecast are in ``speculation.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator

from .speculation import Number, Section, SpeculationConfig


class ModelConfig(Section):
    """A model, and the device and cores its worker runs on."""

    model: str = Field(min_length=1)
    """``embedded/target``, ``embedded/draft``, a local folder, a GGUF file, or ``package:NAME/FILE.gguf`` for a file
    inside an installed Python package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = Field(default="cpu", min_length=1)
    cores: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    """CPU cores the worker is pinned to. None: the operating system schedules it."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the forwards with torch. ``auto``: where a C++ compiler is found."""
    graphs: Literal["auto"] | bool = "auto"
    """Capture the forwards in CUDA graphs. ``auto``: on a GPU."""
    attention: Literal["auto", "rows", "tree"] = "auto"
    """``rows``: masked attention, any device. ``tree``: Triton kernels. ``auto``: ``tree`` on a GPU, else ``rows``."""
    weights: Literal["auto", "packed", "dequantised"] = "auto"
    """How a quantised model's weights are kept in memory. ``packed``: as in the file. ``auto``: packed for a GGUF file
    in float32 on a CPU where the operators can be built, and for a folder on a GPU if its format brings kernels."""
    adapter: str | None = Field(default=None, min_length=1)
    """Folder of a LoRA adapter (peft) that is merged into the weights."""
    priority: Literal["normal", "high"] = "normal"
    """Priority of the worker's CUDA stream where draft and target share a GPU."""

    @field_validator("device")
    @classmethod
    def _numbered(cls, device: str) -> str:
        """Gives each GPU one name: ``cuda`` is ``cuda:0``."""
        kind, _, index = device.partition(":")
        return f"cuda:{int(index or 0)}" if kind == "cuda" and (index.isdecimal() or not index) else device


class TargetConfig(ModelConfig):
    """The target, and how many ranks it is split over."""

    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """Ranks the model is split over, following the plan that comes with its architecture. ``cores`` are divided
    among them (every rank gets all if there are fewer cores than ranks); GPUs are numbered upwards from ``device``."""


class DraftConfig(ModelConfig):
    """The draft, and how many copies of it speculate in parallel."""

    data_parallel: int = Field(default=1, ge=1, le=16)
    """Ranks, each with a whole copy of the draft, that prepare for ``speculation.forecast.budget`` outcomes each.
    ``cores`` and GPUs are divided as for ``target.tensor_parallel``."""
    vocabulary: Literal["same", "shared"] = "same"
    """``same``: draft and target have one tokenizer; added tokens of one of them are never drafted. ``shared``: the
    tokenizers may differ, and the tokens that both have are drafted."""
    parallel: Literal["auto"] | bool | Annotated[int, Field(ge=0)] = "auto"
    """Draft all depths in one forward over mask tokens. ``auto``: if the draft's ``config.json`` names a mask token
    (``pard_token``). A number: the id of the mask token."""
    model: str = ""
    """As for the target; or ``propose``."""
    propose: str | None = Field(default=None, min_length=1)
    """A function that proposes candidates, in place of a model: ``module:function``, or the name of an installed one
    (entry points ``ssd.drafts``). Needs ``speculation.method: sd``."""
    propose_timeout_s: Number = Field(default=0.05, gt=0, le=10)
    """How long one call of it may take; decoding continues without a proposal."""


class EngineConfig(Section):
    """Sizes, scheduling, and deadlines in seconds."""

    max_batch: int = Field(default=1, ge=1, le=256)
    """Sequences decoded together."""
    max_model_len: int = Field(default=1024, ge=16)
    """Tokens of a sequence, prompt and output together."""
    prefill_chunk: int = Field(default=64, ge=8, le=2048)
    """Prompt tokens computed between two rounds."""
    prefix_caching: bool = True
    """Reuse cached keys and values of a prefix that an earlier prompt shares."""
    scheduling: Literal["fair", "priority"] = "fair"
    """Which waiting request starts next. ``fair``: clients take turns. ``priority``: the lowest ``priority`` value."""
    workers: Literal["auto", "processes", "threads"] = "auto"
    """``threads``: draft and target in one process, on two streams. ``auto``: threads where they share a GPU."""
    link: Literal["auto", "shared", "gloo", "nccl", "host"] = "auto"
    """Transport between draft and verifier. ``auto``: shared memory on one machine; between machines
    gloo for CPUs, ``host`` (ZMQ) if a GPU takes part."""
    link_timeout_s: Number = Field(default=60.0, gt=0)
    start_timeout_s: Number = Field(default=600.0, gt=0)
    draft_restarts: int = Field(default=3, ge=0, le=100)
    """How many times in a row a lost draft is restarted before the pipeline continues without it."""
    draft_restart_delay_s: Number = Field(default=1.0, gt=0)
    """Delay before the first restart; each further one waits twice as long."""


class ServerConfig(Section):
    """``ssd serve``: addresses, access, and limits on concurrent work."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to bind. Any but a loopback address requires an API key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free port."""
    model_name: str | None = Field(default=None, min_length=1)
    """Name of the model in requests and answers. None: the target's name."""
    api_key_file: str | None = Field(default=None, min_length=1)
    """A file with one key per line; clients send a key as a bearer token."""
    chat_template: str | None = Field(default=None, min_length=1)
    """A Jinja file to use instead of the tokenizer's chat template, or the name of one of the tokenizer's templates."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default={})
    """Variables of the chat template (``enable_thinking: false``), for requests that do not set them."""
    trust_request_chat_template: bool = False
    """Render chat templates that requests bring. A template is a program: trust every client."""
    tool_parser: Literal["auto", "none", "hermes", "qwen3_xml", "llama3_json", "mistral", "gpt_oss"] = "auto"
    """The format of the model's tool calls. ``auto``: by the markers in chat template and vocabulary."""
    reasoning_parser: Literal["auto", "none", "think", "deepseek_r1", "mistral", "gpt_oss"] = "auto"
    """The format of the model's reasoning, which answers give apart from the text. ``auto`` as above."""
    unknown_parameters: Literal["ignore", "refuse"] = "ignore"
    """``ignore``: unknown request fields have no effect and are named in a response header. ``refuse``: status 400."""
    generation_config: Literal["auto", "none"] = "auto"
    """Sampling parameters that requests leave out. ``auto``: those of the target's ``generation_config.json``, then the
    API's defaults. ``none``: the API's defaults."""
    long_requests: Literal["refuse", "cut"] = "refuse"
    """Where ``max_tokens`` is more than the prompt leaves room for. ``refuse``: status 400. ``cut``: lower it."""
    allowed_hosts: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Host names, besides the bound address, that requests may be addressed to."""
    allowed_origins: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Web origins, besides the server's own, whose pages may send requests."""
    max_body_bytes: int = Field(default=2**20, ge=1024, le=2**28)
    max_queue: int = Field(default=256, ge=0)
    """Requests that may wait for a slot; further ones are answered with status 429."""
    max_tokens_in_flight: int = Field(default=2**18, ge=16)
    """Prompt and output tokens of all requests, waiting or running; a request beyond is answered with status 429."""
    responses_bytes: int = Field(default=2**26, ge=0)
    """Memory for answers of /v1/responses that clients may refer to later. 0 keeps none."""
    keep_alive_s: int = Field(default=75, ge=1, le=86400)
    """How long an idle connection stays open for a client's next request."""
    drain_s: Number = Field(default=25.0, ge=0, le=86400)
    """How long running requests may take to finish after SIGTERM or Ctrl-C. 0 cuts them at once."""
    metrics: Literal["key", "open"] | Annotated[int, Field(ge=1, le=65535)] = "key"
    """Access to ``/metrics``. ``key``: as to every path. ``open``: without an API key. A number: on this port of
    ``server.host`` instead, without a key."""
    request_metrics: Literal["none", "summary", "detailed"] = "summary"
    """``metrics`` of answers: none, times and acceptance, or with lists of each round's drafted and accepted tokens."""
    otlp_traces_endpoint: str | None = Field(default=None, min_length=1)
    """URL of an OpenTelemetry collector that traces of requests are sent to: OTLP over HTTP if its path is
    ``/v1/traces``, else over gRPC. Needs ``ssd-engine[otel]``."""
    shadow_rate: Number = Field(default=0.0, ge=0, le=1)
    """Share of the finished requests that are decoded again plainly and compared."""
    lane: str | None = Field(default=None, min_length=1)
    """Endpoint for ``ssd.Client``: ``ipc://PATH``, or ``tcp://HOST:PORT`` with keys. None: no endpoint."""
    lane_keys: str | None = Field(default=None, min_length=1)
    """Folder of CURVE keys for a tcp lane, as ``ssd lane-keys`` writes it."""


class CostConfig(Section):
    """Prices, for the figures of ``ssd plan`` and ``/metrics``."""

    target_per_hour: Number | None = Field(default=None, ge=0)
    """Price of one of the target's devices for an hour. None: not known; costs are in device-hours."""
    draft_per_hour: Number | None = Field(default=None, ge=0)
    """Price of one of the draft's devices for an hour. None: as the target's."""
    currency: str = Field(default="USD", min_length=1, max_length=16)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldDevices:
    """The devices that a model's workers hold."""

    worker: Literal["target", "draft"]
    count: int
    price_per_hour: float | None
    """Of one device; None if it is not configured."""


class Config(Section):
    """A pair of target and draft, and how to run it."""

    target: TargetConfig
    draft: DraftConfig | None = None
    """Required unless ``speculation.method`` is ``none`` or ``self``."""
    speculation: SpeculationConfig = SpeculationConfig()
    numerics: Literal["strict", "fast"] = "strict"
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()
    cost: CostConfig = CostConfig()

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of all workers: ``verifier``, ``verifier-1``, …, then ``draft``, ``draft-1``, …"""
        return (*_ranks("verifier", self.target.tensor_parallel), *self.draft_roles)

    @property
    def devices(self) -> tuple[HeldDevices, ...]:
        """The devices of all workers; a CPU worker counts as one. A draft on the target's GPU holds none of its own."""
        cost = self.cost
        found = [HeldDevices(worker="target", count=self.target.tensor_parallel, price_per_hour=cost.target_per_hour)]
        if self.draft is not None:
            shared = self.draft.device == self.target.device != "cpu"
            count = 0 if shared else self.draft.data_parallel
            price = cost.target_per_hour if cost.draft_per_hour is None else cost.draft_per_hour
            found.append(HeldDevices(worker="draft", count=count, price_per_hour=price))
        return tuple(found)

    @property
    def draft_roles(self) -> tuple[str, ...]:
        """Names of the draft's ranks; empty without a draft."""
        return () if self.draft is None else _ranks("draft", self.draft.data_parallel)

    def for_role(self, role: str) -> Config:
        """Returns the configuration a worker reads: with the cores and the device of its own rank."""
        rank, changed = rank_of(role), {}
        if section_of(role) == "target":
            changed["target"] = _share(self.target, rank, self.target.tensor_parallel)
        elif self.draft is not None:
            changed["draft"] = _share(self.draft, rank, self.draft.data_parallel)
        return self.model_copy(update=changed)


def rank_of(role: str) -> int:
    """Returns a worker's rank among the verifier's or the draft's ranks."""
    return int(role.partition("-")[2] or 0)


def section_of(role: str) -> Literal["target", "draft"]:
    """Returns the section of the configuration that describes a role's worker."""
    return "draft" if role.partition("-")[0] == "draft" else "target"


def _ranks(first: str, count: int) -> tuple[str, ...]:
    return (first, *(f"{first}-{rank}" for rank in range(1, count)))


def _share(model: ModelConfig, rank: int, ranks: int) -> ModelConfig:
    if ranks == 1:
        return model
    changed: dict[str, Any] = {}
    if model.cores is not None:
        changed["cores"] = model.cores[rank::ranks] or model.cores
    kind, _, index = model.device.partition(":")
    if kind == "cuda":
        changed["device"] = f"cuda:{int(index or 0) + rank}"
    return model.model_copy(update=changed)
