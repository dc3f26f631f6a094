"""Structured output, whatever drafts: the tokens are plain decoding's, the texts are what was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from ssd import LLM, RequestError, RequestOutput, SamplingParams, StructuredOutputsParams
from ssd.decoding.processors import Processors, ProcessorSettings
from ssd.decoding.trees.shape import ABSENT
from ssd.grammars.compiler import Grammars
from ssd.grammars.matcher import GrammarMatcher
from ssd.pipeline.draft.worker import DraftWorker
from ssd.pipeline.round.round import Round
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.sampling.slots import SlotSampling
from ssd.pipeline.verifier.worker import VerifierWorker
from ssd.testing.models.tiny import tiny_model, tiny_tokenizer
from tests.unit.models.test_graphs import as_on_gpus  # noqa: F401  a fixture

VOCABULARY = 400
"""From 324 ids on the tiny tokenizer spells every byte."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": -99, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", "é日"]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
COMPACT = {"disable_any_whitespace": True}
ASKED: tuple[dict[str, Any], ...] = (
    {"json": SCHEMA, **COMPACT},
    {"regex": r"[a-c]{2,5}[é日😀]{2} = -?[0-9]{1,3}\n"},
    {"choice": ["yes", "yellow", "no", "é日本"]},
    {"grammar": 'root ::= "(" root ")" | [a-z] "+" root | [0-9]'},
    {"json_object": True, **COMPACT},
)
PROMPTS = [[9, 30, 77], [5], list(range(20, 44)), [100, 9, 9, 9], [60, 61]]
BASE = SamplingParams(max_tokens=40)


def fits(asked: dict[str, Any], text: str) -> bool:
    if "regex" in asked:
        return re.fullmatch(asked["regex"], text) is not None
    if "choice" in asked:
        return text in asked["choice"]
    if "grammar" in asked:
        while text.startswith("(") or text[1:2] == "+":
            if text.startswith("("):
                if not text.endswith(")"):
                    return False
                text = text[1:-1]
            else:
                text = text[2:]
        return re.fullmatch(r"\d", text) is not None
    value = json.loads(text)
    if "json_object" in asked:
        return isinstance(value, dict)
    return (
        list(value) == ["name", "size", "tags"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 6
        and -99 <= value["size"] <= 99
        and set(value["tags"]) <= {"a", "bb", "é日"}
    )


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """A target, and a draft that is the target with disturbed weights."""
    folders = {}
    for kind, disturbed in (("target", 0.0), ("draft", 0.08)):
        model = tiny_model("llama", vocab_size=VOCABULARY)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) * weight.std(correction=0), alpha=disturbed)
        folders[kind] = folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        tiny_tokenizer(VOCABULARY).save_pretrained(folder)

    def make(batch: int = 4, **speculation: Any) -> dict[str, Any]:
        def worker(kind: str) -> dict[str, Any]:
            return {"model": str(folders[kind]), "dtype": "float32", "compile": False}

        return {
            "target": worker("target"),
            "draft": worker("draft"),
            "speculation": {"lookahead": 3, "governor": False, "forecast": {"budget": 12}, **speculation},
            "engine": {"max_batch": batch, "max_model_len": 128, "prefill_chunk": 16, "start_timeout_s": 120.0},
        }

    return make


def requests() -> list[tuple[list[int], SamplingParams, dict[str, Any]]]:
    """Every kind, greedy and sampled; then beside all other parameters; then some that ask for nothing."""
    made = []
    for warm in (False, True):
        base = replace(BASE, temperature=1.0 if warm else 0.0, seed=11)
        for prompt, asked in zip(PROMPTS, ASKED, strict=True):
            made.append((prompt, replace(base, structured_outputs=asked), asked))
    beside = replace(
        BASE,
        temperature=0.8,
        top_k=20,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logit_bias={40: 5.0, 0: 3.0},
        min_tokens=4,
        bad_words=([41], [42, 43]),
        ignore_eos=True,
    )
    for prompt, asked in zip(PROMPTS[:4], (*ASKED[:2], *ASKED[3:]), strict=True):
        made.append((prompt, replace(beside, structured_outputs=asked), asked))
    return [*made, (PROMPTS[0], BASE, {}), (PROMPTS[1], replace(BASE, temperature=1.0), {})]


