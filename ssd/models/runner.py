"""The forward runner: a model, its slot cache, and the forwards it runs over them."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError, RequestError
from .attention import row_attention, tree_attention
from .cache import SlotCache
from .checkpoints.support import usable_positions
from .cpu import operators
from .cpu.blocks_linear import BlocksLinear, count_weights
from .cpu.rows_linear import RowsLinear
from .cuda.graphs import Graphs
from .layers import FULL, Layers, attended, find_layers
from .parallel.sharding import Sharding
from .row_inputs import Attention, RowInputs, Rows, SideBySide, Unfolded
from .rows import Layout, RowPlan
from .states import step_by_rows
from .trial import compare

_NAMES: dict[Attention, str] = {"rows": row_attention.NAME, "tree": tree_attention.NAME, "model": "eager"}

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

FIRST_CONTEXT = 256
"""Slots of the smallest context tier; each further tier is four times the last."""


def can_compile() -> bool:
    """Returns whether ``torch.compile`` has the C++ compiler it needs on a CPU."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerOptions:
    """Sizes of a runner, and how it runs forwards."""

    batch: int
    """B, the number of slots."""
    capacity: int
    """Tokens of a sequence. Rows beyond it (the end of a speculation, the padding of a prompt's last chunk)
    are computed, and their results are meaningless."""
    scratch_slots: int
    """X, the scratch slots of each sequence."""
    prefill_chunk: int
    """Tokens of one prefill forward. The same for every request, so that a prompt's keys have the same bits
    whatever else runs."""
    vocabulary: int
    """V. Logits beyond it (padding of the output head) are cut off."""
    chain: int = 1
    """Most rows of a decode forward that follow each other in place: a root and its lookahead."""
    compile: bool = False
    """Compile decode forwards (``torch.compile``), once per form and context tier."""
    attention: Attention = "rows"
    """``rows`` masks every slot of the context tier; ``tree`` reads only the slots that rows attend, and needs
    no tiers. ``model`` is the model's own code, over copies of the keys; a runner turns to it by itself."""


