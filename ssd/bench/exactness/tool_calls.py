"""Tool calls with speculation against tool calls without: the same parts, however many tokens come at once.

A grammar makes the model write calls in a format, so that any pair of models can be measured. Every prompt is answered
once with each method, as the server answers it. Then the tokens of the first method reach the parser again in groups of
fixed sizes; nothing is generated for that.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...engine.async_engine import AsyncEngine
from ...engine.detokenize import Detokenizer, StopRules
from ...engine.token_text import TokenTexts
from ...request.methods import Method
from ...request.sampling_params import SamplingParams
from ...serving.openai.answers import Chat
from ...serving.openai.generation import Generation
from ...serving.openai.jobs import Job
from ...serving.parsers.formats import CALL_FORMATS, REASONING_FORMATS, AnswerFormat, Tool
from ...serving.parsers.grammars import SPACES, Asked, call_grammar
from ...serving.parsers.parser import MakeParser
from ...serving.parsers.parts import Answer

TOOLS = (
    Tool(
        name="find_files",
        schema={
            "type": "object",
            "properties": {
                "pattern": {"type": "string", "maxLength": 12},
                "depth": {"type": "integer", "minimum": 0, "maximum": 99},
                "kinds": {"type": "array", "items": {"enum": ["file", "folder", "lien é"]}, "maxItems": 2},
            },
            "required": ["pattern", "depth", "kinds"],
            "additionalProperties": False,
        },
        strict=True,
    ),
    Tool(
        name="say",
        schema={
            "type": "object",
            "properties": {"text": {"type": "string", "maxLength": 20}},
            "required": ["text"],
            "additionalProperties": False,
        },
        strict=True,
    ),
)
ASKED = (
    Asked(tools=TOOLS),
    Asked(tools=TOOLS, forced=True),
    Asked(tools=TOOLS, forced=True, first_only=True),
    Asked(tools=TOOLS[1:], forced=True, first_only=True),
)
"""What requests ask for, in turns: ``auto`` with strict tools, ``required``, ``required`` without parallel calls, and
a named function."""
SIZES = range(1, 10)
"""Tokens that reach a parser at once."""
FREE = 16
"""Most characters of a piece of free text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to write calls and reasoning."""

    name: str
    calls: str
    reasoning: str = "none"
    prompt_end: str = ""
    special: bool = False
    """Whether the markers are special tokens. Otherwise they are text and are cut wherever the model's tokens are."""

    def format(self, tokenizer: Any) -> AnswerFormat:
        """Returns the format for a tokenizer, which has the markers as tokens exactly if ``special``."""
        if self.special:
            return AnswerFormat.of(tokenizer, None, calls=self.calls, reasoning=self.reasoning)
        return AnswerFormat(calls=self.calls, reasoning=self.reasoning, tokens={}, hidden=(), special=False)

    @property
    def markers(self) -> set[str]:
        """The markers of calls and reasoning."""
        return {*CALL_FORMATS[self.calls], *REASONING_FORMATS.get(self.reasoning, ())}


