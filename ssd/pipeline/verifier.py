"""The verifier worker: the target model, its sequences, and what each round decides.
Decisions only; ``loops`` moves the frames and the messages."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoding.forecast import Forecast
from ..decoding.tree import ABSENT, TreeShape
from ..decoding.verify import Outcome, verify_coupled
from ..models.rows import RowPlan
from ..models.runner import ForwardRunner
from ..params import FinishReason, Method, Origin
from .chooser import Chooser
from .frames import RowState, SpeculationSet
from .lookup import lookup
from .messages import Admit, Submit
from .sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """What a round made certain for one request."""

    request: int
    tokens: list[int]
    accepted: int
    drafted: int
    origin: Origin
    finished: FinishReason | None
    sequence: Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a round decided."""

    outcome: Outcome
    states: Tensor
    """``[B]`` int64 of ``RowState``: for the draft."""
    commits: list[Commit]
    forward_s: float


class VerifierWorker:
    """Leads the round.

    Args:
        runner: of the target model.
        method: of requests that do not choose one. jit: whether missed ``ssd`` rows wait for the
            draft (fallback ``jit``) or go on plainly (``none``).
        strict: every decode forward has the same rows, plain decoding too. Otherwise plain
            rounds run one row a sequence.
        ends: end-of-text ids. max_model_len: tokens of a sequence, prompt included.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        *,
        shape: TreeShape,
        forecast: Forecast,
        method: Method,
        jit: bool,
        strict: bool,
        ends: frozenset[int],
        max_model_len: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.runner, self.shape, self.jit = runner, shape, jit
        self.method: Method = method
        self.strict, self.ends, self.max_model_len, self.clock = strict, ends, max_model_len, clock
        self.waiting: deque[Sequence] = deque()
        self.rows: list[Sequence | None] = [None] * runner.batch
        self.drafting = True
        """False once the draft is lost: everything decodes plainly from then on."""
        self.trees = torch.full((runner.batch, shape.nodes), ABSENT)
        self.origins: list[Origin] = ["plain"] * runner.batch
        """Of the candidates in ``trees``."""
        self.lookups = self.hits = 0
        """Of the round before."""
        self.chooser = Chooser(
            runner.batch, runner.vocabulary, runner.device, horizon=shape.depth + 1, compile=runner.compile
        )
        self._parents, self._depths = shape.parent_index(), shape.depth_index()
        self._ancestors = shape.ancestors()
        self._plan_nodes = torch.tensor(forecast.nodes)
        self._tree, self._one = RowPlan.tree("verify", shape), RowPlan.sequential("one", 1)

    def warm_up(self) -> None:
        """Compile every form a round needs."""
        self.runner.warm_up([self._tree] if self.strict else [self._tree, self._one])
        self.chooser.warm_up()

    @property
    def idle(self) -> bool:
        return not self.waiting and not any(self.rows)

    def speculates(self, row: Sequence | None) -> bool:
        return self.drafting and row is not None and row.method in ("sd", "ssd")

    @property
    def speculating(self) -> bool:
        """Whether the draft takes part in the next round."""
        return any(self.speculates(row) for row in self.rows)

    def submit(self, message: Submit) -> None:
        """Queue a request (checked by the front)."""
        params = message.params
        method: Method = params.method or self.method
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.ends)
        self.waiting.append(
            Sequence(
                request=message.request,
                params=params,
                method=method,
                tokens=list(message.prompt[:-1]),
                root=message.prompt[-1],
                prompt_length=len(message.prompt),
                context_limit=self.max_model_len,
                ends=ends,
            )
        )

    def cancel(self, request: int) -> Sequence | None:
        """Forget a request; its slot is free at once."""
        for slot, row in enumerate(self.rows):
            if row is not None and row.request == request:
                self._free(slot)
                return row
        for row in self.waiting:
            if row.request == request:
                self.waiting.remove(row)
                return row
        return None

    def admit(self) -> list[tuple[int, Admit | None]]:
        """Give free slots to waiting requests: their slots, and what to tell the draft."""
        admitted: list[tuple[int, Admit | None]] = []
        for slot, row in enumerate(self.rows):
            if row is None and self.waiting:
                row = self.rows[slot] = self.waiting.popleft()
                self.chooser.set(slot, row.params)
                self.trees[slot] = ABSENT
                self.trees[slot, 0] = row.root
                told = Admit(
                    slot=slot, tokens=[*row.tokens, row.root], params=row.params, forecasts=row.method == "ssd"
                )
                admitted.append((slot, told if self.speculates(row) else None))
        return admitted

    def prefill(self, slot: int) -> None:
        row = self.rows[slot]
        assert row is not None
        if row.tokens:
            self.runner.prefill(slot, row.tokens)
        row.started_s = self.clock()

    def verify(self) -> Verdict:
        """One target forward over the trees, and what it decides."""
        lengths_list = [len(row.tokens) if row is not None else 0 for row in self.rows]
        lengths = torch.tensor(lengths_list, device=self.runner.device)
        plan = self._plan()
        tokens = self.trees[:, : plan.rows]
        began = self.clock()
        logits = self.runner.forward(
            # A draft may send anything: what is no token is fed as some token, and never accepted.
            plan,
            tokens.clamp(0, self.runner.vocabulary - 1).to(self.runner.device),
            lengths,
            longest=max(lengths_list),
        )
        forward_s = self.clock() - began
        noise = self.chooser.noise(lengths)
        if noise is not None:
            noise = noise[:, list(plan.offsets)]
        chosen = self.chooser.scores(logits, noise).argmax(-1).cpu()
        rows = plan.rows
        outcome = verify_coupled(
            tokens, chosen, self._parents[:rows], self._depths[:rows], self._ancestors[:rows, :rows]
        )
        states, commits = self._commit(outcome, lengths_list)
        return Verdict(outcome=outcome, states=states, commits=commits, forward_s=forward_s)

    def advance(self, verdict: Verdict, speculation: SpeculationSet | None) -> Tensor:
        """Next trees by lookup (``None``: no draft took part). Returns the rows ``[B]`` bool that
        wait for a tree drafted now."""
        bonus = verdict.outcome.bonus
        trees = torch.full_like(self.trees, ABSENT)
        trees[:, 0] = bonus
        missed = torch.zeros(len(self.rows), dtype=torch.bool)
        self.lookups = self.hits = 0
        if speculation is not None:
            trees, hit = lookup(verdict.outcome.node, bonus, speculation, self._plan_nodes)
            for slot, row in enumerate(self.rows):
                if row is None or not self.speculates(row):
                    continue
                if row.method == "ssd":
                    row.record.lookups += 1
                    row.record.hits += bool(hit[slot])
                    self.lookups += 1
                    self.hits += bool(hit[slot])
                self.origins[slot] = "hit" if hit[slot] else "miss"
                missed[slot] = not hit[slot] and (self.jit or row.method == "sd")
        active = torch.tensor([row is not None for row in self.rows])
        self.trees = trees.masked_fill(~active[:, None], ABSENT)
        return missed

    def fill(self, missed: Tensor, drafted: Tensor) -> None:
        """Trees drafted now, ``[B, W - 1]``, for the rows that missed."""
        self.trees[:, 1:] = torch.where(missed[:, None], drafted, self.trees[:, 1:])

    def lose_draft(self) -> None:
        """Go on plainly. Losslessness does not depend on the draft: only speed is lost."""
        self.drafting = False
        self.trees[:, 1:] = ABSENT

    def _plan(self) -> RowPlan:
        rows = [row for row in self.rows if row is not None]
        plain = not bool((self.trees[:, 1:] != ABSENT).any())
        if plain and (not self.strict or all(row.method == "none_fast" for row in rows)):
            return self._one
        return self._tree

    def _commit(self, outcome: Outcome, lengths: list[int]) -> tuple[Tensor, list[Commit]]:
        states, commits = torch.zeros(len(self.rows), dtype=torch.int64), []
        moves: list[tuple[int, int, int]] = []
        for slot, (node, bonus) in enumerate(zip(outcome.node.tolist(), outcome.bonus.tolist(), strict=True)):
            row = self.rows[slot]
            if row is None:
                continue
            tree = self.trees[slot].tolist()
            depth, chain = self.shape.depths[node], self.shape.depth
            drafted = sum(token != ABSENT for token in tree[1 : chain + 1])
            row.observe(drafted, depth)
            tokens, finished = row.commit([tree[n] for n in self.shape.path(node)], bonus)
            commits.append(
                Commit(
                    request=row.request,
                    tokens=tokens,
                    accepted=min(depth, len(tokens)),
                    drafted=drafted,
                    origin=self.origins[slot] if drafted or depth else "plain",
                    finished=finished,
                    sequence=row,
                )
            )
            if self.speculates(row):
                states[slot] = RowState.FINISHED if finished else RowState.ACTIVE
            if finished:
                self._free(slot)
            elif node > chain:
                moves.append((slot, node - chain - 1, lengths[slot] + depth))
        if moves:
            slots, scratch, positions = (torch.tensor(column) for column in zip(*moves, strict=True))
            self.runner.cache.keep(slots, scratch, positions)
        return states, commits

    def _free(self, slot: int) -> None:
        self.rows[slot] = None
        self.trees[slot] = ABSENT
        self.chooser.clear(slot)
