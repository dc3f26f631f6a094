"""The process of a peer: runs another library on the same weights.

The script imports nothing from this package, which the peer's environment need not contain.

Messages are JSON objects, one per line. Input: ``{"load": {...}}`` first, then ``{"run": {...}}`` until the pipe
closes. Output: ``{"ready": {...}}``, ``{"outputs": [[ids], ...], "decode_s": s}`` or, before the process ends,
``{"error": text}``.

``decode_s`` is comparable with ours: loading, compiling and prefill are left out. The clock starts at the first
token; ours counts that token too, so the time is scaled to all tokens.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from types import TracebackType
from typing import Any


def stretched(elapsed_s: float, tokens: int, at_start: int) -> float:
    """Scales the seconds of the tokens after the first ``at_start`` to all ``tokens``."""
    return elapsed_s * tokens / (tokens - at_start) if tokens > at_start else 0.0


class TransformersPeer:
    """``generate``, plain or assisted."""

    def __init__(self, order: dict[str, Any]):
        import torch
        import transformers

        torch.set_num_threads(order["threads"])
        self._torch = torch
        # transformers resolves its names lazily; this one is needed while the clock runs.
        self._stopping = transformers.StoppingCriteriaList

        def load(path: str) -> Any:
            folder, more = path, {}
            if os.path.isfile(path):
                folder, name = os.path.split(path)
                more = {"gguf_file": name, "quantization_config": transformers.GgufConfig(dequantize=True)}
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, order["dtype"]), local_files_only=True, **more
            )
            model.generation_config.eos_token_id = None
            return model.eval()

        self.model = load(order["target"])
        self.assistant = load(order["draft"]) if order["draft"] else None
        self.version = transformers.__version__

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        torch, prompts = self._torch, order["prompts"]
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        first: list[tuple[float, int]] = []

        def seen(input_ids: Any, scores: Any, **_: Any) -> Any:
            if not first:
                first.append((time.perf_counter(), input_ids.shape[1] - longest))
            return torch.zeros(len(input_ids), dtype=torch.bool)

        sampled: dict[str, Any] = {"do_sample": False}
        if order["temperature"] > 0:
            sampled = {"do_sample": True, "temperature": order["temperature"], "top_k": 0, "top_p": 1.0}
        torch.manual_seed(order["seed"])
        with torch.no_grad():
            found = self.model.generate(
                ids,
                attention_mask=mask,
                assistant_model=self.assistant,
                max_new_tokens=order["max_tokens"],
                stopping_criteria=self._stopping([seen]),
                pad_token_id=0,
                **sampled,
            )
        ended = time.perf_counter()
        began, at_start = first[0]
        outputs = [row[longest:].tolist() for row in found]
        return {"outputs": outputs, "decode_s": stretched(ended - began, len(outputs[0]), at_start)}


class VllmPeer:
    """vLLM, plain or with a draft model."""

    def __init__(self, order: dict[str, Any]):
        vllm = importlib.import_module("vllm")
        speculative = {}
        if order["draft"]:
            config = {"method": "draft_model", "model": order["draft"], "num_speculative_tokens": order["lookahead"]}
            speculative = {"speculative_config": config}
        self._params = vllm.SamplingParams
        self.model = vllm.LLM(
            model=order["target"],
            dtype=order["dtype"],
            max_model_len=order["max_model_len"],
            max_num_seqs=order["batch"],
            enable_prefix_caching=False,
            disable_log_stats=False,
            **speculative,
        )
        self.version = vllm.__version__

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        params = self._params(
            temperature=order["temperature"], seed=order["seed"], max_tokens=order["max_tokens"], ignore_eos=True
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in order["prompts"]]
        found = self.model.generate(prompts, params, use_tqdm=False)
        outputs = [list(one.outputs[0].token_ids) for one in found]
        times = [one.metrics for one in found]
        if any(one is None for one in times):
            raise RuntimeError("vLLM gave no timestamps of its requests")
        # All prompts decode from the last prompt's first token on; the others start a little earlier.
        elapsed_s = max(one.last_token_ts for one in times) - min(one.first_token_ts for one in times)
        return {"outputs": outputs, "decode_s": stretched(elapsed_s, len(outputs[0]), 1)}


class LlamaCppPeer:
    """llama.cpp on a GGUF file, plain or with the speculation of its Python package: prompt lookup."""

    def __init__(self, order: dict[str, Any]):
        self._library = library = importlib.import_module("llama_cpp")
        speculation = {}
        if order["lookup"]:
            found = importlib.import_module("llama_cpp.llama_speculative")
            speculation = {"draft_model": found.LlamaPromptLookupDecoding(num_pred_tokens=order["lookahead"])}
        self.model = library.Llama(
            model_path=order["target"],
            n_ctx=order["max_model_len"],
            n_threads=order["threads"],
            n_threads_batch=order["threads"],
            verbose=False,
            **speculation,
        )
        self._plain = not speculation
        self.version = library.__version__

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        if order["temperature"] > 0 or len(order["prompts"]) > 1:
            raise RuntimeError("llama.cpp runs one greedy prompt at a time here")
        [prompt], wanted = order["prompts"], order["max_tokens"]
        tokens, times = [], []
        for token in self._greedy(prompt) if self._plain else self.model.generate(prompt, temp=0.0, top_k=1):
            tokens.append(int(token))
            times.append(time.perf_counter())
            if len(tokens) >= wanted:
                break
        return {"outputs": [tokens], "decode_s": stretched(times[-1] - times[0], len(tokens), 1)}

    def _greedy(self, prompt: list[int]) -> Any:
        """Yields tokens by the C interface: the package's own loop copies all logits to Python for each."""
        library, context = self._library, self.model._ctx.ctx
        library.llama_memory_clear(library.llama_get_memory(context), True)
        sampler = library.llama_sampler_init_greedy()
        given = prompt
        while True:
            ids = (library.llama_token * len(given))(*given)
            if library.llama_decode(context, library.llama_batch_get_one(ids, len(given))):
                raise RuntimeError("llama_decode failed")
            given = [library.llama_sampler_sample(sampler, context, -1)]
            yield given[0]


PEERS = {"transformers": TransformersPeer, "vllm": VllmPeer, "llama_cpp": LlamaCppPeer}


def main() -> None:
    """Serves orders until the pipe closes. An error is reported, and ends the process."""
    # Libraries may write to standard output, so answers get a descriptor of their own.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        answer({"error": f"{kind.__name__}: {error}"})
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = report
    peer = None
    for line in sys.stdin:
        order = json.loads(line)
        if "load" in order:
            if order["load"]["cores"] and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, order["load"]["cores"])
            peer = PEERS[order["load"]["library"]](order["load"])
            answer({"ready": {"version": peer.version}})
        else:
            assert peer is not None
            answer(peer.run(order["run"]))


if __name__ == "__main__":
    main()
