"""Method ``self``: the target with sublayers skipped drafts, the whole one verifies; tokens are plain decoding's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd import LLM, ConfigError, ModelError, RequestError, SamplingParams
from ssd.bench.measure.compare import prepared
from ssd.config.load import load_config
from ssd.engine.front import Front
from ssd.models.skipping import SkipSet, skipping
from ssd.pipeline.runtime.build_verifier import build_verifier
from ssd.pipeline.runtime.launch import InprocPipeline
from ssd.pipeline.runtime.plan import Plan
from ssd.pipeline.transport.messages import Submit
from ssd.pipeline.verifier.worker import VerifierWorker
from ssd.request.methods import Method
from ssd.testing.models.tiny import ARCHITECTURES, save_tiny, tiny_model
from ssd.testing.twins.rounds import decode_alone

LAYERS = 4
GREEDY = SamplingParams(max_tokens=14, ignore_eos=True)
PARAMS = [
    GREEDY,
    replace(GREEDY, temperature=1.2, seed=3),
    replace(GREEDY, temperature=0.7, top_p=0.9, seed=5, max_tokens=9),
    replace(GREEDY, temperature=1.0, top_k=9, seed=6, repetition_penalty=1.3, presence_penalty=0.5),
    replace(GREEDY, temperature=0.3, min_p=0.05, seed=7),
]
ASKED = [[9, 30, 77], list(range(20, 44)), [5], [60, 61, 62, 63, 64], list(range(90, 125))]
ALL = list(range(LAYERS))
HALF: dict[str, Any] = {"skip_attention": [1, 2], "skip_mlp": [2]}


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", *, dtype: str = "float32", batch: int = 2, **speculation: Any) -> dict:
        if architecture not in made:
            # Later layers say less than the first, as in trained models: skipping them often changes nothing.
            folder = made[architecture] = tmp_path_factory.mktemp(architecture)
            save_tiny(folder, architecture, num_hidden_layers=LAYERS)
            model = tiny_model(architecture, num_hidden_layers=LAYERS)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if weight.ndim == 2 and any(f"layers.{layer}." in name for layer in (1, 2, 3)):
                        weight.mul_(0.3)
            model.save_pretrained(folder)
        return {
            "target": {"model": str(made[architecture]), "dtype": dtype, "compile": False},
            "speculation": {"method": "self", "lookahead": 3, "governor": False, "self": HALF, **speculation},
            "engine": {"max_model_len": 128, "prefill_chunk": 16, "max_batch": batch},
        }

    return make


def verifier_of(config: dict[str, Any]) -> VerifierWorker:
    return build_verifier(Plan(config=load_config(config), vocabulary=128, ends=()))[0]


def decoded(worker: VerifierWorker, methods: list[Method]) -> list[list[int]]:
    """Tokens of all requests, more than there are slots; what each round accepted is in the records."""
    tokens: list[list[int]] = [[] for _ in ASKED]
    for request, (prompt, params) in enumerate(zip(ASKED, PARAMS, strict=True)):
        method = methods[request % len(methods)]
        worker.submit(Submit(request=request, prompt=prompt, params=replace(params, method=method)))
    for verdict in decode_alone(worker):
        for commit in verdict.commits:
            tokens[commit.request] += commit.tokens
            RECORDS[commit.request] = commit.record
    return tokens


RECORDS: dict[int, Any] = {}


def totals() -> tuple[int, int]:
    return sum(r.drafted for r in RECORDS.values()), sum(r.accepted for r in RECORDS.values())


def check(config: dict[str, Any]) -> tuple[int, int]:
    """Equality of ``self`` and ``none``, alone and in one batch. Returns drafted and accepted tokens."""
    worker = verifier_of(config)
    plain = decoded(worker, ["none"])
    assert totals() == (0, 0)
    assert decoded(worker, ["none", "self"]) == plain
    assert decoded(worker, ["self"]) == plain
    assert [len(tokens) for tokens in plain] == [params.max_tokens for params in PARAMS]
    return totals()


# K, siblings, batch, dtype, confidence, skip set.
COVER = [
    (1, 0, 1, "float32", 0.0, HALF),
    (2, 1, 4, "bfloat16", 0.0, {"skip_attention": [3], "skip_mlp": [3]}),
    (3, 0, 1, "bfloat16", 0.3, {"skip_attention": [2, 3], "skip_mlp": [2, 3]}),
    (4, 2, 4, "float32", 0.2, {}),
    (5, 0, 4, "bfloat16", 0.0, {"skip_attention": ALL, "skip_mlp": []}),
    (6, 1, 1, "float32", 0.0, {"skip_attention": [], "skip_mlp": ALL}),
    (7, 0, 4, "float32", 0.0, {"skip_attention": [0, 1], "skip_mlp": [0]}),
    (8, 0, 1, "bfloat16", 0.1, {"skip_attention": [1, 3], "skip_mlp": [2]}),
    (8, 2, 4, "float32", 0.0, {"skip_attention": ALL, "skip_mlp": ALL}),
]


@pytest.mark.parametrize(("lookahead", "siblings", "batch", "dtype", "confidence", "skips"), COVER)
def test_tokens_are_plain_decodings(
    lookahead: int,
    siblings: int,
    batch: int,
    dtype: str,
    confidence: float,
    skips: dict[str, Any],
    configure: Callable[..., dict[str, Any]],
) -> None:
    draft = {**skips, "confidence": confidence}
    drafted, accepted = check(configure(dtype=dtype, batch=batch, lookahead=lookahead, siblings=siblings, self=draft))
    # Some candidates are wrong. A draft without any layer repeats one token forever.
    assert drafted > accepted and (accepted > 0 or len(skips.get("skip_mlp", [])) == LAYERS)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "llama"])
def test_architectures(architecture: str, configure: Callable[..., dict[str, Any]]) -> None:
    drafted, accepted = check(configure(architecture))
    assert drafted > accepted > 0


def test_numerics_fast(configure: Callable[..., dict[str, Any]]) -> None:
    """In float32 the logits of these models differ by far more than the last bit."""
    check(configure() | {"numerics": "fast"})


def test_a_draft_that_skips_nothing_is_never_wrong(configure: Callable[..., dict[str, Any]]) -> None:
    """It sees verified keys, its own behind them, and the noise, filters and penalties of the target."""
    drafted, accepted = check(configure(self={"skip_attention": [], "skip_mlp": [], "confidence": 0.0}, batch=4))
    unused = 3 * len(ASKED)  # drafted beyond the end of a request
    assert accepted >= drafted - unused > 0


def test_the_chain_ends_after_an_unsure_token(configure: Callable[..., dict[str, Any]]) -> None:
    """The unsure token itself is verified."""
    check(configure(lookahead=6, self={**HALF, "confidence": 1.0}))
    assert all(record.drafted == record.rounds for record in RECORDS.values())
    sure = check(configure(lookahead=6, self={**HALF, "confidence": 0.0}))
    assert all(record.drafted == 6 * record.rounds for record in RECORDS.values())
    drafted, accepted = check(configure(lookahead=6, self={**HALF, "confidence": 0.4}))
    assert drafted < sure[0] and accepted / drafted > sure[1] / sure[0]


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_rules_that_compare_probabilities(rule: str, configure: Callable[..., dict[str, Any]]) -> None:
    """Candidates are point masses there; at temperature 0 the tokens are plain decoding's still."""
    worker = verifier_of(configure(verify=rule))
    plain, own = decoded(worker, ["none"]), decoded(worker, ["self"])
    assert plain[0] == own[0] and RECORDS[0].accepted > 0


