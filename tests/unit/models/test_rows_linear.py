"""The packed product: equal to ``nn.Linear``, and a row has the same bits beside any other rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ssd.models.cpu import operators
from ssd.models.cpu.rows_linear import RowsLinear, pack_linears
from ssd.models.runner import can_compile
from ssd.testing.models.tiny import tiny_model

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def built() -> None:
    assert operators.available()


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16 numbers"])
@pytest.mark.parametrize(("depth", "outputs"), [(1, 1), (7, 63), (64, 64), (192, 65), (384, 1000)])
def test_rows(depth: int, outputs: int, halves: bool, threads: int) -> None:
    generator = torch.Generator().manual_seed(depth)
    weight = torch.randn(outputs, depth, generator=generator)
    weight = weight.bfloat16().float() if halves else weight
    packed = torch.ops.ssd.pack(weight)
    assert packed.dtype == (torch.bfloat16 if halves else torch.float32)
    rows = torch.randn(20, depth, generator=generator)
    exact = rows.double() @ weight.double().T
    all_rows = torch.ops.ssd.rows_linear(rows, packed, outputs)
    assert all_rows.shape == (20, outputs)
    assert (all_rows - exact).abs().max() <= 1e-6 * depth**0.5 * exact.abs().max()
    for count in range(1, 20):
        assert torch.equal(torch.ops.ssd.rows_linear(rows[-count:], packed, outputs), all_rows[-count:])
    assert torch.equal(torch.ops.ssd.rows_linear(rows.view(4, 5, depth), packed, outputs).flatten(0, 1), all_rows)
    assert torch.equal(torch.ops.ssd.rows_linear(rows.T.contiguous().T, packed, outputs), all_rows)


def test_bfloat16_numbers_lose_nothing() -> None:
    """The same numbers kept as float32 (one weight is no bfloat16 number, its column is cut off) and as bfloat16."""
    weight = torch.randn(128, 96).bfloat16().float()
    mixed = torch.cat([weight, torch.full((1, 96), 1 / 3)])
    rows = torch.randn(5, 96)
    kept = torch.ops.ssd.rows_linear(rows, torch.ops.ssd.pack(mixed), 129)[:, :128]
    assert torch.ops.ssd.pack(mixed).dtype == torch.float32
    assert torch.equal(torch.ops.ssd.rows_linear(rows, torch.ops.ssd.pack(weight), 128), kept)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "phi"])
def test_a_model_with_its_layers_replaced(architecture: str) -> None:
    """Biases, tied and untied heads."""
    model, packed = tiny_model(architecture, vocab_size=128), tiny_model(architecture, vocab_size=128)
    pack_linears(packed)
    assert not any(type(module) is nn.Linear for module in packed.modules())
    assert any(isinstance(module, RowsLinear) for module in packed.modules())
    ids = torch.randint(0, 128, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused() -> None:
    packed = torch.ops.ssd.pack(torch.randn(8, 16))
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.ssd.rows_linear(torch.randn(3, 15), packed, 8)
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.ssd.rows_linear(torch.randn(3, 16, dtype=torch.float64), packed, 8)
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.ssd.pack(torch.randn(8, 16, dtype=torch.float64))
