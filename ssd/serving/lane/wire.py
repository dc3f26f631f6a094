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

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import msgpack

from ...errors import OverloadedError, PipelineError, RequestError, SSDError, UsageError
from ...request.output import RequestOutput, SpeculationRecord, StreamEvent, TokenLogprob
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


def encode(message: FromClient | FromServer) -> bytes:
    return cast(bytes, msgpack.packb({"type": type(message).__name__, **dataclasses.asdict(message)}))


def decode(raw: bytes, expected: Any) -> Any:
    """One of ``expected`` (``FromClient`` or ``FromServer``).

    Raises: PipelineError on anything else. RequestError: sampling parameters out of range.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise PipelineError(f"a message of {len(raw)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    types = {cls.__name__: cls for cls in expected.__args__}
    try:
        body: dict[str, Any] = msgpack.unpackb(raw, max_ext_len=0, max_bin_len=0)
        cls = types[body.pop("type")]
        if cls is Ask:
            body["params"] = SamplingParams(**body["params"])
        elif cls in (Tokens, Done):
            body["event"] = _event(body["event"])
        message = cls(**body)
        _check(message)
        return message
    except RequestError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as error:
        raise PipelineError(f"not a message of the client lane: {error}") from error


def _event(fields: dict[str, Any]) -> StreamEvent:
    output = fields["output"]
    if output is not None:
        read = {name: tuple(output[name]) for name in ("prompt_token_ids", "token_ids")}
        read |= {"speculation": SpeculationRecord(**output["speculation"]), "logprobs": _logprobs(output["logprobs"])}
        output = RequestOutput(**{**output, **read, "others": ()})  # each completion has its own last event
    lists = {name: tuple(fields[name]) for name in ("token_ids", "pieces", "provenance")}
    return StreamEvent(**{**fields, **lists, "output": output, "logprobs": _logprobs(fields["logprobs"])})


def _logprobs(fields: list[dict[str, Any]] | None) -> tuple[TokenLogprob, ...] | None:
    if fields is None:
        return None
    return tuple(TokenLogprob(**{**token, "top": tuple(map(tuple, token["top"]))}) for token in fields)


def _check(message: Any) -> None:
    """Field types of what clients send; the rest comes from our own server."""
    if isinstance(message, Ask):
        prompt = message.prompt
        good = isinstance(prompt, str) or (isinstance(prompt, list) and all(type(t) is int for t in prompt))
        if not good or type(message.number) is not int or type(message.credit) is not int:
            raise TypeError("prompt must be text or token ids")
        if type(message.priority) is not int:
            raise TypeError("priority must be an integer")
    elif isinstance(message, Drop | Credit | AskStats) and type(message.number) is not int:
        raise TypeError("number must be an integer")
    elif isinstance(message, Credit) and (type(message.events) is not int or message.events < 0):
        raise TypeError("events must be a count")
