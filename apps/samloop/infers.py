"""A project's inference tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from monailabel.interfaces.datastore import Datastore

from apps.samloop.models import Models
from sam_infer.tasks.reply import LabelmapTask


def make_infers(models: Models, datastore: Callable[[], Datastore] | None) -> dict[str, LabelmapTask]:
    """The inference tasks that a project names.

    Args:
        models: What they are made from.
        datastore: Gives the datastore; without one there is no task that answers with what it holds.
    """
    seen: dict[str, Any] = {"encoder": models.encoder, "library": models.library}
    labels = models.project.labels

    def click(dimension: int) -> LabelmapTask:
        from sam_infer.tasks.click import ClickInfer

        return ClickInfer(**seen, dimension=dimension, options={"store_boxes": False})

    def multi() -> LabelmapTask:
        from sam_infer.tasks.multi import MultiInfer

        return MultiInfer(**seen, labels=labels)

    def scribble() -> LabelmapTask:
        from sam_infer.tasks.scribble import ScribbleInfer

        return ScribbleInfer(**seen)

    def auto_net() -> LabelmapTask:
        from sam_infer.tasks.autonet import AutoNetInfer

        return AutoNetInfer(unet=models.unet, **seen, labels=labels)

    def auto_cam() -> LabelmapTask:
        from sam_infer.tasks.autocam import AutoCamInfer

        path, device = models.home / "models" / "cam.safetensors", models.project.device
        return AutoCamInfer(path=path, **seen, labels=labels, device=device)

    def auto_clip() -> LabelmapTask:
        from sam_infer.tasks.autoclip import AutoClipInfer

        return AutoClipInfer(clip=models.clip, **seen, labels=labels, texts=models.descriptions)

    def auto_mix() -> LabelmapTask:
        from sam_infer.tasks.automix import AutoMixInfer

        path = models.home / "models" / "mix.safetensors"
        return AutoMixInfer(
            path=path, base=models.base, store=models.store, library=models.library, labels=labels
        )

    def auto_text() -> LabelmapTask:
        from sam_infer.tasks.autotext import AutoTextInfer

        return AutoTextInfer(
            path=models.home / "models" / "preference.safetensors",
            base=models.base,
            store=models.store,
            prompters=models.prompters,
            texts=lambda: models.texts,
            library=models.library,
            labels=labels,
        )

    def tuned() -> LabelmapTask:
        from sam_infer.tasks.tuned import TunedClickInfer

        return TunedClickInfer(encoder=models.tuned_encoder, engine=models.tuned, library=models.library)

    def stored() -> LabelmapTask:
        from apps.samloop.proposals import StoredProposal

        assert datastore is not None
        return StoredProposal(datastore=datastore, labels=labels, read=models.library.read)

    makers: dict[str, Callable[[], LabelmapTask]] = {
        "sam_click_2d": lambda: click(2),
        "sam_click_3d": lambda: click(3),
        "sam_multi": multi,
        "sam_scribble": scribble,
        "unet": lambda: models.unet,
        "sam_auto_net": auto_net,
        "sam_auto_cam": auto_cam,
        "sam_auto_clip": auto_clip,
        "sam_auto_mix": auto_mix,
        "sam_auto_text": auto_text,
        "sam_tuned": tuned,
        "pseudo_label": stored,
    }
    absent = {"pseudo_label"} if datastore is None else set()
    return {name: makers[name]() for name in models.project.models if name not in absent}
