"""``ssd chat`` and ``ssd top``: clients of a running server."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PipelineError, UsageError

if TYPE_CHECKING:
    from ..serving.remote import Rates, Remote

COLOURS = {"hit": "green", "miss": "yellow", "bonus": "blue", "plain": "default"}
UrlOption = Annotated[str, typer.Option(help="Address of the server.")]
KeyOption = Annotated[Path | None, typer.Option(help="A file with the API key, if the server requires one.")]


def chat(
    url: UrlOption = "http://127.0.0.1:8000",
    api_key_file: KeyOption = None,
    system: Annotated[str | None, typer.Option(help="A system message at the beginning.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Same seed, same tokens.")] = 0,
    method: Annotated[str | None, typer.Option(help="none, sd, self or ssd; by default the server's.")] = None,
) -> None:
    """Chat with a running server. Colours show where each token came from.

    /stats shows what speculation did so far, /clear starts a new conversation, an empty line ends the chat.
    """
    from rich.console import Console

    remote, console = _remote(url, api_key_file), Console()
    model = remote.get("/v1/models")["data"][0]["id"]
    begin = [{"role": "system", "content": system}] if system else []
    messages, talk = [*begin], Talk()
    console.print(f"{model} at {remote.url}; [green]hit[/] [yellow]miss[/] [blue]bonus[/] plain", highlight=False)
    while said := _input():
        if said in ("/stats", "/clear"):
            messages = [*begin] if said == "/clear" else messages
            console.print(str(talk) if said == "/stats" else "a new conversation", style="dim", highlight=False)
            continue
        messages.append({"role": "user", "content": said})
        body = {"model": model, "messages": messages, "temperature": temperature, "seed": seed, "provenance": True}
        body |= {"max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        try:
            answer, one = _answer(remote, console, body | ({"method": method} if method else {}))
        except (UsageError, PipelineError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
        if one.answers:
            console.print(str(one), style="dim", highlight=False)
            talk.add(one)


@dataclass(slots=True)
class Talk:
    """Counts of tokens, rounds and hits, over one or several answers."""

    answers: int = 0
    tokens: int = 0
    decode_s: float = 0.0
    rounds: int = 0
    steps: int = 0
    """Rounds that verified draft tokens."""
    drafted: int = 0
    accepted: int = 0
    lookups: int = 0
    hits: int = 0

    @classmethod
    def of(cls, usage: dict[str, Any], metrics: dict[str, Any]) -> Talk:
        """Reads the counts in the last chunk of an answer."""
        spec, own = metrics["speculative_decoding"], metrics["ssd"]
        return cls(
            answers=1,
            tokens=usage["completion_tokens"],
            decode_s=own["decode_s"],
            rounds=own["rounds"],
            steps=spec["num_spec_steps"],
            drafted=spec["num_draft_tokens"],
            accepted=spec["num_accepted_draft_tokens"],
            lookups=own["lookups"],
            hits=own["hits"],
        )

    def add(self, other: Talk) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def __str__(self) -> str:
        told = [f"{self.answers} answers" if self.answers != 1 else "", f"{self.tokens} tokens"]
        if self.decode_s:
            told.append(f"{self.tokens / self.decode_s:.1f} tok/s")
        told.append(f"{self.rounds} rounds")
        if self.drafted:
            told.append(f"acceptance {self.accepted / self.drafted:.2f}, length {1 + self.accepted / self.steps:.2f}")
        if self.lookups:
            told.append(f"hits {self.hits / self.lookups:.2f}")
        return ", ".join(filter(None, told))


def top(
    url: UrlOption = "http://127.0.0.1:8000",
    api_key_file: KeyOption = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates.")] = 1.0,
    count: Annotated[int, typer.Option(min=0, help="Number of updates; 0 continues until Ctrl-C.")] = 0,
) -> None:
    """Watch a running server: load, acceptance, forecast hits, and the time of rounds."""
    from rich.live import Live

    from ..serving.remote import Sample, rates, read_metrics

    remote = _remote(url, api_key_file)
    before = Sample(values=read_metrics(remote.text("/metrics")))
    looks = 0
    with Live(refresh_per_second=4) as live:
        while not count or looks < count:
            time.sleep(interval)
            after = Sample(values=read_metrics(remote.text("/metrics")))
            live.update(_table(remote.url, after.values, rates(before, after)), refresh=True)
            before, looks = after, looks + 1


def _remote(url: str, api_key_file: Path | None) -> Remote:
    from ..serving.remote import Remote

    key = None
    if api_key_file is not None:
        try:
            key = api_key_file.read_text(encoding="utf-8").split()[0]
        except (OSError, IndexError, UnicodeDecodeError) as error:
            raise UsageError(f"--api-key-file {api_key_file}: no key can be read ({error})") from None
    return Remote(url, key)


def _input() -> str:
    with contextlib.suppress(EOFError):
        return input("> ")
    return ""


def _answer(remote: Remote, console: Any, body: dict[str, Any]) -> tuple[str, Talk]:
    """Streams an answer to the terminal and returns its text and counts; Ctrl-C ends it, without counts."""
    text, talk = "", Talk()
    events = remote.events("/v1/chat/completions", body)
    with contextlib.closing(events), contextlib.suppress(KeyboardInterrupt):
        for event in events:
            if event.get("metrics"):
                talk = Talk.of(event["usage"], event["metrics"])
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                for token in choice.get("provenance", ()):
                    style = COLOURS[token["from"]]
                    console.print(token["text"], style=style, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return text, talk


def _table(url: str, values: dict[str, float], rates: Rates) -> Any:
    from rich.table import Table

    def percent(share: float | None) -> str:
        return "–" if share is None else f"{100 * share:.0f} %"

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    table = Table("", "", title=url, show_header=False)
    lost = "" if not values.get("ssd:draft_lost") else "  (the draft is lost)"
    running, waiting = values.get("ssd:num_requests_running", 0), values.get("ssd:num_requests_waiting", 0)
    table.add_row("requests", f"{running:.0f} running, {waiting:.0f} waiting{lost}")
    table.add_row("finished", f"{rates.requests_per_s:.1f} requests/s")
    table.add_row("tokens", f"{rates.tokens_per_s:.1f} tok/s")
    parts = "  ".join(f"[{COLOURS.get(name, 'default')}]{name} {percent(s)}[/]" for name, s in rates.provenance.items())
    table.add_row("came as", parts or "–")
    table.add_row("acceptance", f"rate {number(rates.acceptance_rate, 2)}, length {number(rates.acceptance_length, 2)}")
    table.add_row("forecast", f"hits {percent(rates.hit_rate)}")
    table.add_row("round", f"{number(rates.round_ms, 2)} ms")
    waits = f"waits {percent(rates.wait_share)}, after misses {percent(rates.jit_share)}"
    table.add_row("verifier", f"forwards {percent(rates.forward_share)}, {waits}")
    table.add_row("draft", f"busy {percent(rates.draft_busy_share)}")
    return table


COMMANDS = (chat, top)
