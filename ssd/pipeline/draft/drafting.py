"""What the draft model drafts: the branches of a round, and the chains of rows that missed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from ...decoding.forecast.base import Forecast
from ...decoding.processors import TreePaths
from ...decoding.sampling import scores
from ...decoding.text.copying import CopyBias
from ...decoding.trees.combs import best_tokens, comb_tokens, noise_at
from ...decoding.trees.shape import ABSENT, TreeShape
from ...decoding.verify.draft_probs import DraftProbs
from ...models.rows import RowPlan
from ...models.runner import ForwardRunner, Layout
from ..policy.lookahead import first_lookahead
from ..sampling.selection import Selector
from ..sampling.slots import Chooser
from .branches import BranchSteps
from .sampler import CandidateSampler, stacked
from .scores import Asked, DraftScores


class Drafting:
    """Runs the draft model over the trees it is given; which sequences they are of is the ``DraftWorker``'s.

    Args:
        runner: of the draft model. chooser: what its rows' requests ask for. shape: the candidate tree.
            forecast: which outcomes get a branch. lookaheads: how far it may be told to draft, the shape's
            depth last. anytime: end a tree when ``bell`` says so. copying: what its scores gain by the
            sequences' own text.
    """

    def __init__(
        self,
        runner: ForwardRunner,
        chooser: Chooser,
        *,
        shape: TreeShape,
        forecast: Forecast,
        lookaheads: tuple[int, ...] = (),
        anytime: bool = False,
        copying: CopyBias | None = None,
    ):
        batch, device = runner.batch, runner.device
        self.runner, self.chooser, self.shape, self.forecast = runner, chooser, shape, forecast
        self.copying = copying or CopyBias((), shape, batch=batch, capacity=0, device=device)
        self.sampler: CandidateSampler | None = None
        """Under ``rejection`` and ``block``: draws the candidates."""
        self.drafted_from: DraftProbs | None = None
        """What ``chains``' last trees were drawn from ``[B, I, m]``, if they were."""
        self.branches = BranchSteps(shape, forecast.budget, device)
        self._depths = shape.depth_index(device)
        self._paths = TreePaths(shape, device)
        self._glue = RowPlan.tree("glue", shape)
        self._step = RowPlan.sequential("jit", 1)
        self._width = 1 + max(shape.siblings)
        self._lookaheads = lookaheads or (shape.depth,)
        self.lookahead = first_lookahead(self._lookaheads)
        """K of what is drafted now."""
        self.bell: Callable[[], bool] = lambda: False
        """Whether the verifier waits for the tree."""
        self._anytime = anytime
        # What is compiled, by lookahead, slots, and whether its scores are noise alone.
        self._parts: dict[tuple[int, bool], list[Callable[..., tuple[Tensor, ...]]]] = {}
        self._whole: dict[tuple[int, int, bool], Callable[..., tuple[Tensor, Tensor, Tensor]]] = {}
        self._chain: dict[tuple[int, int, bool], Callable[..., Tensor]] = {}
        self._score = DraftScores(chooser, shape, batch, runner.vocabulary, device)

    @property
    def samples(self) -> bool:
        """Whether candidates are drawn, not matched: some row samples, under a rule that compares
        probabilities."""
        return self.sampler is not None and self.chooser.params.random

    def warm_up(self, selector: Selector) -> None:
        """Compile every form a round needs."""
        batch, device = self.runner.batch, self.runner.device
        self.runner.warm_up([self._glue, self._step])
        nodes = torch.zeros(batch, self.forecast.budget, dtype=torch.int64, device=device)
        self.runner.warm_up([self.branches.plans[0]], self.branches.layout(0, nodes))
        for count in selector.counts if self.runner.fuses else ():
            self.chooser.select(selected := selector.first(count))
            slots, lengths = selected.index, torch.zeros(count, dtype=torch.int64, device=device)
            trees = torch.full((count, self.shape.nodes), ABSENT, device=device)
            for asked, depth in product(self._score.kinds, self._lookaheads):
                self.chooser.set(0, asked)
                self.lookahead = depth
                if self._anytime:
                    self._grow_in_parts(trees, lengths, slots)
                else:
                    self.grow_at_once(trees, lengths, slots)
                self._chains_at_once(trees[:, :1].clamp(min=0), lengths, slots)
        self.chooser.clear(0)
        self.lookahead = first_lookahead(self._lookaheads)

    def glue(self, tokens: Tensor, lengths: Tensor, longest: int, slots: Tensor | None = None) -> None:
        """Only the keys and values of the trees ``[B, W]``."""
        self.runner.forward(self._glue, tokens.clamp(min=0), lengths, longest=longest, slots=slots)

    def grow(
        self, tokens: Tensor, lengths: Tensor, longest: int, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, DraftProbs | None]:
        """Branches for the likeliest outcomes of the trees ``tokens [B, W]`` above L ``[B]``. ``slots`` ``[B]``: which
        they are of, and the chooser has selected, if not all.

        Returns: nodes and guesses ``[B, N]``, trees ``[B, N, W - 1]`` and what these were drawn from
        ``[B, N, I, m]``, if they were.
        """
        if self.at_once(longest):
            grow = self._grow_in_parts if self._anytime else self.grow_at_once
            return *grow(tokens, lengths, slots), None
        return self._grow_stepwise(tokens, lengths, longest, slots)

    def chains(self, roots: Tensor, lengths: Tensor, longest: int, slots: Tensor | None = None) -> Tensor:
        """Candidates ``[B, W - 1]`` below the roots ``[B, 1]``. ``slots`` as for ``grow``."""
        if self.at_once(longest):
            self.drafted_from = self.nothing()
            return self._chains_at_once(roots, lengths, slots)[:, 0]
        return self._chains_stepwise(roots, lengths, longest, slots)[:, 0]

    def nothing(self, branches: int | None = None) -> DraftProbs | None:
        """What no candidates were drawn from, under the rules that ask."""
        if self.sampler is None:
            return None
        counts = (self.runner.batch,) if branches is None else (self.runner.batch, branches)
        return self.sampler.nothing(*counts)

    def at_once(self, longest: int) -> bool:
        """Whether this round's drafting may run as one compiled function: compiled for the shortest
        context only (it takes the compiler half a minute), and without what only single steps can do."""
        short = longest + self.shape.depth < self.runner.contexts[0]
        return self.runner.fuses and short and not self.samples

    def _grow(
        self,
        forward: Callable[[RowPlan, Tensor, Layout | None], Tensor],
        foresee: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        pick: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor],
        tokens: Tensor,
        lengths: Tensor,
        slots: Tensor | None,
        ended: Callable[[], bool] = lambda: False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The draft's half of a round: glue, forecast, K branch steps, or fewer.

        Args:
            forward: plan, row tokens ``[B, R]`` and layout to logits ``[B, R, V]``. foresee: the
                tree's logits and how far ahead of L each row's noise is ``[B, W]`` to outcomes. pick: logits, how
                far ahead, the branches' nodes, the tokens fed and the step to the next candidates
                ``[B, N, n]``, the chain's first. tokens: ``[B, W]``. lengths: L ``[B]``. slots: as for ``grow``.
            ended: whether no further step shall begin.

        Returns: nodes and guesses ``[B, N]``, and trees ``[B, N, W - 1]``.
        """
        ahead = self._depths.expand(len(tokens), -1)
        trail = self.copying.trail(tokens, lengths, slots)
        nodes, guesses = foresee(trail.add(forward(self._glue, tokens.clamp(min=0), None)), ahead)
        trail.follow(nodes)
        ranked, fed, depths = [], guesses, self._depths[nodes]
        for step, plan in enumerate(self.branches.plans[: self.lookahead]):
            if step and ended():
                break
            trail.feed(fed)
            logits = trail.add(forward(plan, fed, self.branches.layout(step, nodes)))
            ranked.append(pick(logits, depths + 1 + step, nodes, fed, step))
            fed = ranked[-1][..., 0]
        return nodes, guesses, comb_tokens(ranked, self.shape.siblings)

    def _grow_stepwise(
        self, tokens: Tensor, lengths: Tensor, longest: int, slots: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, DraftProbs | None]:
        """Any parameters and rules. The last of the four: what the branches were drawn from
        ``[B, N, I, m]``, if they were. Guesses are ranked with plain decoding's noise under every
        rule: the bonus token is drawn with it too."""
        noise, sampler, drawn = self.chooser.noise(lengths), self.sampler if self.samples else None, []
        params = self.chooser.params
        paths = above = self._paths.of(tokens) if self.chooser.processors.active else None

        def score(logits: Tensor, ahead: Tensor) -> Tensor:
            logits = self.chooser.processed(logits, paths)
            return scores(logits, params, None if noise is None else noise_at(noise, ahead))

        def foresee(logits: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor]:
            quiet = None if sampler is None else self.chooser.processed(logits, paths)
            return self.forecast.outcomes(score(logits, ahead), tokens, quiet)

        def pick(logits: Tensor, ahead: Tensor, nodes: Tensor, fed: Tensor, step: int) -> Tensor:
            nonlocal paths
            if above is not None and paths is not None:  # the path to a branch's node, its guess, its tokens so far
                before = paths if step else above.gather(1, nodes[..., None].expand(-1, -1, above.shape[2]))
                paths = torch.cat([before, fed[..., None]], dim=-1)
            if sampler is None:
                return best_tokens(score(logits, ahead), self._width)
            logits = self.chooser.processed(logits, paths)
            found, draft = sampler.children(logits, params, lengths[:, None] + ahead - step, step)
            drawn.append(draft)
            return found

        grown = self._grow(
            lambda plan, rows, layout: self.runner.forward(
                plan, rows, lengths, longest=longest, layout=layout, slots=slots
            ),
            foresee,
            pick,
            tokens,
            lengths,
            slots,
            self._ended,
        )
        return *grown, stacked(drawn, self.shape.depth) if drawn else None

    def _ended(self) -> bool:
        """Whether the verifier waits for the tree as it is. On a GPU this waits for the step under way: steps
        that were launched ahead could not be taken back."""
        if not self._anytime:
            return False
        if self.runner.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return self.bell()

    @torch.no_grad()
    def _grow_in_parts(
        self, tokens: Tensor, lengths: Tensor, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``grow_at_once``, in several compiled functions, until the bell: the glue with the forecast, and
        each step. What a step must know of the copy bias it makes again from the tokens fed so far."""
        asked = self._score.asked(tokens, lengths)
        form = len(tokens), asked.fixed is None
        if (parts := self._parts.get(form)) is None:
            parts = self._parts[form] = [self._first_part(), *map(self._part, range(self.shape.depth))]
        nodes, guesses = parts[0](tokens, lengths, asked, slots)
        ranked, fed = [], guesses[..., None]
        for part in parts[1 : 1 + self.lookahead]:
            if ranked and self._ended():
                break
            (best,) = part(tokens, lengths, asked, slots, nodes, fed)
            ranked.append(best)
            fed = torch.cat([fed, best[..., :1]], dim=-1)
        return nodes, guesses, comb_tokens(ranked, self.shape.siblings)

    def _first_part(self) -> Callable[..., tuple[Tensor, ...]]:
        runner, glue, depths, context = self.runner, self._glue, self._depths, self.runner.contexts[0]
        score = self._score

        def begin(tokens: Tensor, lengths: Tensor, asked: Asked, slots: Tensor | None) -> tuple[Tensor, Tensor]:
            logits = runner.logits(glue, tokens.clamp(min=0), lengths, context, slots=slots)
            logits = self.copying.trail(tokens, lengths, slots).add(logits)
            ahead = depths.expand(len(tokens), -1)
            return self.forecast.outcomes(score(logits, ahead, asked, asked.allowed), tokens)

        return runner.compiled(begin)

    def _part(self, step: int) -> Callable[..., tuple[Tensor, ...]]:
        runner, plan, width, context = self.runner, self.branches.plans[step], self._width, self.runner.contexts[0]
        score = self._score

        def advance(
            tokens: Tensor,
            lengths: Tensor,
            asked: Asked,
            slots: Tensor | None,
            nodes: Tensor,
            fed: Tensor,
        ) -> tuple[Tensor]:
            trail = self.copying.trail(tokens, lengths, slots)
            trail.follow(nodes)
            for earlier in range(step + 1):
                trail.feed(fed[..., earlier])
            logits = runner.logits(plan, fed[..., step], lengths, context, self.branches.layout(step, nodes), slots)
            return (best_tokens(score(trail.add(logits), self._depths[nodes] + 1 + step, asked), width),)

        return runner.compiled(advance)

    @torch.no_grad()
    def grow_at_once(
        self, tokens: Tensor, lengths: Tensor, slots: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same as one compiled function: the small draft's time is mostly that of being
        called. What requests ask for is nearly done (``DraftScores``)."""
        asked = self._score.asked(tokens, lengths)
        form = self.lookahead, len(tokens), asked.fixed is None
        if form not in self._whole:
            grow, runner, context, width = self._grow, self.runner, self.runner.contexts[0], self._width
            score = self._score

            def tree(
                tokens: Tensor, lengths: Tensor, asked: Asked, slots: Tensor | None
            ) -> tuple[Tensor, Tensor, Tensor]:
                return grow(
                    lambda plan, rows, layout: runner.logits(plan, rows, lengths, context, layout, slots),
                    lambda logits, ahead: self.forecast.outcomes(score(logits, ahead, asked, asked.allowed), tokens),
                    lambda logits, ahead, nodes, fed, step: best_tokens(score(logits, ahead, asked), width),
                    tokens,
                    lengths,
                    slots,
                )

            self._whole[form] = runner.compiled(tree)
        return self._whole[form](tokens, lengths, asked, slots)

    def _chains_stepwise(self, fed: Tensor, lengths: Tensor, longest: int, slots: Tensor | None) -> Tensor:
        """Candidates ``[B, 1, W - 1]`` below the roots ``fed [B, 1]``. Any parameters and rules."""
        noise, ranked, drawn, trail = self.chooser.noise(lengths), [], [], self.copying.trail(fed, lengths, slots)
        paths = fed.new_empty(len(fed), 1, 0)
        for step in range(self.lookahead):
            logits = self.runner.forward(self._step, fed, lengths + step, longest=longest + step, slots=slots)
            logits = self.chooser.processed(trail.add(logits), paths)
            if self.samples and self.sampler is not None:
                found, draft = self.sampler.children(logits, self.chooser.params, lengths[:, None], step)
                ranked.append(found)
                drawn.append(draft)
            else:
                ahead = None if noise is None else noise[:, step : step + 1]
                ranked.append(best_tokens(scores(logits, self.chooser.params, ahead), self._width))
            fed = ranked[-1][..., 0]
            trail.feed(fed)
            if self.chooser.processors.active:
                paths = torch.cat([paths, fed[..., None]], dim=-1)
        self.drafted_from = stacked(drawn, self.shape.depth)[:, 0] if drawn else self.nothing()
        return comb_tokens(ranked, self.shape.siblings)

    @torch.no_grad()
    def _chains_at_once(self, roots: Tensor, lengths: Tensor, slots: Tensor | None = None) -> Tensor:
        """The same as one compiled function: the verifier waits for it."""
        asked = self._score.asked(roots, lengths)
        form = self.lookahead, len(roots), asked.fixed is None
        if form not in self._chain:
            runner, step, width, depth = self.runner, self._step, self._width, self.lookahead
            score = self._score

            def chain(fed: Tensor, lengths: Tensor, asked: Asked, slots: Tensor | None) -> Tensor:
                ranked, trail = [], self.copying.trail(fed, lengths, slots)
                allowed = None if asked.allowed is None else asked.allowed[:, :1]
                for ahead in range(depth):
                    logits = trail.add(runner.logits(step, fed, lengths + ahead, runner.contexts[0], slots=slots))
                    scored = score(logits, torch.full_like(fed, ahead), asked, None if ahead else allowed)
                    ranked.append(best_tokens(scored, width))
                    fed = ranked[-1][..., 0]
                    trail.feed(fed)
                return comb_tokens(ranked, self.shape.siblings)

            self._chain[form] = runner.compiled(chain)
        return self._chain[form](roots, lengths, asked, slots)
