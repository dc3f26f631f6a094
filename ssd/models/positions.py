"""Position embeddings that count from the length of a cache, and those that do not begin at 0.

Both matter because the rows of a forward have positions that no single length gives.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS = {"cache_length", "past_key_values_length"}
"""The argument's name from transformers 5.24 on, and before it."""


class Positioned(nn.Module):
    """A position embedding that counts from a cache's length (the BART family). Gives each row its own position.

    Args:
        embedding: the model's module, which takes that length.
    """

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding: Any = embedding
        self.positions: Tensor | None = None
        """``[B, R]`` int64, of the next forward's rows; None: the embedding counts by itself."""
        self._takes_positions = "position_ids" in inspect.signature(embedding.forward).parameters

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("embedding"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        positions = self.positions
        if positions is None:
            return self.embedding(*args, **kwargs)
        if self._takes_positions:
            rows = self.embedding(args[0], position_ids=positions.flatten())
        else:  # counts the tokens that are not padding
            tokens = torch.full_like(positions[:1, :1], self.embedding.padding_idx + 1)
            rows = self.embedding(tokens.expand(1, int(positions.max()) + 1))[0][positions.flatten()]
        return rows.reshape(*positions.shape, -1)


def place_positions(model: PreTrainedModel) -> list[Positioned]:
    """Puts ``Positioned`` around the embeddings that need it. Returns those of the model."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        for path, module in list(model.named_modules()):
            if _counts(module):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, Positioned(module))
    return [module for module in model.modules() if isinstance(module, Positioned)]


def _counts(module: nn.Module) -> bool:
    bare = next(module.children(), None) is None
    return bare and bool(_LENGTHS & inspect.signature(module.forward).parameters.keys())


@contextlib.contextmanager
def first_position(model: nn.Module) -> Iterator[list[int]]:
    """Yields a list, to which every text adds the number that the model's embedding gives to its first position.

    RoBERTa counts from the padding's id + 1. The list stays empty without such an embedding.
    """
    found = list[int]()
    hooks = [
        module.register_forward_pre_hook(lambda _, given: found.append(int(given[0].flatten()[0])))
        for name, module in model.named_modules()
        if type(module) is nn.Embedding and name.endswith("position_embeddings")
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
