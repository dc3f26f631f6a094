"""Pairs whose vocabularies or contexts differ, parallel drafts: the tokens are those of plain decoding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssd import LLM, ModelError, RequestOutput, SamplingParams
from ssd.config.load import load_config
from ssd.engine.front import make_plan
from ssd.pipeline.round.frames import SpeculationSet
from ssd.pipeline.runtime.build_draft import build_draft
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.testing.models.relabelled import save_relabelled, save_trimmed
from ssd.testing.models.tiny import save_tiny
from ssd.testing.twins.rounds import History, play

Configure = Callable[..., dict[str, Any]]
FolderOf = Callable[..., Path]

GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
PARAMS = [
    GREEDY,
    replace(GREEDY, temperature=0.8, seed=11),
    replace(GREEDY, temperature=1.2, top_k=20, seed=3),
    replace(GREEDY, repetition_penalty=1.4, seed=5),
]
ASKED = [[9, 30, 77], list(range(20, 44)), [5, 100, 127, 126], [60, 61, 62, 63, 64]]
METHODS = ("none", "ssd", "sd")


def with_draft(config: dict[str, Any], draft: Path, **keys: Any) -> dict[str, Any]:
    return {**config, "draft": {**config["draft"], "model": str(draft), **keys}}


def outputs(
    config: dict[str, Any], params: list[SamplingParams], asked: list[list[int]]
) -> dict[str, list[RequestOutput]]:
    """Outputs by method, whose tokens are checked to be equal."""
    with LLM(config, launch=InprocPipeline) as llm:
        found = {m: llm.generate(asked, [replace(p, method=m) for p in params]) for m in METHODS}
        assert llm.degraded is None
    for method in ("ssd", "sd"):
        assert [one.token_ids for one in found[method]] == [one.token_ids for one in found["none"]]
    return found


def acceptance(found: list[RequestOutput]) -> float:
    return sum(o.speculation.accepted for o in found) / sum(o.speculation.drafted for o in found)


@pytest.fixture(scope="module")
def relabelled(folder_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``relabelled(architecture, missing)``: a draft that is its target with another tokenizer."""

    def make(architecture: str = "llama", missing: int = 0) -> Path:
        folder = tmp_path_factory.mktemp(f"{architecture}-relabelled")
        return save_relabelled(folder_of(architecture), folder, missing=missing)

    return make


def test_a_pair_of_different_tokenizers_is_refused_by_default(tiny_config: Configure, relabelled: Any) -> None:
    config = with_draft(tiny_config(), relabelled())
    with pytest.raises(ModelError, match=r"draft\.vocabulary=shared"):
        make_plan(load_config(config))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("siblings", [0, 2])
def test_different_tokenizers(tiny_config: Configure, relabelled: Any, batch: int, siblings: int) -> None:
    """The draft is its target, so everything that both can say is accepted."""
    config = tiny_config(engine={"max_batch": batch}, speculation={"siblings": siblings, "forecast": {"budget": 14}})
    found = outputs(with_draft(config, relabelled(), vocabulary="shared"), PARAMS, ASKED)
    assert acceptance(found["sd"]) > 0.9
    assert sum(o.speculation.hits for o in found["ssd"]) > 0


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gpt_neox"])
def test_different_tokenizers_of_architectures(tiny_config: Configure, relabelled: Any, architecture: str) -> None:
    config = with_draft(tiny_config(architecture), relabelled(architecture), vocabulary="shared")
    outputs(config, PARAMS, ASKED)