def generated(llm: LLM, method: str, batch: Any) -> list[RequestOutput]:
    outputs = llm.generate([prompt for prompt, _, _ in batch], [replace(p, method=method) for _, p, _ in batch])
    assert llm.degraded is None
    return outputs


@pytest.mark.parametrize(("batch", "siblings", "fallback"), [(4, 0, "jit"), (1, 2, "jit"), (4, 2, "none")])
def test_every_method_gives_the_same_tokens(
    batch: int, siblings: int, fallback: str, configure: Callable[..., dict[str, Any]]
) -> None:
    some = requests() if batch > 1 else requests()[siblings // 2 :: 2]
    with LLM(configure(batch, siblings=siblings, fallback=fallback), launch=InprocPipeline) as llm:
        plain, sd, ssd = (generated(llm, method, some) for method in ("none", "sd", "ssd"))
    for (_, _, asked), one, other, third in zip(some, plain, sd, ssd, strict=True):
        assert one.token_ids == other.token_ids == third.token_ids, asked
        assert one.text == third.text and one.finish_reason == other.finish_reason == third.finish_reason
        assert one.finish_reason in ("stop", "length")
        if asked and one.finish_reason == "stop":
            assert fits(asked, one.text), (asked, one.text)
    whole = [output for (_, _, asked), output in zip(some, plain, strict=True) if asked]
    assert sum(output.finish_reason == "stop" for output in whole) > len(whole) / 2
    assert sum(output.speculation.accepted for output in ssd) > 0
    assert 0 < sum(o.speculation.hits for o in ssd) < sum(o.speculation.lookups for o in ssd)


@pytest.mark.usefixtures("as_on_gpus")
@pytest.mark.parametrize("siblings", [0, 2])
def test_trees_drafted_at_once(siblings: int, configure: Callable[..., dict[str, Any]]) -> None:
    """Where the grammar masks guesses only, and mends what follows them."""
    test_every_method_gives_the_same_tokens(4, siblings, "jit", configure)


@pytest.mark.parametrize(("rule", "siblings"), [("rejection", 2), ("block", 0)])
def test_rules_that_compare_probabilities(rule: str, siblings: int, configure: Callable[..., dict[str, Any]]) -> None:
    """Their tokens are others than plain decoding's, the texts follow the grammar all the same."""
    some = requests()[5:]
    with LLM(configure(4, siblings=siblings, verify=rule), launch=InprocPipeline) as llm:
        plain, ssd = (generated(llm, method, some) for method in ("none", "ssd"))
    for (_, params, asked), one, other in zip(some, plain, ssd, strict=True):
        if not params.temperature:
            assert one.token_ids == other.token_ids
        if asked and other.finish_reason == "stop":
            assert fits(asked, other.text), (asked, other.text)
        assert other.finish_reason in ("stop", "length")


def test_the_draft_is_steered(configure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """No candidate that is verified breaks the grammar, and so more are accepted than without."""
    some = [(p, params, asked) for p, params, asked in requests() if asked]
    broken: list[tuple[int, ...]] = []
    verify = VerifierWorker.verify

    def watched(self: VerifierWorker, round: Round) -> Any:
        for row in self.slots.rows:
            if row is None or row.constraint is None or row.request not in round.candidates:
                continue
            tree = [row.root, *round.candidates[row.request].tokens]
            for node in range(1, self.shape.nodes):
                *above, token = (tree[n] for n in self.shape.path(node))
                if ABSENT in (*above, token):
                    continue
                may = row.constraint.allowed([above])[0]
                if may[1:].any() and not may[token]:  # otherwise the output has ended
                    broken.append((*above, token))
        return verify(self, round)

    monkeypatch.setattr(VerifierWorker, "verify", watched)
    monkeypatch.setattr(Grammars, "ready", lambda self, wanted: bool(self.matcher(wanted)))  # the draft waits, too
    with LLM(configure(4, siblings=1), launch=InprocPipeline) as llm:
        steered = generated(llm, "ssd", some)
    assert not broken
    monkeypatch.setattr(SlotSampling, "process_leniently", lambda *_args, **_kwargs: None)
    with LLM(configure(4, siblings=1), launch=InprocPipeline) as llm:
        loose = generated(llm, "ssd", some)
    assert broken
    assert [o.token_ids for o in steered] == [o.token_ids for o in loose]
    with_, without = (sum(o.speculation.rounds for o in outputs) for outputs in (steered, loose))
    assert with_ < without


@pytest.mark.usefixtures("as_on_gpus")
def test_guesses_are_allowed_and_chains_mended(
    configure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft that knows nothing of the next tokens is right about those a grammar leaves no choice about."""
    seen = 0
    speculate = DraftWorker.speculate

    def watched(self: DraftWorker, bell: Any) -> Any:
        nonlocal seen
        found = speculate(self, bell)
        for slot, row in enumerate(self.rows):
            if row is None or row.constraint is None or not row.forecasts or not row.whole:
                continue
            for node, guess in zip(found.nodes[slot].tolist(), found.guesses[slot].tolist(), strict=True):
                above = [self.trees[slot][n] for n in self.shape.path(node)]
                if ABSENT in above:
                    continue
                may = row.constraint.allowed([above])[0]
                if may.sum() > len(found.nodes[slot]) + 1 + max(self.shape.siblings):
                    assert may[guess], (above, guess)  # there were enough to choose from
                    seen += 1
        return found

    monkeypatch.setattr(DraftWorker, "speculate", watched)
    forced = replace(BASE, structured_outputs={"regex": "(abcdefgh){4}[0-9]"})  # type: ignore[arg-type]
    with LLM(configure(2), launch=InprocPipeline) as llm:
        (plain,) = llm.generate([[9, 30]], replace(forced, method="none"))
        outputs = llm.generate([[9, 30], [5]], [replace(forced, method="ssd"), replace(requests()[0][1], method="ssd")])
        monkeypatch.setattr(GrammarMatcher, "mended", lambda _self, _path, chain: list(chain))
        (unmended,) = llm.generate([[9, 30]], replace(forced, method="ssd"))
    assert outputs[0].token_ids == unmended.token_ids == plain.token_ids
    assert outputs[0].speculation.rounds < unmended.speculation.rounds
    assert seen > 20


def test_mending() -> None:
    grammars = Grammars(lambda: tiny_tokenizer(VOCABULARY), vocabulary=VOCABULARY, ends=[0])
    encode = partial(tiny_tokenizer(VOCABULARY).encode, add_special_tokens=False)
    constraint = grammars.matcher(StructuredOutputsParams(regex="[0-9]abcd[xy]"))
    digit, forced, wrong = encode("7"), encode("abcd"), encode("~~~~~~")
    assert constraint.mended(digit, [*forced[:1], *wrong])[: len(forced)] == forced
    assert constraint.mended(digit, wrong) == [*forced, *wrong[len(forced) :]]
    assert constraint.mended(digit, wrong[:2]) == forced[:2]
    for path, chain in (
        (digit, [*forced, *encode("y")]),
        ([], wrong),
        (wrong, forced),
        ([*digit, *forced], wrong),
        ([], []),
    ):
        assert constraint.mended(path, chain) == chain
    assert constraint.advance(digit[0]) and constraint.mended([], wrong) == [*forced, *wrong[len(forced) :]]


def test_it_ends_where_the_grammar_does(configure: Callable[..., dict[str, Any]]) -> None:
    """Without an end-of-text id where nothing may follow, with one where it is a choice, and at the
    same place whatever block it falls into."""
    three = replace(BASE, structured_outputs={"regex": "abc"}, min_tokens=30)  # type: ignore[arg-type]
    many = replace(BASE, structured_outputs={"regex": "(ab)+"}, logit_bias={0: 100.0})  # type: ignore[arg-type]
    with LLM(configure(1), launch=InprocPipeline) as llm:
        for method in ("none", "ssd"):
            (output,) = llm.generate([[9, 30]], replace(three, method=method))
            assert (output.text, output.finish_reason) == ("abc", "stop") and 0 not in output.token_ids
            (output,) = llm.generate([[9, 30]], replace(many, method=method, logprobs=2))
            assert (output.text, output.finish_reason, output.token_ids[-1]) == ("ab", "stop", 0)
            assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
            (output,) = llm.generate([[9, 30]], replace(many, method=method, min_tokens=7, max_tokens=30))
            assert len(output.token_ids) >= 7 and re.fullmatch("(ab)+", output.text)
            (output,) = llm.generate([[9, 30]], replace(many, method=method, logit_bias={0: -100.0}, max_tokens=9))
            assert (len(output.token_ids), output.finish_reason) == (9, "length")


def test_what_cannot_go_on_fails_alone(configure: Callable[..., dict[str, Any]]) -> None:
    stuck = replace(BASE, structured_outputs={"regex": "[ab]{4}x"}, bad_words=("x",))  # type: ignore[arg-type]
    other = replace(BASE, max_tokens=12)
    with LLM(configure(2), launch=InprocPipeline) as llm:
        for method in ("none", "ssd"):
            (alone,) = llm.generate([[5]], replace(other, method=method))
            failed, fine = llm.generate([[9, 30], [5]], [replace(p, method=method) for p in (stuck, other)])
            assert fine.token_ids == alone.token_ids
            assert failed.finish_reason == "error" and "no token can follow" in (failed.error or "")
            assert re.fullmatch("[ab]{4}", failed.text)


def test_a_worker_that_cannot_compile_fails_that_request_only(
    configure: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(BASE, structured_outputs={"choice": ["yes", "no"]}, max_tokens=8)  # type: ignore[arg-type]
    plain = replace(BASE, max_tokens=8)
    with LLM(configure(2), launch=InprocPipeline) as llm:
        (good,) = llm.generate([[5]], wanted)
        monkeypatch.setattr(SlotSampling, "_constraint", _fails)
        failed, fine = llm.generate([[5], [5]], [wanted, plain])
        assert (failed.finish_reason, failed.error, failed.token_ids) == ("error", "structured_outputs: no", ())
        assert fine.finish_reason == "length" and len(fine.token_ids) == 8
        monkeypatch.undo()
        # A draft that cannot goes on without: fewer guesses fit, the tokens are the same.
        monkeypatch.setattr(SlotSampling, "process_leniently", lambda self, slot, params, **kwargs: None)
        (again,) = llm.generate([[5]], replace(wanted, method="ssd"))
        assert again.token_ids == good.token_ids


def test_a_path_of_no_tokens_is_harmless() -> None:
    """A draft may send anything."""
    grammars = Grammars(lambda: tiny_tokenizer(VOCABULARY), vocabulary=VOCABULARY, ends=[0])
    constraint = grammars.matcher(StructuredOutputsParams(regex="[ab]+"))
    processors = Processors(1, VOCABULARY, "cpu")
    processors.set(0, ProcessorSettings(), prompt=[5], constraint=constraint)
    paths = torch.tensor([[[-1, -1], [-7, 2**31 - 1], [VOCABULARY, 99], [-1, 2**40]]])
    assert torch.isfinite(processors.apply(torch.zeros(1, 4, VOCABULARY), paths)).any(-1).all()


def test_masks_do_not_depend_on_what_was_tried() -> None:
    """Equality rests on it: one matcher sees many candidates, another only the tokens that came."""
    grammars = Grammars(lambda: tiny_tokenizer(VOCABULARY), vocabulary=VOCABULARY, ends=[0])
    generator = torch.Generator().manual_seed(3)
    for asked in ASKED:
        tried, fresh = (grammars.matcher(StructuredOutputsParams(**asked)) for _ in range(2))
        for _ in range(30):
            if tried.complete:
                break
            may = tried.allowed([()])[0].nonzero().flatten()
            some = [int(may[int(torch.randint(len(may), (1,), generator=generator))]) for _ in range(4)]
            for token in some:
                (deeper,) = tried.allowed([(token,)])
                tried.allowed([(token, int(deeper.nonzero()[-1]))])
            assert tried.advance(some[0]) and fresh.advance(some[0])
            if not tried.complete:
                assert torch.equal(tried.allowed([()]), fresh.allowed([()]))


def _fails(self: SlotSampling, params: SamplingParams, output: Any) -> Any:
    if params.structured_outputs is not None:
        raise RequestError("structured_outputs: no")
