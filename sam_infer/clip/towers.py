"""The image tower of a CLIP model, opened for maps of saliency: its blocks, its norms and its patch tokens.

Both kinds of vision transformer that open_clip builds are known: its own, and timm's (BiomedCLIP's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Tower:
    """What a vision transformer is made of.

    Args:
        blocks: Its blocks in order; each maps (B, N, C) tokens to (B, N, C).
        norms: Of each block the layer norm before its attention and that before its perceptron.
        grid: Rows and columns of the patches.
        prefix: How many tokens, the class token among them, come before those of the patches.
    """

    blocks: tuple[nn.Module, ...]
    norms: tuple[tuple[nn.Module, nn.Module], ...]
    grid: tuple[int, int]
    prefix: int

    def maps(self, tokens: Tensor) -> Tensor:
        """The patch tokens of (B, N, C) as maps (B, C, rows, columns)."""
        patches = tokens[:, self.prefix :]
        return patches.transpose(1, 2).reshape(len(patches), -1, *self.grid)


def tower_of(visual: nn.Module) -> Tower:
    """The parts of an image tower.

    Raises:
        ValueError: When it is no vision transformer that is known here.
    """
    trunk: Any = getattr(visual, "trunk", None)
    own: Any = visual
    try:
        if trunk is None:
            blocks = tuple(visual.get_submodule("transformer.resblocks").children())
            norms = tuple((one.get_submodule("ln_1"), one.get_submodule("ln_2")) for one in blocks)
            (rows, columns), prefix = own.grid_size, 1
        else:
            blocks = tuple(trunk.get_submodule("blocks").children())
            norms = tuple((one.get_submodule("norm1"), one.get_submodule("norm2")) for one in blocks)
            (rows, columns), prefix = trunk.patch_embed.grid_size, trunk.num_prefix_tokens
    except AttributeError as error:
        raise ValueError(
            f"the image tower is no vision transformer whose parts are known here ({error})"
        ) from error
    return Tower(blocks=blocks, norms=norms, grid=(rows, columns), prefix=prefix)


@contextmanager
def changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, what a module gives goes through a function first."""
    handle = module.register_forward_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()