@pytest.mark.parametrize("bias", [[], [1.0, 2.0, 3.0]], ids=["plain", "copying"])
def test_tokens_that_the_draft_lacks_cost_acceptance_only(
    tiny_config: Configure, relabelled: Any, bias: list[float]
) -> None:
    config = tiny_config(engine={"max_batch": 2}, speculation={"copy_bias": bias, "fallback": "auto"})
    found = outputs(with_draft(config, relabelled(missing=3), vocabulary="shared"), PARAMS, ASKED)
    assert 0.05 < acceptance(found["sd"]) < 0.9


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_rules_that_compare_probabilities(tiny_config: Configure, relabelled: Any, rule: str) -> None:
    """At temperature 0 tokens are plain decoding's. Above, candidates are drawn from distributions over tokens that
    both have, and those are what the verifier gets."""
    config = tiny_config(engine={"max_batch": 2}, speculation={"verify": rule, "support": 64})
    outputs(with_draft(config, relabelled(missing=3), vocabulary="shared"), [GREEDY, GREEDY], ASKED[:2])
    drawn: list[SpeculationSet] = []
    warm = [replace(GREEDY, temperature=0.9, seed=seed) for seed in (1, 2)]
    known = drafted_by(with_draft(config, relabelled(missing=3), vocabulary="shared"), warm, drawn)
    weights = [(one.draft.tokens[one.draft.probs > 0], one.draft.probs.sum(-1)) for one in drawn if one.draft]
    assert sum(len(tokens) for tokens, _ in weights) > 100
    for tokens, sums in weights:
        assert set(tokens.tolist()) <= known
        assert torch.logical_or(sums == 0, (sums - 1).abs() < 1e-5).all()


def drafted_by(config: dict[str, Any], params: list[SamplingParams], sets: list[SpeculationSet]) -> set[int]:
    """Plays requests and collects the speculation sets. Returns the ids that the draft can draft."""
    plan = make_plan(load_config(config))[1]
    verifier, draft = build_verifier(plan)[0], build_draft(plan)[0]
    speculate = draft.speculate

    def noted(*given: Any) -> SpeculationSet:
        sets.append(speculate(*given))
        return sets[-1]

    draft.speculate = noted  # type: ignore[method-assign]
    play(verifier, draft, plan, ASKED[: len(params)], params)
    mapped: Any = draft.runner.model
    return set((~mapped._unknown).nonzero().flatten().tolist())


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_candidates_are_tokens_that_both_have(tiny_config: Configure, relabelled: Any, temperature: float) -> None:
    sets: list[SpeculationSet] = []
    config = with_draft(tiny_config(speculation={"siblings": 2}), relabelled(missing=3), vocabulary="shared")
    known = drafted_by(config, [replace(GREEDY, temperature=temperature, seed=4)], sets)
    found = {int(token) for one in sets for token in [*one.trees.flatten(), *one.guesses.flatten()]}
    assert len(found) > 5
    assert found - {-1} <= known


def test_grammars_are_the_targets(tiny_config: Configure, relabelled: Any) -> None:
    """A grammar allows the target's tokens, and some of them the draft does not have."""
    config = with_draft(tiny_config(engine={"max_batch": 2}), relabelled(missing=4), vocabulary="shared")
    asked = {"structured_outputs": {"regex": "(yes|no|[0-9]{1,8}|[a-z ]{3,12})"}}
    params = [SamplingParams(max_tokens=16, temperature=t, seed=8, **asked) for t in (0.0, 1.0)]
    outputs(config, params, ASKED[:2])