def test_the_governor_stops_an_unprofitable_draft(configure: Callable[..., dict[str, Any]]) -> None:
    worker = verifier_of(configure(governor=True))
    draft = worker._self_draft
    assert draft is not None and draft.governor is not None
    long = replace(GREEDY, max_tokens=100)
    worker.submit(Submit(request=0, prompt=[9, 30, 77], params=long))
    drafted = []
    for verdict in decode_alone(worker):
        # As if drafting took nine tenths of every round that drafts.
        seconds = 10.0 if verdict.self_draft_s else 1.0
        drafted.append(bool(verdict.self_draft_s))
        draft.observe(replace(verdict, self_draft_s=9.0 if verdict.self_draft_s else 0.0), seconds)
    assert drafted[0] and not any(drafted[-10:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_skipped_sublayers_add_nothing(architecture: str) -> None:
    """Bit for bit what the model gives with the sublayer's last projection zero."""
    ids = torch.arange(5, 25)[None]
    model, zeroed = (tiny_model(architecture, num_hidden_layers=LAYERS) for _ in range(2))
    ends = {1: ("o_proj", "attention.dense", "self_attn.dense"), 2: ("down_proj", "fc2", "dense_4h_to_h")}
    for layer, names in ends.items():
        for name, weight in zeroed.get_decoder().layers[layer].named_parameters():
            if any(end in name for end in names):
                weight.data.zero_()
    with torch.no_grad():
        wanted = zeroed(input_ids=ids, use_cache=False).logits
        whole = model(input_ids=ids, use_cache=False).logits
        found = skipping(model, SkipSet.of([1], [2], LAYERS))(input_ids=ids, use_cache=False).logits
        assert torch.equal(found, wanted) and not torch.equal(found, whole)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, whole)  # untouched


def test_it_shares_weights_and_cache_with_the_target(configure: Callable[..., dict[str, Any]]) -> None:
    worker = verifier_of(configure())
    assert worker._self_draft is not None
    whole = {weight.data_ptr() for weight in worker.runner.model.parameters()}
    assert {weight.data_ptr() for weight in worker._self_draft.runner.model.parameters()} < whole
    assert worker._self_draft.runner.cache is worker.runner.cache


def test_early_exits() -> None:
    assert SkipSet.of([2, 3], [2, 3], 4).exit == 2
    assert SkipSet.of([], [], 4).exit == 4
    assert SkipSet.of([1, 2], [1, 2], 4).exit is None and SkipSet.of([3], [2, 3], 4).exit is None
    default = SkipSet.of(None, None, 6)
    assert sorted(default.attention) == sorted(default.mlp) == [1, 3]


def test_errors(configure: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"self.skip_attention names layer 4; the target has 4 layers, 0 to 3"):
        Front(configure(self={"skip_attention": [1, 4]}))
    with pytest.raises(ConfigError, match=r"speculation.self.skip_mlp must be a list of integers"):
        load_config(configure(self={"skip_mlp": [-1]}))
    with pytest.raises(ConfigError, match="draft is missing"):
        load_config(configure(method="ssd"))
    odd = tiny_model("llama")
    odd.get_decoder().layers[0].other = torch.nn.Sequential()
    odd.get_decoder().layers[0].other.__class__ = type("OtherMLP", (torch.nn.Sequential,), {})
    with pytest.raises(ModelError, match="the MLP of a layer cannot be identified"):
        skipping(odd, SkipSet.of([], [0], 2))


def test_comparing_it_needs_no_settings() -> None:
    assert prepared(load_config("embedded"), ["none", "self"]).speculation.self_draft is not None
    assert prepared(load_config("embedded"), ["none", "sd"]).speculation.self_draft is None


def test_one_process_serves_it(configure: Callable[..., dict[str, Any]]) -> None:
    """Through the front and the loops, without a draft; a request chooses its method."""
    with LLM(configure(), launch=InprocPipeline) as llm:
        assert llm.config.roles == ("verifier",)
        plain = llm.generate(ASKED, [replace(p, method="none") for p in PARAMS])
        own = llm.generate(ASKED, PARAMS)
        assert [o.token_ids for o in own] == [o.token_ids for o in plain]
        assert sum(o.speculation.accepted for o in own) > 0
        assert llm.timings()["draft_ms"]
        with pytest.raises(RequestError, match="needs a draft; this configuration has none"):
            llm.generate("a", SamplingParams(method="sd"))
    front = Front(configure(method="none", self=None))
    with pytest.raises(RequestError, match=r"set speculation.self=\{\}"):
        front.make("a", SamplingParams(method="self"))
