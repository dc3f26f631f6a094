"""A draft with another tokenizer: Gemma 3 270M drafted for by SmolLM2-135M, beside transformers' assisted generation.

    python benchmarks/models/pairs.py --tokens 64 --json benchmarks/results/pairs.json

Both engines get the same prompts and draft K tokens a round, greedily. transformers re-encodes the text of the draft
with the tokenizer of the target; this engine maps ids. Figures by category of prompt: accepted tokens of those drafted,
tokens per round (the bonus token included), and the share of the tokens of the text that the draft does not have. The
tokens of ``sd`` and ``ssd`` are compared with those of plain decoding.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ssd import LLM, RequestOutput, SamplingParams
from ssd.bench.measure.prompts import Prompt, load_prompts
from ssd.models.checkpoints.loading import load_tokenizer
from ssd.models.checkpoints.pairs import paired_with
from ssd.testing import real

PROMPTS = Path(__file__).parents[1] / "prompts" / "real.jsonl"


@dataclass(kw_only=True, slots=True)
class Rounds:
    """Rounds of several requests, added up."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, *, rounds: int, drafted: int, accepted: int) -> None:
        self.rounds, self.drafted, self.accepted = (
            self.rounds + rounds,
            self.drafted + drafted,
            self.accepted + accepted,
        )

    def figures(self, tokens: int) -> dict[str, float]:
        """``tokens``: that the rounds made certain."""
        return {
            "acceptance": round(self.accepted / max(self.drafted, 1), 3),
            "tokens_per_round": round(tokens / max(self.rounds, 1), 3),
        }


def ours(
    folders: tuple[Path, Path], prompts: Sequence[Prompt], args: argparse.Namespace
) -> dict[str, list[RequestOutput]]:
    """Returns this engine's outputs by method."""
    target, draft = ({"model": str(folder), "compile": False} for folder in folders)
    config = {
        "target": target,
        "draft": {**draft, "vocabulary": "shared"},
        "speculation": {"lookahead": args.lookahead, "governor": False, "forecast": {"budget": 8}},
        "engine": {"max_model_len": 512},
    }
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    with LLM(config) as llm:
        texts = [prompt.text for prompt in prompts]
        return {m: llm.generate(texts, replace(params, method=m)) for m in ("none", "sd", "ssd")}


def theirs(folders: tuple[Path, Path], prompts: Sequence[Prompt], args: argparse.Namespace) -> Iterator[Rounds]:
    """Yields the rounds of transformers' assisted generation of each prompt."""
    from transformers import AutoModelForCausalLM
    from transformers.generation.candidate_generator import AssistedCandidateGeneratorDifferentTokenizers

    target, draft = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders)
    tokenizers = [load_tokenizer(folder) for folder in folders]
    draft.generation_config.num_assistant_tokens = args.lookahead
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    found: list[Rounds] = []
    generator = AssistedCandidateGeneratorDifferentTokenizers
    candidates, learn = generator.get_candidates, generator.update_candidate_strategy

    def counted(self: Any, input_ids: torch.Tensor, *given: Any, **named: Any) -> Any:
        result = candidates(self, input_ids, *given, **named)
        found[-1].add(rounds=1, drafted=result[0].shape[1] - input_ids.shape[1], accepted=0)
        return result

    def learned(self: Any, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: Any) -> None:
        found[-1].add(rounds=0, drafted=0, accepted=int(num_matches))
        learn(self, input_ids, scores, num_matches)

    generator.get_candidates, generator.update_candidate_strategy = counted, learned
    try:
        for prompt in prompts:
            found.append(Rounds())
            target.generate(
                **tokenizers[0](prompt.text, return_tensors="pt"),
                assistant_model=draft,
                tokenizer=tokenizers[0],
                assistant_tokenizer=tokenizers[1],
                do_sample=False,
                min_new_tokens=args.tokens,
                max_new_tokens=args.tokens,
            )
            yield found[-1]
    finally:
        generator.get_candidates, generator.update_candidate_strategy = candidates, learn


def figures_of(
    prompts: Sequence[Prompt], outputs: Mapping[str, Sequence[RequestOutput]], peers: Sequence[Rounds], known: set[int]
) -> dict[str, Any]:
    """Returns the figures of each category. ``peers``: of the first prompts. ``known``: tokens that the draft has."""
    figures: dict[str, Any] = {}
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        chosen = [n for n, prompt in enumerate(prompts) if prompt.category == category]
        text = [token for n in chosen for token in outputs["none"][n].token_ids]
        row: dict[str, Any] = {"unknown": round(sum(token not in known for token in text) / len(text), 3)}
        for method in ("sd", "ssd"):
            total = Rounds()
            for n in chosen:
                record = outputs[method][n].speculation
                total.add(rounds=record.rounds, drafted=record.drafted, accepted=record.accepted)
            equal = sum(outputs[method][n].token_ids == outputs["none"][n].token_ids for n in chosen)
            row[method] = {**total.figures(len(text)), "equal": equal, "of": len(chosen)}
        tried = [n for n in chosen if n < len(peers)]
        total = Rounds()
        for n in tried:
            total.add(rounds=peers[n].rounds, drafted=peers[n].drafted, accepted=peers[n].accepted)
        tokens = sum(len(outputs["none"][n].token_ids) for n in tried)
        row["transformers"] = {**total.figures(tokens), "of": len(tried)}
        figures[category] = row
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--count", type=int, help="prompts of each category")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lookahead", type=int, default=4)
    parser.add_argument("--json", type=Path, help="written after every prompt")
    args = parser.parse_args()
    by_category: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in load_prompts(args.prompts):
        by_category[prompt.category].append(prompt)
    prompts = [prompt for some in by_category.values() for prompt in some[: args.count]]
    folders = real.gemma3(), real.smollm2()
    target = load_tokenizer(folders[0])
    pairing = paired_with(folders[1], target, len(target), shared=True)
    assert pairing.map is not None
    known = set(pairing.map.to_target.tolist())
    facts = {
        "target": "Gemma 3 270M",
        "draft": "SmolLM2-135M-Instruct",
        "lookahead": args.lookahead,
        "tokens": args.tokens,
        "shared_tokens": pairing.map.shared,
        "share_of_target": round(pairing.map.shared / len(target), 3),
    }
    outputs, peers = ours(folders, prompts, args), list[Rounds]()

    def write() -> None:
        text = json.dumps({**facts, "categories": figures_of(prompts, outputs, peers, known)}, indent=1)
        print(text, flush=True)
        if args.json is not None:
            args.json.write_text(text + "\n", encoding="utf-8")

    write()
    for rounds in theirs(folders, prompts, args):
        peers.append(rounds)
        write()


if __name__ == "__main__":
    main()
