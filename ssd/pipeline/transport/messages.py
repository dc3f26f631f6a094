"""Messages of the control lane: everything that crosses process borders outside the rounds."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import PipelineError, RequestError
from ...request.output import FinishReason, Origin, SpeculationRecord
from ...request.sampling_params import SamplingParams
from ..round.frames import OutcomeFrame
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
    """The sequence so far. Its last token is the first root."""
    params: SamplingParams
    forecasts: bool
    """Whether to prepare for its outcomes (``ssd``), or only to draft when it waits (``sd``)."""
    prompt_length: int | None = None
    """How many of the tokens are the prompt; None: all."""
    ends: list[int] = field(default_factory=list)
    """Token ids that may not come before ``min_tokens``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bell:
    """Verifier → draft: the forward of this round is done, end the tree. Sent only where the link cannot tell."""

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
    """Verifier → front: the tokens that became certain in one round, and the facts of the round. The front needs
    them: only it finds stop strings, and so knows with which round a request ended."""

    request: int
    tokens: list[int]
    accepted: int
    """Number of the tokens that were drafted."""
    depth: int = 0
    """Number of drafted tokens that the round accepted, before any cut."""
    drafted: int = 0
    """Draft tokens that the round verified for the request."""
    hit: bool | None = None
    """Whether the round's tree was found in a speculation set; None if it was not looked up."""
    origin: Origin = "plain"
    committed_s: float = 0.0
    """Time of the commit, on the verifier's monotonic clock."""
    decode_s: float = 0.0
    """Seconds since the end of prefill."""
    cached: int = 0
    """Prompt tokens whose keys and values were found instead of computed."""
    logprobs: list[list] | None = None
    """The four fields of ``decoding.logprobs.Logprobs`` for these tokens, if asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Verifier → front: log-probabilities of a request's next prompt tokens, in order, from the second token on. Sent
    before its first ``Committed``, if asked for."""

    request: int
    logprobs: list[list]
    """The four fields of ``decoding.logprobs.Logprobs``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Front → verifier: start or stop to report rounds."""

    on: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundReport:
    """Verifier → front, while it watches: where the seconds of one round went."""

    began_s: float
    """Start of the verification, on the verifier's monotonic clock."""
    forward_s: float
    wait_s: float | None
    """Time in the exchange; None if no draft took part."""
    draft_s: float | None
    """Time that the draft took for this round's speculation set, which ends within the exchange."""
    jit_s: float | None
    """Waiting for trees drafted after a miss."""
    round_s: float
    """From the start of this verification to the moment the next one may start."""
    rows: int
    """Sequences in the round."""
    lookups: int
    hits: int
    tokens: int = 0
    """Tokens that the round made certain, in all rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """Verifier → front."""

    request: int
    reason: FinishReason
    record: SpeculationRecord
    decode_s: float
    error: str | None = None
    """Message of the error, if the reason is ``error``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """Worker → front: models are loaded and warm."""

    role: str
    info: dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """Worker → front: the worker cannot continue, or the verifier continues without its draft."""

    role: str
    message: str
    usage: bool = False
    """The cause is the user's input; the message says what to change."""
    degraded: bool = False
    """The pipeline continues without this worker."""
    epoch: int | None = None
    """Of the draft that was lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """Worker → front: it is up. Draft → verifier: its model is warm, it comes to the link now."""

    role: str
    rendezvous: dict | None = None
    """Where to meet the verifier (``Rendezvous``); sent by the verifier only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """Front → worker: where to meet the other worker."""

    rendezvous: dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Reopen:
    """Front → verifier: the draft is gone or will be; wait for another under this epoch. Answered by ``Hello``."""

    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejoined:
    """Verifier → front: the draft of this epoch is linked, speculation continues."""

    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepare:
    """First rank → other ranks of the draft: trees ``[B][W]`` are under verification; send your share of the set."""

    round: int
    trees: list[list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """First rank → other ranks of the draft: the outcomes of the trees they prepared for."""

    outcome: OutcomeFrame


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
    logits: bool
    """Whether to compute the logits of all tokens, too."""


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
    | Scored
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
