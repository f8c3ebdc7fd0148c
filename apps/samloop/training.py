"""A project's trainers by name."""

from __future__ import annotations

from typing import Any

from apps.samloop.models import Models, cores


def make_trainers(models: Models) -> dict[str, Any]:
    """The trainers that a project names.

    Args:
        models: What they are made from.
    """
    from trainers.basis import Basis

    basis = Basis(
        model_dir=models.home / "models",
        labels=models.project.labels,
        window_for=models.library.window_for,
        window=models.project.window,
        read=models.library.read,
        held_out=models.project.held_out,
        group=models.project.group,
        threads=max(1, cores() - 1),
    )

    def unet() -> Any:
        from trainers.unet import UnetTrainer

        return UnetTrainer(basis)

    def pseudo_label() -> Any:
        from trainers.pseudo_label import PseudoLabelTrainer

        return PseudoLabelTrainer(basis, encoder=models.encoder)

    def self_training() -> Any:
        from trainers.pseudo_label import SelfTrainingTrainer

        return SelfTrainingTrainer(basis)

    def mean_teacher() -> Any:
        from trainers.mean_teacher import MeanTeacherTrainer

        return MeanTeacherTrainer(basis)

    def weak_box() -> Any:
        from trainers.weak_box import WeakBoxTrainer

        return WeakBoxTrainer(basis, encoder=models.encoder, boxes=models.boxes)

    def cam_classifier() -> Any:
        from trainers.cam_classifier import CamClassifierTrainer

        return CamClassifierTrainer(basis, csv=models.project.image_labels)

    def sam_finetune() -> Any:
        from trainers.sam_finetune import SamFinetuneTrainer

        return SamFinetuneTrainer(basis, base=models.base, store=models.store)

    def sam_mix() -> Any:
        from trainers.sam_mix import SamMixTrainer

        return SamMixTrainer(basis, base=models.base, store=models.store, csv=models.project.image_labels)

    def preference() -> Any:
        from trainers.preference import PreferenceTrainer

        return PreferenceTrainer(
            basis,
            base=models.base,
            store=models.store,
            prompters=models.prompters,
            texts=lambda: models.texts,
            preferences=models.preferences,
        )

    makers = {
        "unet": unet,
        "cam_classifier": cam_classifier,
        "pseudo_label": pseudo_label,
        "self_training": self_training,
        "mean_teacher": mean_teacher,
        "weak_box": weak_box,
        "sam_finetune": sam_finetune,
        "sam_mix": sam_mix,
        "preference": preference,
    }
    return {name: makers[name]() for name in models.project.trainers}
