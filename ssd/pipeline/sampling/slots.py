"""The sampling state of slots whose requests ask for different things."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...decoding.noise import gumbel
from ...decoding.processors import Constraint, Processors, ProcessorSettings, processed_alike
from ...decoding.sampling import SamplingTensors, likely, perturbed, scores
from ...decoding.trees.combs import noise_at
from ...errors import RequestError
from ...grammars.compiler import Grammars
from ...models.cpu import operators
from ...request.sampling_params import SamplingParams
from .selection import Selection


class SlotSampling:
    """Sampling parameters of B slots, and the scores whose argmax is the chosen token.

    Draft and verifier hold one each. Both compute the same noise for the same request and position, which is what
    coupled verification rests on.

    Args:
        horizon: H, how many positions ahead noise is computed for. One fixed shape, so that the noise of a position
            always comes from the same code.
        compiled: ``ForwardRunner.compiled``, for the noise where it is not one operator already.
        grammars: compiles the grammars of structured outputs; without it such requests are refused.
    """

    def __init__(
        self,
        batch: int,
        vocabulary: int,
        device: torch.device | str,
        *,
        horizon: int,
        compiled: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda body: body,
        grammars: Grammars | None = None,
    ):
        self.params = self._all = SamplingTensors.empty(batch, device)
        """Parameters of the selected slots."""
        self.packed = self.params.packed()
        """The same as one tensor ``[B, 4]``, for ``score``."""
        self._selected: Selection | None = None
        self._taken: dict[tuple[int, ...], tuple[SamplingTensors, Tensor]] = {}
        self.processors = Processors(batch, vocabulary, device)
        self.grammars, self._vocabulary = grammars, vocabulary
        self._prepared: tuple[Selection | None, list[int], Tensor | None] | None = None
        self.filters = torch.device(device).type == "cpu" and operators.available()
        """Whether ``score`` applies top-k, top-p and min-p exactly: true where that needs no sort."""
        ahead, draw = torch.arange(1, horizon + 1, device=device), gumbel
        if self.filters:
            draw, compiled = torch.ops.ssd.gumbel, lambda body: body  # one operator already
        self._compiled, self._noises = compiled, dict[int, Callable[..., Tensor]]()

        def noise(seeds: Tensor, lengths: Tensor) -> Tensor:
            return draw(seeds[:, None], lengths[:, None] + ahead, vocabulary)

        self._noise = noise

    def select(self, selection: Selection | None) -> None:
        """Makes ``params``, ``packed`` and ``noise`` those of the selected slots; None selects all slots."""
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
        """Gives the slot a request's parameters. Its processors are set by ``process``."""
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

    def clear(self, slot: int) -> None:
        """Frees the slot: greedy, without processors."""
        self.set(slot, SamplingParams())
        self.processors.clear(slot)

    def process(
        self, slot: int, params: SamplingParams, *, prompt: Sequence[int], output: Sequence[int], ends: Iterable[int]
    ) -> Constraint | None:
        """Sets the slot's logits processors, if its request asks for any. ``prompt`` and ``output`` are all its certain
        tokens, ``ends`` the end-of-text ids that ``min_tokens`` excludes. Returns the grammar of the output, to be
        advanced by every token that becomes certain from now on.

        Raises:
            RequestError: the grammar cannot be compiled; nothing is set.
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

    def grammar_ready(self, params: SamplingParams) -> bool:
        """Whether ``process`` has no grammar to wait for. Starts to compile the request's grammar if it has one."""
        wanted = params.structured_outputs
        return wanted is None or self.grammars is None or self.grammars.ready(wanted)

    def process_leniently(
        self, slot: int, params: SamplingParams, *, prompt: Sequence[int], output: Sequence[int], ends: Iterable[int]
    ) -> Constraint | None:
        """``process`` for a draft. If the grammar cannot be compiled the slot has none: worse guesses, no error."""
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
        """Compiles the noise for these numbers of slots, or for all slots."""
        for count in counts or (len(self._all.seed),):
            seeds = self._all.seed[:count]
            self._noise_of(seeds, torch.zeros_like(seeds))

    def noise(self, lengths: Tensor) -> Tensor | None:
        """Returns the noise ``[B, H, V]`` of the positions L + 1, L + 2, ... of the selected slots, or None if no slot
        samples. ``lengths``: L ``[B]``."""
        self._prepared = None  # a captured graph overwrites its last result
        if not self.params.random:
            return None
        return self._noise_of(self.params.seed, lengths)

    def _noise_of(self, seeds: Tensor, lengths: Tensor) -> Tensor:
        if len(seeds) not in self._noises:
            self._noises[len(seeds)] = self._compiled(self._noise)
        return self._noises[len(seeds)](seeds, lengths)

    def prepare(self, known: list[int], lengths: Tensor) -> None:
        """Computes ``noise(lengths)`` now, for ``prepared``. ``known``: the lengths on the host."""
        noise = self.noise(lengths)
        self._prepared = self._selected, known, noise

    def prepared(self, known: list[int], lengths: Tensor) -> Tensor | None:
        """``noise(lengths)``: the prepared one if nothing has changed since, else computed now."""
        found = self._prepared
        if found is not None and found[0] is self._selected and found[1] == known:
            return found[2]
        return self.noise(lengths)

    def score(
        self,
        logits: Tensor,
        noise: Tensor,
        ahead: Tensor | int,
        packed: Tensor,
        adjustments: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Scores ``[B, R, V]`` whose argmax is the token, for compiled functions: everything is an argument.

        Exact without ``adjustments`` if ``plain``. With them likely, which is enough for a draft's guesses: processors
        are those after the certain tokens, and filters that need a sort consider the most probable tokens only.

        Args:
            logits: float32 ``[B, R, V]``.
            noise: ``[B, H, V]``, anything at temperature 0. ``ahead`` is each row's place in it, as for ``noise_at``.
            packed: ``[B, 4]``, ``self.packed`` when the function runs.
            adjustments: ``[B, 3, V]``, ``Processors.fixed``. Without it, filters that need a sort are left out.
            allowed: bool ``[B, R, V]``, ``Processors.allowed``.
        """
        if self.filters:
            if isinstance(ahead, int):
                ahead = torch.full(logits.shape[:2], ahead, dtype=torch.int64, device=logits.device)
            return torch.ops.ssd.scores(logits, noise, ahead, packed, adjustments, allowed)
        if adjustments is not None:
            logits = likely(processed_alike(logits, adjustments, allowed), packed)
        return perturbed(logits, noise_at(noise, ahead), packed[:, 0])

    @property
    def plain(self) -> bool:
        """Whether ``score`` is exact now without adjustments."""
        return not self.processors.active and (self.filters or not self.params.filtered)

    def exact(
        self, logits: Tensor, noise: Tensor | None, ahead: Tensor | int, paths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Processed logits and scores of the selected slots, ``[B, R, V]`` each, with everything their requests ask
        for. Arguments as for ``score``, ``noise`` None if no slot samples, and ``paths`` as for ``processed``."""
        logits = self.processed(logits, paths)
        return logits, scores(logits, self.params, None if noise is None else noise_at(noise, ahead))

    def processed(self, logits: Tensor, paths: Tensor | None) -> Tensor:
        """Returns ``logits [B, R, V]`` with the requests' processors applied. ``paths``: as for ``Processors.apply``,
        needed only while ``processors.active``."""
        return self.processors.apply(logits, paths) if self.processors.active else logits
