"""Choosing tokens for the rows of a batch whose requests sample differently."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...decoding.noise import gumbel
from ...decoding.processors import Constraint, Processors, ProcessorSettings
from ...decoding.sampling import SamplingTensors, perturbed
from ...decoding.trees.combs import noise_at
from ...errors import RequestError
from ...models.cpu import operators
from ...request.sampling_params import SamplingParams
from .grammar import Grammars
from .selection import Selection


class Chooser:
    """Sampling parameters of B slots, and the scores whose argmax is the token.

    Draft and verifier hold one each and come to the same noise for the same request and
    position: the coupling verification rests on.

    Args:
        horizon: how many positions ahead noise is made for. One shape, so that whatever is
            decoded and however, a position's noise comes out of the same code.
        compiled: makes the noise one function, like ``ForwardRunner.compiled``, where it is not our operator.
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
        self.params = self._all = SamplingTensors.empty(batch, device)
        """Of the selected slots."""
        self.packed = self.params.packed()
        """The same for ``score``."""
        self._selected: Selection | None = None
        self._taken: dict[tuple[int, ...], tuple[SamplingTensors, Tensor]] = {}
        self.processors = Processors(batch, vocabulary, device)
        self.grammars: Grammars | None = None
        """Needed by requests with structured output."""
        self._vocabulary = vocabulary
        self._prepared: tuple[Selection | None, list[int], Tensor | None] | None = None
        self.filters = torch.device(device).type == "cpu" and operators.available()
        """Whether ``score`` knows top-k, top-p and min-p: where they are no sort."""
        ahead, draw = torch.arange(1, horizon + 1, device=device), gumbel
        if self.filters:
            draw, compiled = torch.ops.ssd.gumbel, lambda body: body  # one function as it is
        self._compiled, self._noises = compiled, dict[int, Callable[..., Tensor]]()

        def noise(seeds: Tensor, lengths: Tensor) -> Tensor:
            return draw(seeds[:, None], lengths[:, None] + ahead, vocabulary)

        self._noise = noise

    def select(self, selection: Selection | None) -> None:
        """Whose rows ``params``, ``noise`` and what follows from them are of from now on; None: of all slots."""
        if selection is not None and selection.index is None:
            selection = None
        if selection is not self._selected:
            self._selected = selection
            self._take()

    def _take(self) -> None:
        selected, everyone = self._selected, tuple[int, ...]()
        slots, index = (everyone, None) if selected is None else (selected.slots, selected.index)
        if slots not in self._taken:
            params = self._all if index is None else self._all.of(index)
            self._taken[slots] = params, params.packed()
        self.params, self.packed = self._taken[slots]

    def set(self, slot: int, params: SamplingParams) -> None:
        self._prepared = None
        self._all = self._all.with_row(
            slot,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed,
        )
        self._taken.clear()
        self._take()

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

    def warm_up(self, counts: Sequence[int] | None = None) -> None:
        """Compile the noise before a request needs it: of so many slots, of all by default."""
        for count in counts or (len(self._all.seed),):
            seeds = self._all.seed[:count]
            self._noise_of(seeds, torch.zeros_like(seeds))

    def clear(self, slot: int) -> None:
        self.set(slot, SamplingParams())
        self.processors.clear(slot)

    def noise(self, lengths: Tensor) -> Tensor | None:
        """Noise ``[B, horizon, V]`` for the tokens at positions L + 1, L + 2, .. of every selected slot;
        None while nothing samples. ``lengths`` ``[B]``."""
        self._prepared = None  # graphs write where they wrote before
        if not self.params.random:
            return None
        return self._noise_of(self.params.seed, lengths)

    def _noise_of(self, seeds: Tensor, lengths: Tensor) -> Tensor:
        if len(seeds) not in self._noises:
            self._noises[len(seeds)] = self._compiled(self._noise)
        return self._noises[len(seeds)](seeds, lengths)

    def prepare(self, known: list[int], lengths: Tensor) -> None:
        """Make the noise of ``lengths`` now; ``known`` is the same on the host."""
        noise = self.noise(lengths)
        self._prepared = self._selected, known, noise

    def prepared(self, known: list[int], lengths: Tensor) -> Tensor | None:
        """``noise(lengths)``: made before, if nothing has changed since, or now."""
        found = self._prepared
        if found is not None and found[0] is self._selected and found[1] == known:
            return found[2]
        return self.noise(lengths)

    def score(self, logits: Tensor, noise: Tensor, ahead: Tensor, packed: Tensor) -> Tensor:
        """Scores ``[B, R, V]`` whose argmax is the token, for bodies that are compiled. Temperature 0 goes with any
        noise; filters apply if ``filters``.

        Args:
            logits: float32 ``[B, R, V]``. noise: ``[B, H, V]``, of which row b, r takes ``ahead[b, r]``. packed:
                ``[B, 4]``, ``self.packed`` when the body runs.
        """
        if self.filters:
            return torch.ops.ssd.scores(logits, noise, ahead, packed, None, None)
        return perturbed(logits, noise_at(noise, ahead), packed[:, 0])

    @property
    def plain(self) -> bool:
        """Whether ``score`` is all that choosing takes now."""
        return not self.processors.active and (self.filters or not self.params.filtered)

    def processed(self, logits: Tensor, paths: Tensor | None) -> Tensor:
        """``[B, R, V]`` with the requests' processors applied. ``paths`` as for ``Processors.apply``:
        needed only while ``processors.active``."""
        return self.processors.apply(logits, paths) if self.processors.active else logits
