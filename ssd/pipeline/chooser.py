"""Choosing tokens for the rows of a batch whose requests sample differently."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..decoding.noise import gumbel
from ..decoding.processors import Constraint, Processors, ProcessorSettings
from ..decoding.sampling import SamplingTensors
from ..errors import RequestError
from ..params import SamplingParams
from .grammar import Grammars


class Chooser:
    """Sampling parameters of B slots, and the scores whose argmax is the token.

    Draft and verifier hold one each and come to the same noise for the same request and
    position: the coupling verification rests on.

    Args:
        horizon: how many positions ahead noise is made for. One shape, so that whatever is
            decoded and however, a position's noise comes out of the same code.
        compiled: makes the noise one function, like ``ForwardRunner.compiled``.
    """

    def __init__(
        self,
        batch: int,
        vocabulary: int,
        device: torch.device | str,
        *,
        horizon: int,
        compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda body: body,
    ):
        self.params = SamplingTensors.empty(batch, device)
        self.processors = Processors(batch, vocabulary, device)
        self.grammars: Grammars | None = None
        """Needed by requests with structured output."""
        self._vocabulary = vocabulary
        self._prepared: tuple[list[int], Tensor | None] | None = None
        ahead = torch.arange(1, horizon + 1, device=device)

        def noise(seeds: Tensor, lengths: Tensor) -> Tensor:
            return gumbel(seeds[:, None], lengths[:, None] + ahead, vocabulary)

        self._noise = compiled(noise)

    def set(self, slot: int, params: SamplingParams) -> None:
        self._prepared = None
        self.params = self.params.with_row(
            slot,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed,
        )

    def process(
        self, slot: int, params: SamplingParams, *, prompt: Sequence[int], output: Sequence[int], ends: Iterable[int]
    ) -> Constraint | None:
        """Set the slot's logits processors, if its request asks for any. ``prompt`` and ``output``:
        all its certain tokens. ``ends``: what ``min_tokens`` holds off. Returns the grammar of its
        output, to be advanced by every token that becomes certain from now on.

        Raises: RequestError: the grammar cannot be compiled; nothing is set.
        """
        if not params.processed:
            return None
        constraint = self._constraint(params, output)
        words = [word for word in params.bad_words if not isinstance(word, str)]
        if len(words) < len(params.bad_words):
            raise ValueError("bad_words reach the workers as token ids; the front resolves texts")
        settings = ProcessorSettings(
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=tuple(dict(params.logit_bias).items()),
            bad_words=tuple(words),
            allowed_token_ids=params.allowed_token_ids,
            min_tokens=params.min_tokens,
            end_ids=tuple(token for token in ends if 0 <= token < self._vocabulary),
        )
        self.processors.set(slot, settings, prompt=prompt, output=output, constraint=constraint)
        return constraint

    def steer(
        self, slot: int, params: SamplingParams, *, prompt: Sequence[int], output: Sequence[int], ends: Iterable[int]
    ) -> Constraint | None:
        """``process`` for a draft: a grammar that fails here costs guesses, no request."""
        process = partial(self.process, slot, prompt=prompt, output=output, ends=ends)
        try:
            return process(params)
        except RequestError:
            return process(replace(params, structured_outputs=None))

    def _constraint(self, params: SamplingParams, output: Sequence[int]) -> Constraint | None:
        if params.structured_outputs is None:
            return None
        if self.grammars is None:
            raise RequestError("structured_outputs: this worker has no tokenizer to compile grammars with")
        matcher = self.grammars.matcher(params.structured_outputs)
        if not all(matcher.advance(token) for token in output):
            raise RequestError("structured_outputs: the output so far does not match")
        return matcher

    def warm_up(self) -> None:
        """Compile the noise before a request needs it."""
        kept, self.params = self.params, self.params.with_row(0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
        self.noise(torch.zeros(len(kept.temperature), dtype=torch.int64, device=kept.temperature.device))
        self.params = kept

    def clear(self, slot: int) -> None:
        self.set(slot, SamplingParams())
        self.processors.clear(slot)

    def noise(self, lengths: Tensor) -> Tensor | None:
        """Noise ``[B, horizon, V]`` for the tokens at positions L + 1, L + 2, .. of every slot;
        None while nothing samples. ``lengths`` ``[B]``."""
        self._prepared = None  # graphs write where they wrote before
        if not self.params.random:
            return None
        return self._noise(self.params.seed, lengths)

    def prepare(self, known: list[int], lengths: Tensor) -> None:
        """Make the noise of ``lengths`` now; ``known`` is the same on the host."""
        self._prepared = known, self.noise(lengths)

    def prepared(self, known: list[int], lengths: Tensor) -> Tensor | None:
        """``noise(lengths)``: made before, if nothing has changed since, or now."""
        found = self._prepared
        return found[1] if found is not None and found[0] == known else self.noise(lengths)

    def processed(self, logits: Tensor, paths: Tensor | None) -> Tensor:
        """``[B, R, V]`` with the requests' processors applied. ``paths`` as for ``Processors.apply``:
        needed only while ``processors.active``."""
        return self.processors.apply(logits, paths) if self.processors.active else logits
