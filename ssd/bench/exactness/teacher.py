"""Teacher forcing: the target's choice after a prefix, computed without the engine.

It is a plain ``transformers`` forward over the whole prefix with the model's own attention: no slot cache, no row
plans, no compilation. Only the formulas that turn logits into a choice are the engine's (``ssd.decoding``), because
they define the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config.load import resolve_model_path
from ...config.sections import Config
from ...decoding.noise import gumbel
from ...decoding.sampling import scores
from ...engine.front import make_plan
from ...engine.resolve import resolve
from ...models.checkpoints.loading import load_model
from ...pipeline.sampling.slots import SlotSampling
from ...request.output import RequestOutput
from ...request.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Forced:
    """How the target rates two tokens after a prefix."""

    scores: tuple[float, float]
    """Scores after processors and noise; the larger one is chosen. ``-inf``: filtered out or excluded."""
    within: bool
    """Whether logits within the band of the teacher's can choose either token."""

    @property
    def gap(self) -> float:
        """The absolute difference of the scores."""
        return abs(self.scores[0] - self.scores[1]) if self.scores[0] != self.scores[1] else 0.0


class Teacher:
    """A second copy of the configuration's target, in its dtype and on its device.

    Raises:
        ModelError: the target cannot be loaded.
    """

    def __init__(self, config: Config):
        self.tokenizer, self._plan = make_plan(config)
        target = config.target
        self._model = load_model(
            resolve_model_path(target.model),
            dtype=target.dtype,
            device=target.device,
            max_positions=config.engine.max_model_len,
            adapter=target.adapter,
        )

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], rows: int) -> Tensor:
        """Returns the logits after each of the last ``rows`` prefixes of ``tokens``, float32 ``[rows, V]``."""
        ids = torch.tensor([list(tokens)], device=self._model.device)
        logits = self._model(input_ids=ids, logits_to_keep=rows, use_cache=False).logits
        return logits[0, :, : self._plan.vocabulary].float()

    def noise_of(self, output: RequestOutput) -> float:
        """Returns the largest difference between the engine's and the teacher's log-probabilities.

        It is taken over all tokens whose log-probabilities the engine reported (``logprobs`` of the request); 0 if
        it reported none.
        """
        told = output.logprobs
        if not told:
            return 0.0
        rows = self.logits([*output.prompt_token_ids, *output.token_ids[:-1]], len(told)).log_softmax(-1)
        ours = [[rows[row, one] for one in _ids(token)] for row, token in enumerate(told)]
        theirs = [[token.logprob, *(value for _, value in token.top)] for token in told]
        return max(abs(float(a) - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))

    def force(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        params: SamplingParams,
        tokens: tuple[int, int],
        band: float,
    ) -> Forced:
        """Rates two tokens as the next one after ``prompt`` and ``output``.

        Filters and processors are not smooth functions of the logits, so changes within the band are tried: a token
        can be chosen if it is chosen after its own logit is raised by the band, or the other one lowered by it, or
        both changed by half of it.

        Args:
            band: largest error of a logit.
        """
        logits = self.logits([*prompt, *output], 1)
        one, other = tokens
        tried = [logits]
        for token, rival in ((one, other), (other, one)):
            for up, down in ((band, 0.0), (0.0, band), (band / 2, band / 2)):
                moved = logits.clone()
                moved[0, token] += up
                moved[0, rival] -= down
                tried.append(moved)
        judged = self._scores(torch.stack(tried, dim=1), prompt, output, params)  # [1, 7, V]
        chosen = set(judged[0].argmax(-1).tolist())
        return Forced(
            scores=(float(judged[0, 0, one]), float(judged[0, 0, other])),
            within={one, other} <= chosen,
        )

    def _scores(self, logits: Tensor, prompt: Sequence[int], output: Sequence[int], params: SamplingParams) -> Tensor:
        """Turns raw logits ``[1, R, V]`` of R variants of one row into scores, whose argmax is the choice."""
        plan, device = self._plan, logits.device
        params = resolve(params, self.tokenizer, vocabulary=plan.vocabulary, ends=plan.ends)
        sampling = SlotSampling(1, plan.vocabulary, device, horizon=1)
        sampling.set(0, params)
        ends = {*params.stop_token_ids, *plan.ends} if params.min_tokens else set()
        sampling.process(0, params, prompt=prompt, output=output, ends=sorted(ends))
        position = torch.tensor([len(prompt) + len(output)], device=device)
        noise = gumbel(torch.tensor([params.seed], device=device), position, plan.vocabulary)
        return scores(sampling.processed(logits, None), sampling.params, noise.expand_as(logits[0])[None])


def _ids(token: object) -> list[int]:
    return [token.token_id, *(one for one, _ in token.top)]  # type: ignore[attr-defined]