WAYS = (
    Way(name="hermes", calls="hermes"),
    Way(name="hermes+think", calls="hermes", reasoning="think", prompt_end="<think>"),
    Way(name="hermes+deepseek_r1, tokens", calls="hermes", reasoning="deepseek_r1", special=True),
    Way(name="qwen3_xml", calls="qwen3_xml"),
    Way(name="llama3_json", calls="llama3_json"),
    Way(name="mistral", calls="mistral"),
    Way(name="mistral+mistral, tokens", calls="mistral", reasoning="mistral", prompt_end="[THINK]", special=True),
    Way(name="gpt_oss", calls="gpt_oss", reasoning="gpt_oss", prompt_end="<|start|>assistant"),
    Way(name="gpt_oss, tokens", calls="gpt_oss", reasoning="gpt_oss", prompt_end="<|start|>assistant", special=True),
)
"""Every format of calls and of reasoning. With its markers as special tokens, ``mistral`` writes a call as a name and
arguments instead of an array."""
MARKERS = tuple(sorted({marker for way in WAYS if way.special for marker in way.markers}))
"""The special tokens that ways with such need."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts of one way at one temperature."""

    answers: int = 0
    """Prompts."""
    with_calls: int = 0
    """Answers with at least one call."""
    calls: int = 0
    reasoning: int = 0
    """Answers with reasoning."""
    cut: int = 0
    """Answers that the limit on tokens cut off."""
    tokens: int = 0
    """Of plain decoding."""
    most_at_once: dict[str, int] = field(default_factory=dict)
    """By method: most tokens that one event of a stream brought."""
    replays: int = 0
    different: list[str] = field(default_factory=list)
    """What was not identical."""
    digest: str = ""
    """SHA-256 of all answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Written:
    """What one method wrote."""

    tokens: tuple[int, ...]
    visible: tuple[int, ...]
    """The tokens that are part of the text."""
    answer: Answer
    reason: str | None
    most: int


async def compare(
    engine: AsyncEngine,
    prompts: Sequence[Sequence[int]],
    methods: Sequence[Method],
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    max_tokens: int = 96,
    ways: Sequence[Way] = WAYS,
    at_once: int = 8,
) -> dict[str, Any]:
    """Returns counts by way and temperature. Prompts take turns in the temperatures, then in what they ask for.

    Args:
        engine: running.
        prompts: token ids.
        methods: the first is what the others are compared with.
        max_tokens: of one answer.
        at_once: prompts in flight.
    """
    texts = TokenTexts(engine.tokenizer)
    told: dict[str, Any] = {}
    for way in ways:
        tallies = {temperature: Tally() for temperature in temperatures}
        digests = {temperature: hashlib.sha256() for temperature in temperatures}
        turns = asyncio.Semaphore(at_once)

        async def one(index: int, way: Way = way, turns: asyncio.Semaphore = turns) -> list[_Written]:
            async with turns:
                jobs = [
                    _job(way, engine.tokenizer, prompts, index, temperatures, method, max_tokens) for method in methods
                ]
                return [await _written(engine, job) for job in jobs]

        everything = await asyncio.gather(*(one(index) for index in range(len(prompts))))
        for index, written in enumerate(everything):
            temperature = temperatures[index % len(temperatures)]
            tally, where = tallies[temperature], f"{way.name}, prompt {index}, T={temperature:g}"
            _count(tally, methods, written, where)
            digests[temperature].update(json.dumps(asdict(written[0].answer)).encode())
            job = _job(way, engine.tokenizer, prompts, index, temperatures, methods[0], max_tokens)
            for size, answer in _replayed(texts, job, written[0].visible, cut=written[0].reason == "length"):
                tally.replays += 1
                if answer != written[0].answer:
                    tally.different.append(f"{where}: {size} tokens at once")
        for temperature in temperatures:
            tallies[temperature].digest = digests[temperature].hexdigest()
        told[way.name] = {f"T={temperature:g}": asdict(tally) for temperature, tally in tallies.items()}
    return told


def _job(
    way: Way,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    index: int,
    temperatures: Sequence[float],
    method: Method,
    max_tokens: int,
) -> Job:
    """Returns the job of one prompt. Ids of calls are the same with every method."""
    format, asked = way.format(tokenizer), ASKED[index // len(temperatures) % len(ASKED)]
    grammar = _bounded(call_grammar(format, format.thinking(way.prompt_end), asked))
    params = SamplingParams(
        temperature=temperatures[index % len(temperatures)],
        seed=index,
        max_tokens=max_tokens,
        skip_special_tokens=not format.special,
        structured_outputs={"grammar": grammar},  # pyright: ignore[reportArgumentType]
        method=method,
    )
    parser: MakeParser = format.parser(way.prompt_end, tools=asked.tools, first_only=asked.first_only)
    return Job(
        schema=Chat(),
        model="",
        prompts=[list(prompts[index])],
        choices=[(0, params)],
        stream=True,
        usage=False,
        provenance=False,
        parser=parser,
        id=f"{way.name}/{index}",
    )


def _bounded(grammar: str) -> str:
    """Returns the grammar with short pieces of free text and space: small models would never come to a call."""
    short = f"/(?s:.{{0,{FREE}}})"
    for many, few in ((SPACES, SPACES.replace("]*", "]{0,2}")), ("{0,24}", "{0,2}"), ("{0,8}", "{0,1}")):
        grammar = grammar.replace(many, few)
    return grammar.replace("/(?s:.*)/", f"{short}/").replace("[lazy]: /(?s:.*)", f"[lazy]: {short}")


async def _written(engine: AsyncEngine, job: Job) -> _Written:
    generation = await Generation.start(engine, job, client="")
    deltas = [delta async for delta in generation.deltas()]
    output = deltas[-1].event.output
    assert output is not None, "the last event of a request has its output"
    ends = generation.streams[0].request.ends
    return _Written(
        tokens=output.token_ids,
        visible=tuple(token for token in output.token_ids if token not in ends),
        answer=Answer.of(part for delta in deltas for part in delta.parts),
        reason=deltas[-1].finish_reason,
        most=max(len(delta.event.token_ids) for delta in deltas),
    )


def _count(tally: Tally, methods: Sequence[Method], written: Sequence[_Written], where: str) -> None:
    first = written[0]
    tally.answers += 1
    tally.with_calls += bool(first.answer.calls)
    tally.calls += len(first.answer.calls)
    tally.reasoning += bool(first.answer.reasoning)
    tally.cut += first.reason == "length"
    tally.tokens += len(first.tokens)
    for method, other in zip(methods, written, strict=True):
        tally.most_at_once[method] = max(tally.most_at_once.get(method, 0), other.most)
        for name in ("tokens", "answer", "reason"):
            if getattr(other, name) != getattr(first, name):
                tally.different.append(f"{where}: {name} of {method}")


def _replayed(texts: TokenTexts, job: Job, tokens: Sequence[int], *, cut: bool) -> Iterator[tuple[int, Answer]]:
    """Yields each size, and the answer that the parser reads from groups of that size."""
    [(_, params)] = job.choices
    for size in SIZES:
        parser = job.parser(job.call_ids(0))
        stream = texts.stream(job.prompts[0], skip_special_tokens=params.skip_special_tokens)
        detokenizer = Detokenizer(stream, StopRules.of(params))
        parts = []
        for at in range(0, len(tokens), size):
            parts += parser.feed(detokenizer.add(tokens[at : at + size]))
        parts += [*parser.feed(detokenizer.finish()), *parser.finish(cut=cut)]
        yield size, Answer.of(parts)
