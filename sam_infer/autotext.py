"""A tuned SAM, prompted by an automatic source of boxes and by what is said about each label.

The inference of Konwer et al. (CVPR 2025, arXiv 2503.04639): no human, the prompts of their stage 0, the
text as one more token. Going through volumes slice by slice, and several labels at once of which the highest
logit wins a pixel, are this project's own choice. Whole slices are encoded, as in training.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from sam_infer.embeddings import SliceEncoder
from sam_infer.intensity import Window
from sam_infer.parts import AutoVolume, PartsAnswer, ask_parts, put_answers
from sam_infer.prompters import Prompter
from sam_infer.text.labeltexts import LabelTexts
from sam_infer.tuning.tunedfile import TunedSam
from sam_infer.types import Prompts
from sam_infer.volumes import Image, empty_labelmap


def auto_text(
    image: Image,
    model: TunedSam,
    prompter: Prompter,
    *,
    encoder: SliceEncoder,
    window: Window,
    texts: LabelTexts | None,
    labels: Collection[str] | None = None,
    uncertainty: bool = False,
) -> AutoVolume[dict[int, PartsAnswer]]:
    """Label an image.

    Args:
        image: A 2D image or a volume.
        model: The tuned SAM.
        prompter: Gives the boxes.
        encoder: The tuned SAM's engine behind its caches.
        window: How the image's values become 0..1.
        texts: Embeds what is said; None where the model learned nothing of text.
        labels: Names of the labels to look for; None = all of the model's.
        uncertainty: Make the uncertainty map.
    """
    names = [name for name in model.labels if labels is None or name in labels]
    out = empty_labelmap(image.shape)
    doubt = empty_labelmap(image.shape) if uncertainty else None
    answers: dict[str, dict[int, PartsAnswer]] = {name: {} for name in names}
    for k in range(image.shape[2]):
        seen = prompter.parts(image, window, k)
        parts = {}
        for name in (name for name in names if name in seen):
            part = seen[name]
            prompts = worded(part.prompts, name, image, k, encoder=encoder, window=window, texts=texts)
            parts[name] = [replace(part, prompts=prompts)]
        if not parts:
            continue
        found = ask_parts(parts, image, k, encoder=encoder, window=window, zoom=False)
        for name, (answer, _) in found.items():
            answers[name][k] = answer
        put_answers({model.labels[name]: one for name, (_, one) in found.items()}, k, out, doubt)
    return AutoVolume(labelmap=out, labels=answers, uncertainty=doubt)


def worded(
    prompts: Prompts,
    label: str,
    image: Image,
    k: int,
    *,
    encoder: SliceEncoder,
    window: Window,
    texts: LabelTexts | None,
) -> Prompts:
    """Prompts that say in words, too, what is looked for.

    Args:
        prompts: Where it may be.
        label: Name of the label.
        image: The image.
        k: Slice index.
        encoder: Gives the slice's values.
        window: How they become 0..1.
        texts: Embeds what is said; None = nothing is.
    """
    if texts is None:
        return prompts
    pixels = encoder.slice_values(image, k, window) if texts.answerer is not None else None
    return replace(prompts, text=texts.embedding(label, pixels))
