"""Training of the target (next-token loss) and distillation of the draft (forward KL)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ssd.testing.models.widen import widen

from .data import KINDS, Batches, heldout_windows
from .muon import Muon
from .recipe import SEED, SEQUENCE, Polishing, Recipe, Stage, model_config

LOGIT_CHUNK = 2048  # rows whose logits are held at once


def _optimizers(model: torch.nn.Module, stage: Stage | Polishing) -> list[torch.optim.Optimizer]:
    """Returns the optimizers: Muon for the matrices of the layers, AdamW for embeddings and norms."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    ids = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [
        Muon(hidden, lr=stage.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=stage.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _lr_scale(step: int, stage: Stage | Polishing) -> float:
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    decay_from = stage.steps * (1 - stage.decay_share)
    return 1.0 if step < decay_from else max(0.02, (stage.steps - step) / (stage.steps - decay_from))


def _save(path: Path, model, optimizers, step: int, log: list[dict]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    state = {"step": step, "optimizers": [o.state_dict() for o in optimizers]}
    temporary = path / "state.pt.tmp"
    torch.save(state, temporary)
    temporary.rename(path / "state.pt")
    (path / "log.json").write_text(json.dumps(log))


def run(
    name: str,
    stage: Stage | Polishing,
    path: Path,
    start_model: Callable[[], LlamaForCausalLM],
    batch_at: Callable[[int], torch.Tensor],
    loss_of: Callable[[LlamaForCausalLM, torch.Tensor], torch.Tensor],
    evaluate: Callable[[LlamaForCausalLM], dict[str, float]],
    device: str,
    micro_rows: int,
) -> None:
    """Trains the model of ``start_model``, or resumes; training has ended if ``path/done`` exists."""
    if (path / "done").exists():
        return
    torch.manual_seed(SEED)
    start, log = 0, []
    if not (path / "state.pt").exists():
        model = start_model().to(device).train()
        optimizers = _optimizers(model, stage)
    else:
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).train()
        optimizers = _optimizers(model, stage)
        state = torch.load(path / "state.pt", weights_only=True, map_location=device)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, log = state["step"], json.loads((path / "log.json").read_text())
    loss_of = torch.compile(loss_of)  # 1.7 times faster on two CPU cores
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    began, seen = time.monotonic(), 0
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=stage.steps, completed=start, note="")
        for step in range(start, stage.steps):
            for optimizer, lr in zip(optimizers, (stage.muon_lr, stage.adamw_lr), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = lr * _lr_scale(step, stage)
            batch = batch_at(stage.first_step + step).to(device)
            total = 0.0
            for micro in batch.split(micro_rows):
                loss = loss_of(model, micro) * (len(micro) / len(batch))
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            seen += len(batch) * SEQUENCE
            record = {"step": step + 1, "loss": total, "tokens_per_s": seen / (time.monotonic() - began)}
            if (step + 1) % stage.save_every == 0 or step + 1 == stage.steps:
                model.eval()
                record |= evaluate(model)
                model.train()
                log.append(record)
                _save(path, model, optimizers, step + 1, log)
                progress.console.print(record)
            else:
                log.append(record)
            progress.update(bar, advance=1, note=f"loss {total:.3f}  {record['tokens_per_s']:.0f} tok/s")
    (path / "done").touch()


def _grown(recipe: Recipe, role: str) -> LlamaForCausalLM | None:
    """Returns the model of the generation before with this one's MLP width; None for the first generation."""
    before = recipe.grown_from()
    if before is None:
        return None
    model = LlamaForCausalLM.from_pretrained(before.path(role), dtype=torch.float32)
    size = model.config
    return widen(
        model,
        hidden_size=size.hidden_size,
        intermediate_size=recipe.generation.units[role],
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_key_value_heads,
        num_hidden_layers=size.num_hidden_layers,
        seed=SEED,
    )


def _fresh(recipe: Recipe, role: str, embedding: torch.Tensor | None = None) -> LlamaForCausalLM:
    """Returns a random model, with ``embedding [V, hidden]`` if one is given."""
    model = LlamaForCausalLM(model_config(role, recipe.generation.units[role]))
    if embedding is None:
        # Small models start calmer with a smaller embedding (it is also the output head).
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    else:
        model.model.embed_tokens.weight.data.copy_(embedding)
    return model


def _heldout_loss(model: LlamaForCausalLM, windows: dict[str, torch.Tensor]) -> dict[str, float]:
    out = {}
    with torch.no_grad():
        for kind, ids in windows.items():
            losses = [_next_token_loss(model, part).item() for part in ids.to(model.device).split(8)]
            out[f"heldout_{kind}"] = sum(losses) / len(losses)
    return out


def _hidden(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Returns the final hidden states ``[rows · length, hidden]``."""
    return model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)


def _next_token_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    hidden, labels = _hidden(model, ids[:, :-1]), ids[:, 1:].flatten()
    return F.cross_entropy(model.lm_head(hidden).float(), labels)


def train_target(recipe: Recipe, device: str, micro_rows: int) -> None:
    root, stage = recipe.root, recipe.generation.target
    batches = Batches(root, rows=stage.rows, code_share=stage.code_share, seed=SEED)
    windows = {kind: heldout_windows(root, kind, count=24, length=SEQUENCE + 1) for kind in KINDS}
    run(
        "target",
        stage,
        recipe.path("target"),
        lambda: _grown(recipe, "target") or _fresh(recipe, "target"),
        batches.step,
        _next_token_loss,
        lambda model: _heldout_loss(model, windows),
        device,
        micro_rows,
    )


@torch.no_grad()
def write_samples(recipe: Recipe, device: str) -> None:
    """Writes the target's continuations of training text: greedy and at temperatures 0.7 and 1.

    The draft then learns from contexts as they occur in use (on-policy distillation)."""
    out = recipe.path("samples.pt")
    if out.exists():
        return
    model = AutoModelForCausalLM.from_pretrained(recipe.path("target"), dtype=torch.float32).to(device).eval()
    batches = Batches(recipe.root, rows=64, code_share=0.7, seed=SEED + 1)
    torch.manual_seed(SEED)
    before = recipe.grown_from()
    first = before.generation.samples // 64 if before else 0
    rows: list[torch.Tensor] = []
    with Progress() as progress:
        bar = progress.add_task("samples", total=recipe.generation.samples)
        for index, temperature in zip(
            range(recipe.generation.samples // 64), _cycle((0.0, 0.7, 1.0, 0.0)), strict=False
        ):
            prompts = batches.step(first + index)[:, :48].to(device)
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
            )
            ids = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                min_new_tokens=208,
                max_new_tokens=208,
                pad_token_id=0,
                **sampling,
            )
            rows.append(ids.cpu())
            progress.update(bar, advance=64)
    torch.save(torch.cat(rows), out)


def _cycle(values: tuple[float, ...]) -> Iterator[float]:
    while True:
        yield from values


def distill_draft(recipe: Recipe, device: str, micro_rows: int) -> None:
    """Distills the draft: forward KL(target ‖ draft) at every position, on text and on the target's samples."""
    root, stage = recipe.root, recipe.generation.draft
    target = AutoModelForCausalLM.from_pretrained(recipe.path("target"), dtype=torch.float32).to(device).eval()
    batches = Batches(root, rows=stage.rows // 2, code_share=stage.code_share, seed=SEED + 2)
    samples = torch.load(recipe.path("samples.pt"), weights_only=True)
    windows = {kind: heldout_windows(root, kind, count=16, length=SEQUENCE + 1) for kind in KINDS}

    def batch_at(step: int) -> torch.Tensor:
        # Two sampled sequences stand in one row of SEQUENCE: the end of one is no context of
        # the other that training text does not also have.
        pick = torch.Generator().manual_seed(SEED + step)
        rows = torch.randperm(len(samples), generator=pick)[: 2 * (stage.rows - stage.rows // 2)]
        own = samples[rows].reshape(-1, 2 * samples.shape[1])[:, :SEQUENCE]
        own = F.pad(own, (0, SEQUENCE + 1 - own.shape[1]))
        return torch.cat([batches.step(step), own])

    def loss_of(draft: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
        ids = ids[:, :-1]
        with torch.no_grad():
            teacher = _hidden(target, ids)
        student = _hidden(draft, ids)
        losses = []
        for t, s in zip(teacher.split(LOGIT_CHUNK), student.split(LOGIT_CHUNK), strict=True):
            with torch.no_grad():
                target_logprobs = target.lm_head(t).float().log_softmax(-1)
            draft_logprobs = draft.lm_head(s).float().log_softmax(-1)
            losses.append(F.kl_div(draft_logprobs, target_logprobs, reduction="sum", log_target=True))
        return torch.stack(losses).sum() / len(student)

    @torch.no_grad()
    def evaluate(draft: LlamaForCausalLM) -> dict[str, float]:
        out = {}
        for kind, ids in windows.items():
            agree, overlap, count = 0.0, 0.0, 0
            for part in ids.to(device).split(4):
                t = target.lm_head(_hidden(target, part)).float().softmax(-1)
                s = draft.lm_head(_hidden(draft, part)).float().softmax(-1)
                agree += (t.argmax(-1) == s.argmax(-1)).float().sum().item()
                overlap += torch.minimum(t, s).sum().item()
                count += len(t)
            out |= {f"agree_{kind}": agree / count, f"overlap_{kind}": overlap / count}
        return out

    def start_model() -> LlamaForCausalLM:
        if (grown := _grown(recipe, "draft")) is not None:
            return grown
        # The target's own embedding, as well as fewer dimensions can hold it: the draft then starts
        # with a sensible input and output space instead of spending its few steps on finding one.
        width = model_config("draft", 0).hidden_size
        left, scale, _ = torch.linalg.svd(target.model.embed_tokens.weight.float(), full_matrices=False)
        return _fresh(recipe, "draft", left[:, :width] * scale[:width])

    run("draft", stage, recipe.path("draft"), start_model, batch_at, loss_of, evaluate, device, micro_rows)