class ForwardRunner:
    """Runs a causal LM over B fixed slots.

    Args:
        model: loaded by ``ssd.models.checkpoints.loading``; its attention is replaced.
        options: sizes, and how forwards run.
        graphs: captures forwards (CUDA).
        sharding: how the model was divided among ranks, if it was.

    Raises:
        ConfigError: the KV cache does not fit the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        options: RunnerOptions,
        *,
        graphs: Graphs | None = None,
        sharding: Sharding | None = None,
    ):
        self.model, self.batch, self.vocabulary = model, options.batch, options.vocabulary
        self.graphs, self.device, self.dtype = graphs, model.device, model.dtype
        layers = find_layers(model) if sharding is None else sharding.layers
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        if layers.recurrent is not None:
            step_by_rows(model, layers.recurrent)
        self.linears = layers.linears if sharding is None else None
        """Linear layers that may be replaced; None for all."""
        self.parameters = count_weights(model)
        # On a CPU, half of a small model's time goes into calling its kernels: the calls are made from C++,
        # which has no collectives.
        self._sharded = sharding is not None
        from_cpp = self.device.type == "cpu" and not self._sharded
        self._inductor: dict[str, Any] = {"guard_filter_fn": _no_guards, "cpp_wrapper": from_cpp}
        self._prefill = RowPlan.sequential("prefill", options.prefill_chunk)
        self._decode: dict[tuple, Callable[..., Tensor]] = {}
        self._layouts: dict[RowPlan, Layout] = {}
        self._compiled = 0
        self._fit(options, layers, tried=sharding is None)

    def _fit(self, options: RunnerOptions, layers: Layers, *, tried: bool) -> None:
        """Lays out for the attention that was asked for, or, if the model decodes wrong or not at all with it, for the
        model's own. Raises: ModelError: it does not decode right with either, or has too few positions."""
        text = self.model.config.get_text_config()
        known, first = usable_positions(text), layers.first_position
        if first and known is not None and options.capacity + first > known:
            what = f"{text.model_type}: knows {known - first} positions, {options.capacity} are needed"
            raise ModelError(f"{what}; lower engine.max_model_len")
        try:
            self._lay_out(options, layers, options.attention)
            if tried:
                compare(self, layers)
        except ModelError:
            if not tried:
                raise
            for name in ("cache", "_inputs"):  # freed before others are allocated
                self.__dict__.pop(name, None)
            self._lay_out(options, layers, "model")
            compare(self, layers)

    def _lay_out(self, options: RunnerOptions, layers: Layers, attention: Attention) -> None:
        """Allocates the cache, and lets the model attend over it."""
        model, text = self.model, self.model.config.get_text_config()
        own = attention == "model"
        model.config._attn_implementation = text._attn_implementation = _NAMES[attention]
        self.cache = SlotCache(
            (FULL,) * layers.count if own else attended(text, layers, options.capacity),
            batch=options.batch,
            main_slots=options.capacity,
            scratch_slots=options.scratch_slots,
            dtype=model.dtype,
            device=model.device,
            layers=layers,
            chain=options.chain,
        )
        if own:
            self._inputs: RowInputs = Unfolded(model, layers, self.cache)
        else:
            self._inputs = SideBySide(model, layers, self.cache, masked=attention == "rows")
        self.attention: Attention = attention
        # Code that was not written for this engine's attention was not written to be compiled or captured either.
        self.compile, self.graphs = options.compile and not own, None if own else self.graphs
        slots, tier = self.cache.main_slots, FIRST_CONTEXT
        self.contexts: list[int] = []
        while tier < slots and attention == "rows":
            self.contexts.append(tier)
            tier *= 4
        self.contexts.append(slots)

    def over(self, model: nn.Module, vocabulary: int | None = None) -> Self:
        """Returns a runner of ``model`` over the same slots: this runner's model with sublayers left out, or with other
        token ids, which are below ``vocabulary``."""
        twin = copy.copy(self)
        twin.model, twin._decode = model, {}
        twin.vocabulary = self.vocabulary if vocabulary is None else vocabulary
        return twin

    @property
    def chunk(self) -> int:
        """Tokens of one prefill forward."""
        return self._prefill.rows

    @property
    def shares_prefixes(self) -> bool:
        """Whether a slot's first tokens can be continued by another sequence. Recurrent layers keep the last state."""
        return self.cache.states is None

    @property
    def fuses(self) -> bool:
        """Whether one large body handed to ``compiled`` is faster than several small ones."""
        return self.compile or self.graphs is not None

    @property
    def ordered_sums(self) -> bool:
        """Whether the model sums in the same order however many rows a forward has.

        The CPU operators do. Experts do not: their number of rows depends on the routing."""
        text = self.model.config.get_text_config()
        experts = any(getattr(text, name, None) for name in _EXPERTS)
        if self._sharded or self.cache.states is not None:
            return False
        ordered = (RowsLinear, BlocksLinear)
        linears = {type(module) for module in self.model.modules() if isinstance(module, (nn.Linear, *ordered))}
        return self.attention == "tree" and operators.loaded() and linears <= {*ordered} and not experts

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of slots a decode forward may cover, ascending. Few, since each is compiled separately."""
        if (
            self._sharded
            or self.cache.states is not None
            or self.device.type != "cpu"
            or not (self.attention == "tree" and operators.loaded())
        ):
            return (self.batch,)  # other ranks do not know the slots, and other operators would copy their keys
        return (*(4**n for n in range(4) if 4**n < self.batch), self.batch)

    def context_for(self, longest: int) -> int:
        """Returns the smallest context tier that holds ``longest`` slots, or the largest tier."""
        return next((context for context in self.contexts if context >= longest), self.contexts[-1])

    @torch.no_grad()
    def forward(
        self,
        plan: RowPlan,
        tokens: Tensor,
        lengths: Tensor,
        *,
        longest: int,
        layout: Layout | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Runs one decode forward of all slots, or of some.

        Args:
            plan: what the R rows are.
            tokens: ``[B, R]`` int64.
            lengths: ``[B]`` int64, L of every slot.
            longest: maximum of ``lengths``, known on the host.
            layout: the plan's by default. Another layout moves the plan's rows; its limits are at most the plan's.
            slots: ``[B]`` int64, without repeats: the slots to run, where B is another of ``counts``.

        Returns:
            logits ``[B, R, V]`` float32.
        """
        context = self.context_for(longest + max(plan.limits) + 1)
        layout = layout or self._layout(plan)
        # Plans of one form (the steps of a draft tree) share one compiled shape.
        form = (plan.rows, plan.in_place, layout.mask is None, context, len(tokens))
        run = self._decode.get(form)
        if run is None:
            in_place = plan.in_place

            def decode(tokens: Tensor, lengths: Tensor, layout: Layout, slots: Tensor | None) -> Tensor:
                return self._logits(tokens, lengths, layout, in_place, context, slots)

            run = self._decode[form] = self.compiled(decode)
        return run(tokens.contiguous(), lengths, layout, slots)  # compiled for these strides, unguarded

    def logits(
        self,
        plan: RowPlan,
        tokens: Tensor,
        lengths: Tensor,
        context: int,
        layout: Layout | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """Does what ``forward`` does, for a given context tier and without compiling or capturing: for bodies that
        are handed to ``compiled`` as a whole. Returns ``[B, R, V]`` float32."""
        return self._logits(tokens, lengths, layout or self._layout(plan), plan.in_place, context, slots)

    def compiled(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """Returns ``body`` compiled and captured, as far as this runner compiles and captures.

        Its arguments must always have the shapes of its first call, and everything else it uses must stay
        unchanged. It is called on the worker's thread and stream, where the first call compiles and captures.
        Under graphs its result is overwritten by its next call, and by calls of bodies captured before it."""
        name, body = body.__name__, self._optimized(body)
        return body if self.graphs is None else self.graphs.of(body, name)

    def _optimized(self, body: Callable[..., Any]) -> Callable[..., Any]:
        if not self.compile:
            return body
        # Dynamo checks hundreds of facts about the model before every call (0.4 ms for six
        # layers, a tenth of a small target's forward). By the contract of ``compiled`` they stay true.
        # Without checks, a code object has one compiled shape, so each body gets its own copy.
        self._compiled += 1
        code = body.__code__.replace(co_name=f"{body.__name__}_{self._compiled}")
        own = FunctionType(code, body.__globals__, body.__name__, None, body.__closure__)
        # A copy: torch.compile removes guard_filter_fn from the dict that it is given.
        return torch.compile(own, fullgraph=True, dynamic=False, options=dict(self._inductor))

    @torch.no_grad()
    def prefill(self, slot: int, tokens: Sequence[int], start: int = 0) -> None:
        """Computes the keys and values of ``tokens`` for one slot, at positions from ``start`` on.

        Raises:
            RequestError: they do not fit the cache.
        """
        # The head's result on this one row is not used: transformers cannot leave the head out.
        for _ in self._chunks(slot, tokens, start, kept=1):
            pass

    @torch.no_grad()
    def prefill_logits(self, slot: int, tokens: Sequence[int], start: int = 0) -> Tensor:
        """Does what ``prefill`` does, for at most ``chunk`` tokens, and returns their logits ``[T, V]`` in the
        model's type."""
        [logits] = self._chunks(slot, tokens, start, kept=self.chunk)
        return logits[0, : len(tokens), : self.vocabulary]

    def _chunks(self, slot: int, tokens: Sequence[int], start: int, kept: int) -> Iterator[Tensor]:
        """Computes keys and values chunk by chunk. Yields the logits of the last ``kept`` rows of each."""
        plan, layout = self._prefill, self._layout(self._prefill)
        if start + len(tokens) > self.cache.main_slots:
            raise RequestError(f"{start + len(tokens)} tokens do not fit the cache")
        keep = {"logits_to_keep": kept} if self._keeps else {}
        for first in range(0, len(tokens), plan.rows):
            chunk = torch.tensor([tokens[first : first + plan.rows]], device=self.device)
            context = self.context_for(start + first + plan.rows)
            inputs = self._inputs.prefill(slot, chunk, start + first, layout, context)
            yield self.model(**inputs, **keep).logits

    def copy(self, source: int, slot: int, length: int) -> None:
        """Copies keys and values of ``source``'s first ``length`` tokens to ``slot``."""
        self.cache.copy(source, slot, length)

    def keep(self, slots: Tensor, scratch: Tensor, positions: Tensor) -> None:
        """Copies scratch slots to main slots.

        Args:
            slots: ``[n]`` int64, the sequences.
            scratch: ``[n]`` int64, their scratch slots.
            positions: ``[n]`` int64, the main slots to write.
        """
        self.cache.keep(slots, scratch, positions)

    def announce(self, plan: RowPlan, tokens: Tensor, lengths: Tensor, context: int) -> None:
        """Is called before every body that runs ``logits`` with these arguments. Does nothing here; a runner whose
        forwards involve other ranks tells them."""

    def warm_up(self, plans: Sequence[RowPlan], layout: Layout | None = None) -> None:
        """Runs (and so compiles) every plan once at every context tier."""
        lengths = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        for plan in plans:
            tokens = torch.zeros(self.batch, plan.rows, dtype=torch.int64, device=self.device)
            for context in self.contexts:
                self.forward(plan, tokens, lengths, longest=context - max(plan.limits) - 1, layout=layout)

    def _layout(self, plan: RowPlan) -> Layout:
        layout = self._layouts.get(plan)
        if layout is None:
            layout = self._layouts[plan] = Layout.of(plan, self.device)
        return layout

    def _logits(
        self, tokens: Tensor, lengths: Tensor, layout: Layout, in_place: int, context: int, slots: Tensor | None
    ) -> Tensor:
        rows = Rows(tokens=tokens, lengths=lengths, layout=layout, in_place=in_place, context=context, slots=slots)
        logits = self.model(**self._inputs.decode(rows)).logits
        return self._inputs.rows(logits, len(tokens))[..., : self.vocabulary].float()


def _no_guards(guards: list) -> list[bool]:
    return [False] * len(guards)