def test_added_tokens_of_a_chat_target(tiny_config: Configure, folder_of: FolderOf, tmp_path: Path) -> None:
    """A base draft under a chat target whose tokenizer and head have more tokens."""
    from ssd.testing.models.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer(120)
    tokenizer.add_tokens([f"<|{n}|>" for n in range(8)], special_tokens=True)
    shutil.copytree(folder_of("llama"), tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    save_tiny(tmp_path / "draft", "llama", vocab_size=120)
    config = with_draft(tiny_config(engine={"max_batch": 2}), tmp_path / "draft")
    config["target"]["model"] = str(tmp_path / "target")
    assert make_plan(load_config(config))[1].vocabulary == 128
    found = outputs(config, PARAMS, ASKED)  # prompts with added tokens among them
    assert sum(o.speculation.drafted for o in found["ssd"]) > 0


@pytest.mark.parametrize("embedding", [False, True], ids=["head", "head and embedding"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # untied and tied
def test_trimmed_vocabularies(
    tiny_config: Configure, folder_of: FolderOf, tmp_path: Path, architecture: str, embedding: bool
) -> None:
    kept = [token for token in range(127, 3, -1) if token % 4]
    folder = save_trimmed(folder_of(architecture), tmp_path / "draft", kept, embedding=embedding)
    config = with_draft(tiny_config(architecture, engine={"max_batch": 2}), folder)
    found = outputs(config, PARAMS, ASKED)
    assert acceptance(found["sd"]) > (0.1 if embedding else 0.3)
    sets: list[SpeculationSet] = []
    assert drafted_by(config, [GREEDY], sets) == set(kept)


def with_context(folder: Path, copy: Path, positions: int) -> Path:
    """A copy of a model that knows fewer positions."""
    shutil.copytree(folder, copy)
    raw = json.loads((copy / "config.json").read_text())
    raw["max_position_embeddings"] = positions
    (copy / "config.json").write_text(json.dumps(raw))
    return copy


def test_a_draft_with_a_shorter_context_stops_where_it_ends(
    tiny_config: Configure, folder_of: FolderOf, tmp_path: Path
) -> None:
    """One request is past the draft's context from the start, one passes it, one stays below. The draft is its target,
    so as long as it speculates every round accepts something."""
    folder = with_context(folder_of("llama"), tmp_path / "draft", 64)
    config = with_draft(tiny_config(engine={"max_batch": 3, "max_model_len": 160}), folder)
    asked = [[7 + n % 90 for n in range(length)] for length in (100, 30, 5)]
    params = [replace(GREEDY, max_tokens=40, temperature=0.7, seed=n) for n in range(3)]
    params[1] = replace(params[1], max_tokens=100)
    found = outputs(config, params, asked)
    for method in ("sd", "ssd"):
        beyond, passing, below = (one.speculation for one in found[method])
        assert beyond.drafted == 0
        assert 0 < passing.accepted <= 64 - 30
        assert below.accepted >= 20


@pytest.mark.parametrize("method", ["ssd", "sd"])
def test_speculation_ends_at_the_drafts_context(
    tiny_config: Configure, folder_of: FolderOf, tmp_path: Path, method: Any
) -> None:
    folder = with_context(folder_of("llama"), tmp_path / "draft", 64)
    config = with_draft(tiny_config(engine={"max_model_len": 160}), folder)
    plan = make_plan(load_config(config))[1]
    verifier, draft = build_verifier(plan)[0], build_draft(plan)[0]
    params = replace(GREEDY, max_tokens=90, method=method)
    [history] = play(verifier, draft, plan, [[9, 30, 77]], [params])
    length, ends = 3, []
    for one in history.rounds:
        if one.source == "none":
            ends.append(length)
        length += len(one.tokens)
    assert length == 93
    assert all(end == 3 or end >= 64 - 2 * 3 - 2 for end in ends)  # the first round has nothing to verify yet
    assert len(ends) > 20


def test_a_context_too_short_for_the_lookahead(tiny_config: Configure, folder_of: FolderOf, tmp_path: Path) -> None:
    folder = with_context(folder_of("llama"), tmp_path / "draft", 12)
    with pytest.raises(Exception, match="12 positions"):
        make_plan(load_config(with_draft(tiny_config(), folder)))


@pytest.fixture(scope="module")
def parallel(folder_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft with a mask token, marked as PARD's are. Its vocabulary is padded, and the mask is one of the padding."""
    folder = tmp_path_factory.mktemp("parallel")
    model = AutoModelForCausalLM.from_pretrained(folder_of("llama", "noisy"))
    model.resize_token_embeddings(136)
    model.config.pard_token = 130
    model.save_pretrained(folder)
    for file in folder_of("llama").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def played(config: dict[str, Any], params: list[SamplingParams]) -> tuple[list[History], list[int]]:
    """Histories, and the rows of each forward of the draft."""
    plan = make_plan(load_config(config))[1]
    verifier, draft = build_verifier(plan)[0], build_draft(plan)[0]
    rows: list[int] = []
    draft.runner.model.register_forward_pre_hook(
        lambda _, given, named: rows.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    return play(verifier, draft, plan, ASKED[: len(params)], params), rows


@pytest.mark.parametrize("siblings", [0, 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_parallel_drafts(tiny_config: Configure, parallel: Path, batch: int, siblings: int) -> None:
    config = tiny_config(engine={"max_batch": batch}, speculation={"siblings": siblings})
    found = outputs(with_draft(config, parallel), PARAMS, ASKED)
    assert acceptance(found["sd"]) > 0.1  # first candidates are as good as any draft's


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_parallel_drafts_under_rules_that_compare_probabilities(
    tiny_config: Configure, parallel: Path, rule: str
) -> None:
    config = with_draft(tiny_config(speculation={"verify": rule}), parallel)
    outputs(config, [GREEDY, GREEDY], ASKED[:2])
    [history], _ = played(config, [replace(GREEDY, temperature=1.0, seed=3)])
    assert len(history.tokens) == 20


def test_a_parallel_draft_takes_one_forward_for_all_depths(tiny_config: Configure, parallel: Path) -> None:
    """Tree, branches, and after a miss a chain: three forwards where a step-by-step draft has 1 + 2 K."""
    config = tiny_config(speculation={"forecast": {"budget": 5}})
    [history], rows = played(with_draft(config, parallel), [GREEDY])
    assert set(rows) == {16, 4, 15, 3}  # a prompt's chunk, tree, 3 depths of 5 branches, a chain
    rounds = len(history.rounds)
    assert rows.count(15) <= rounds
    assert rows.count(3) == sum(one.source == "jit" for one in history.rounds)
    [_], stepwise = played(with_draft(config, parallel, parallel=False), [GREEDY])
    assert set(stepwise) == {16, 4, 5, 1}


def test_first_candidates_of_a_parallel_draft_are_those_of_a_usual_one(tiny_config: Configure, parallel: Path) -> None:
    """Nothing is masked before the first candidate."""
    sets: dict[bool | str, list[SpeculationSet]] = {"auto": [], False: []}
    for wanted, found in sets.items():
        config = with_draft(tiny_config(speculation={"lookahead": 1}), parallel, parallel=wanted)
        plan = make_plan(load_config(config))[1]
        verifier, draft = build_verifier(plan)[0], build_draft(plan)[0]
        speculate = draft.speculate

        def noted(*given: Any, _to: list = found, _from: Any = speculate) -> SpeculationSet:
            _to.append(_from(*given))
            return _to[-1]

        draft.speculate = noted  # type: ignore[method-assign]
        play(verifier, draft, plan, ASKED[:1], [GREEDY])
    for one, other in zip(sets["auto"], sets[False], strict=True):
        assert (one.guesses == other.guesses).all()
        assert (one.trees == other.trees).all()


def test_masks_that_do_not_exist(tiny_config: Configure, folder_of: FolderOf) -> None:
    for wanted, message in ((True, "names no mask token"), (128, "none of its 128 tokens")):
        config = with_draft(tiny_config(), folder_of("llama", "noisy"), parallel=wanted)
        with pytest.raises(ModelError, match=message):
            build_draft(make_plan(load_config(config))[1])


def test_a_parallel_draft_with_another_tokenizer(tiny_config: Configure, relabelled: Any) -> None:
    config = with_draft(tiny_config(), relabelled(), vocabulary="shared", parallel=2)
    outputs(config, PARAMS, ASKED)
