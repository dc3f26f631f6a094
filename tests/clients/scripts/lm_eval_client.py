"""lm-eval: two tasks of 200 items each, over HTTP and by its own transformers backend, with equal scores.

``continuations`` compares log-likelihoods (two choices for each item), ``sums`` generates until a newline. Texts are
made here; what matters is that both backends see the same ones.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from checks import FOLDER, MODEL, V1, check, run
from lm_eval.tasks import TaskManager

ITEMS = 200
TOLERANCE = 1e-3
PLACES = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Egypt", "Cairo")]
SAID = ["The capital of {} is", "In {}, the government sits in", "Tourists in {} often visit", "A large city of {} is"]
AFTER = ["{}", "{}, of course", "{} – naïve?", "the city of {}.\nNext", "{} 😀"]

folder = Path(tempfile.mkdtemp(prefix="lm-eval-"))
chance = random.Random(0)
with (folder / "continuations.jsonl").open("w") as file:
    for _ in range(ITEMS):
        (country, right), (_, wrong) = chance.sample(PLACES, 2)
        after = chance.choice(AFTER)
        choices, label = [after.format(right), after.format(wrong)], chance.randrange(2)
        item = {"query": chance.choice(SAID).format(country), "choices": choices[:: 1 - 2 * label], "label": label}
        file.write(json.dumps(item) + "\n")
with (folder / "sums.jsonl").open("w") as file:
    for _ in range(ITEMS):
        left, right = chance.randrange(10), chance.randrange(10)
        file.write(json.dumps({"query": f"1 + 2 = 3\n2 + 2 = 4\n{left} + {right} =", "sum": str(left + right)}) + "\n")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
doc_to_text: "{{{{query}}}}"
"""
(folder / "continuations.yaml").write_text(
    TASK.format(name="continuations", folder=folder)
    + """
output_type: multiple_choice
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
)
(folder / "sums.yaml").write_text(
    TASK.format(name="sums", folder=folder)
    + """
output_type: generate_until
doc_to_target: "{{sum}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, temperature: 0, do_sample: false}
filter_list: [{name: plain, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
"""
)
tasks = TaskManager(include_path=str(folder), include_defaults=False)
_own: dict[str, Any] = {}


def evaluate(task: str, model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    assert found is not None
    return found


def own(task: str) -> dict[str, Any]:
    """Returns the outcome of lm-eval's transformers backend."""
    if task not in _own:
        _own[task] = evaluate(task, "hf", {"pretrained": FOLDER, "dtype": "float32", "device": "cpu", "batch_size": 1})
    return _own[task]


def served(task: str, **more: Any) -> dict[str, Any]:
    arguments = {"model": MODEL, "base_url": f"{V1}/completions", "tokenizer": FOLDER, "num_concurrent": 4, **more}
    return evaluate(task, "local-completions", {"max_length": 1024, "max_retries": 1, **arguments})


def scores(found: dict[str, Any], task: str) -> dict[str, float]:
    return {name: value for name, value in found["results"][task].items() if isinstance(value, float)}


def same_scores(mine: dict[str, Any], theirs: dict[str, Any], task: str) -> str:
    """Compares the scores of a task and returns both, as a line."""
    one, other = scores(mine, task), scores(theirs, task)
    assert one and one.keys() == other.keys(), (one, other)
    assert all(abs(one[name] - other[name]) <= TOLERANCE for name in one), (one, other)
    return ", ".join(f"{name} {one[name]:.4f} against {other[name]:.4f}" for name in one)


def same_likelihoods(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Compares the log-likelihood of every choice and returns the largest difference, as a line."""
    apart: list[float] = []
    for one, other in zip(*(found["samples"]["continuations"] for found in (mine, theirs)), strict=True):
        for (value, greedy), (wanted, likewise) in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            assert str(greedy) == str(likewise), (one, other)
            apart.append(abs(float(value) - float(wanted)))
    assert max(apart) <= TOLERANCE, max(apart)
    return f"{len(apart)} log-likelihoods differ by at most {max(apart):.1e}"


@check
def loglikelihood() -> str:
    mine = served("continuations")
    said = same_scores(mine, own("continuations"), "continuations")
    return f"{said}; {same_likelihoods(mine, own('continuations'))}"


@check
def loglikelihood_in_batches() -> str:
    return same_likelihoods(served("continuations", batch_size=8, num_concurrent=1), own("continuations"))


@check
def generate_until() -> str:
    mine, theirs = served("sums"), own("sums")
    said = same_scores(mine, theirs, "sums")
    texts = [[sample["filtered_resps"] for sample in found["samples"]["sums"]] for found in (mine, theirs)]
    assert texts[0] == texts[1]
    return f"{said}; {len(texts[0])} equal texts"


@check
def chat_generate_until() -> None:
    found = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args={"model": MODEL, "base_url": f"{V1}/chat/completions", "num_concurrent": 4, "max_retries": 1},
        tasks=["sums"],
        task_manager=tasks,
        apply_chat_template=True,
        bootstrap_iters=0,
        limit=20,
    )
    assert found is not None and "exact_match,plain" in found["results"]["sums"]


run()
