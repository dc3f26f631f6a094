"""Messages of the control lane: everything that crosses process borders outside the rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import PipelineError, RequestError
from ...request.output import FinishReason, Origin, SpeculationRecord
from ...request.sampling_params import SamplingParams
from .codec import Codec

MAX_MESSAGE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Submit:
    """Front → verifier: a request."""

    request: int
    prompt: list[int]
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancel:
    """Front → verifier."""

    request: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Admit:
    """Verifier → draft: a speculating request took a slot."""

    slot: int
    tokens: list[int]
    """All that is known of the sequence; the last one is the first root."""
    params: SamplingParams
    forecasts: bool
    """Prepare for its outcomes (``ssd``), or only draft when it waits (``sd``)."""
    prompt_length: int | None = None
    """How many of the tokens are the prompt; None: all."""
    ends: list[int] = field(default_factory=list)
    """Token ids that may not come before ``min_tokens``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bell:
    """Verifier → draft: the forward of this round is done, end the tree. Only where the link itself cannot tell."""

    round: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shutdown:
    """Front → verifier → draft."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GetTimings:
    """Front → verifier. ``reset`` starts a new window."""

    reset: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Verifier → front: medians (ms) since the last reset; None where nothing was timed."""

    round_ms: float | None
    hit_round_ms: float | None
    forward_ms: float | None
    draft_ms: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """Verifier → front: tokens that became certain in one round, and what the round was: where the
    front finds a stop string, it alone knows with which round the request ended."""

    request: int
    tokens: list[int]
    accepted: int
    """How many of the tokens were drafted."""
    depth: int = 0
    """How many drafted ones the round accepted, before any cut."""
    drafted: int = 0
    """Draft tokens the round verified for it."""
    hit: bool | None = None
    """Whether the round's tree was found prepared; None if none was looked up."""
    origin: Origin = "plain"
    committed_s: float = 0.0
    """On the verifier's monotonic clock."""
    decode_s: float = 0.0
    """Seconds since the end of prefill."""
    cached: int = 0
    """Prompt tokens whose keys and values were found, not computed."""
    logprobs: list[list] | None = None
    """The four fields of ``decoding.logprobs.Logprobs`` for these tokens, if asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Front → verifier: report rounds from now on, or no longer."""

    on: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """Verifier → front, while it watches: where the time of one round went. Seconds."""

    began_s: float
    """Of the verification, on the verifier's monotonic clock."""
    forward_s: float
    wait_s: float | None
    """In the exchange; None if no draft took part."""
    draft_s: float | None
    """The draft's own time for this round's speculation set: it ends within the exchange."""
    jit_s: float | None
    """Waiting for trees drafted after a miss."""
    round_s: float
    """From the beginning of this verification to where the next one may begin."""
    rows: int
    """Sequences in the round."""
    lookups: int
    hits: int
    tokens: int = 0
    """That the round made certain, of all rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """Verifier → front."""

    request: int
    reason: FinishReason
    record: SpeculationRecord
    decode_s: float
    error: str | None = None
    """Why, where the reason is ``error``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """Worker → front: models are loaded and warm."""

    role: str
    info: dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """Worker → front: it cannot go on. ``usage``: the user's to mend. ``degraded``: the
    verifier goes on without its draft, that of ``epoch``."""

    role: str
    message: str
    usage: bool = False
    degraded: bool = False
    epoch: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """Worker → front: it is up, and where its side of the link is (verifier only). Draft → verifier:
    its model is warm, it comes to the link now."""

    role: str
    rendezvous: dict | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """Front → worker: where to meet the other worker."""

    rendezvous: dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Reopen:
    """Front → verifier: the draft is gone, or to go; another will come under this epoch. Answered by
    ``Hello``."""

    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejoined:
    """Verifier → front: the draft of this epoch is there, speculation goes on."""

    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepare:
    """First rank → other ranks of the draft: trees ``[B][W]`` are under verification; send your share of the set."""

    round: int
    trees: list[list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """First rank → other ranks of the draft: the outcomes of these trees, as in an ``OutcomeFrame``, ``[B]`` each."""

    states: list[int]
    nodes: list[int]
    bonus: list[int]
    lookahead: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """First rank → other ranks of the verifier: run one decode forward of all slots with us."""

    plan: str
    """Name of its ``RowPlan``."""
    context: int
    tokens: list[list[int]]
    lengths: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill:
    """First rank → other ranks of the verifier: compute keys and values of a slot with us."""

    slot: int
    tokens: list[int]
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """First rank → other ranks of the verifier: give a slot another's first tokens, as we do."""

    source: int
    slot: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """First rank → other ranks of the verifier: copy scratch slots into main slots, as we do."""

    slots: list[int]
    scratch: list[int]
    positions: list[int]


Message = (
    Submit
    | Cancel
    | Admit
    | Bell
    | Prepare
    | Decided
    | Shutdown
    | GetTimings
    | Timings
    | Watch
    | RoundReport
    | Committed
    | Finished
    | Ready
    | Failed
    | Hello
    | Welcome
    | Reopen
    | Rejoined
    | Decode
    | Prefill
    | Copy
    | Keep
)
_CODEC = Codec(*Message.__args__, max_bytes=MAX_MESSAGE_BYTES, lane="control lane")


def encode(message: Message) -> bytes:
    """Returns the message as bytes. Raises: RequestError: a value is out of the wire's range."""
    return _CODEC.encode(message)


def decode(raw: bytes) -> Message:
    """Returns the message that the bytes hold. Raises: PipelineError: they hold none of the messages above."""
    try:
        return _CODEC.decode(raw)
    except RequestError as error:
        raise PipelineError(f"not a message of the control lane: {error}") from error
