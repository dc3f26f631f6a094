"""Messages between ``ssd.Client`` and the server's client lane: msgpack maps with bounded lengths.

::

    client (DEALER)                               server (ROUTER)
      Hello ───────────────────────────────────►
            ◄─────────────────────────────────── Hi: session, model, limits
      Ask: number, prompt, parameters, credit ─►
            ◄─────────────────────────────────── Tokens (one credit each) …
      Credit: as events are read ──────────────►
            ◄─────────────────────────────────── Done | Refused
      Drop: give a request up ─────────────────►
      AskStats: number ────────────────────────►
            ◄─────────────────────────────────── Stats
      Ping, every HEARTBEAT_S ─────────────────►
            ◄─────────────────────────────────── Pong: session

A session is one life of the server: when it changes, requests in flight are asked again, and the
tokens known already are skipped (the answer is a function of prompt and parameters; where it is not,
see ``Hi.repeats``, a request that has tokens fails instead).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import OverloadedError, PipelineError, RequestError, SSDError, UsageError
from ...pipeline.transport.codec import Codec
from ...request.output import StreamEvent
from ...request.sampling_params import SamplingParams

VERSION = 2
MAX_MESSAGE_BYTES = 8 * 2**20
HEARTBEAT_S = 2.0
SILENT_S = 12.0
"""Whoever says nothing for so long is gone."""
CREDIT = 64
"""Events of a request under way to a client that has not read them yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    version: int = VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class Hi:
    session: str
    model: str
    max_model_len: int
    repeats: bool = True
    """Whether a sampled answer is a function of prompt and parameters, so that it can go on after a
    restart; under the rules ``rejection`` and ``block`` only greedy ones are."""
    version: int = VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    number: int
    prompt: str | list[int]
    params: SamplingParams
    credit: int
    priority: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Credit:
    number: int
    events: int

    def __post_init__(self) -> None:
        if self.events < 0:
            raise ValueError("events must be a count")


@dataclass(frozen=True, kw_only=True, slots=True)
class AskStats:
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ping:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Pong:
    session: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    number: int
    event: StreamEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A last event, with its output; one for every completion."""

    number: int
    event: StreamEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    number: int
    values: dict[str, float]
    """What ``/metrics`` has, by sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    number: int
    kind: str
    message: str


FromClient = Hello | Ask | Drop | Credit | AskStats | Ping
FromServer = Hi | Pong | Tokens | Done | Stats | Refused

_ERRORS: dict[str, type[SSDError]] = {
    cls.__name__: cls for cls in (RequestError, OverloadedError, UsageError, PipelineError)
}


def refusal(number: int, error: SSDError) -> Refused:
    kind = next(name for name, cls in (*_ERRORS.items(), ("PipelineError", SSDError)) if isinstance(error, cls))
    return Refused(number=number, kind=kind, message=str(error))


def raised(message: Refused) -> SSDError:
    """The error a refusal stands for."""
    return _ERRORS.get(message.kind, PipelineError)(message.message)


_CODECS = {
    union: Codec(*union.__args__, max_bytes=MAX_MESSAGE_BYTES, lane="client lane") for union in (FromClient, FromServer)
}


def encode(message: FromClient | FromServer) -> bytes:
    """Returns the message as bytes. Raises: RequestError: a value is out of the wire's range."""
    return _CODECS[FromClient].encode(message)


def decode(raw: bytes, expected: Any) -> Any:
    """Returns the message that the bytes hold, one of ``expected`` (``FromClient`` or ``FromServer``).

    Raises:
        PipelineError: the bytes hold no such message.
        RequestError: sampling parameters are out of range.
    """
    return _CODECS[expected].decode(raw)
