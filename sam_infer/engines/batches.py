"""Prompts of different shapes, decoded in as few batches as they allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sam_infer.types import Candidates, Prompts


def decode_by_shape(
    prompts: Sequence[Prompts], decode: Callable[[list[Prompts]], list[Candidates]]
) -> list[Candidates]:
    """Decode prompts of one shape (number of points; box, mask, text, attention or none) as one batch each.

    Args:
        prompts: One entry per object.
        decode: Decodes prompts of one shape.

    Returns:
        One `Candidates` per prompt, in the order of ``prompts``.

    Raises:
        ValueError: When a prompt is empty.
    """
    groups: dict[tuple[int | bool, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        if prompt.is_empty:
            raise ValueError(f"prompt {index} is empty")
        parts = (prompt.box, prompt.mask_logits, prompt.text, prompt.attention)
        shape = (len(prompt.points), *(part is not None for part in parts))
        groups.setdefault(shape, []).append(index)
    results: dict[int, Candidates] = {}
    for indices in groups.values():
        results.update(zip(indices, decode([prompts[i] for i in indices]), strict=True))
    return [results[i] for i in range(len(prompts))]
