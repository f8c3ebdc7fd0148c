"""One case of a simulation: proposal, clicks, acceptance, over the server's REST interface."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.samloop import cases, clinician, report
from apps.samloop.client import Client, ServerError, read_bytes
from sam_infer.errors import InputError
from sam_infer.overlap import dice
from sam_infer.types import BoolArray
from sam_infer.volumes import Image

_REPLY = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": True}


class CaseWork:
    """What the clinician does with a case.

    Args:
        client: Speaks to the server.
        truths: Ground truth files by stem.
        labels: Name to index of the labels that are drawn.
        all_labels: Name to index of all labels of the server.
        proposal_model: The model that proposes.
        proposal_params: What it is asked with.
        budget: Clicks for each label of a case.
        accept_dice: Dice from which the clinician is content.
        box_first: Begin an object without a proposal with a box.
        store_truth: Store the true mask instead of the corrected one.
    """

    def __init__(
        self,
        *,
        client: Client,
        truths: Mapping[str, Path],
        labels: dict[str, int],
        all_labels: dict[str, int],
        proposal_model: str,
        proposal_params: Mapping[str, Any],
        budget: int,
        accept_dice: float,
        box_first: bool,
        store_truth: bool,
    ) -> None:
        self.client = client
        self.truths = truths
        self.labels = labels
        self.all_labels = all_labels
        self.proposal_model = proposal_model
        self.proposal_params = proposal_params
        self.budget = budget
        self.accept_dice = accept_dice
        self.box_first = box_first
        self.store_truth = store_truth

    def run(self, image_id: str, *, propose: bool) -> dict[str, Any]:
        """Work through one case and store what the clinician accepts.

        Args:
            image_id: Id of the datastore, equal to the stem of the truth file.
            propose: Ask the model for a proposal first.

        Returns:
            The record of the case for the report.

        Raises:
            CaseError: When this case cannot be worked on.
            ServerError: When the server fails.
        """
        begin = time.perf_counter()
        if image_id not in self.truths:
            raise cases.CaseError("no ground truth of this stem")
        content, filename = self.client.image(image_id)
        try:
            image = read_bytes(content, filename)
        except InputError as error:
            raise cases.CaseError(str(error)) from error
        truth = cases.read_truth(self.truths[image_id], image)
        wanted = cases.masks_of(truth, self.labels)
        if not wanted:
            raise cases.CaseError(f"the truth holds none of the labels {', '.join(self.labels)}")
        order = sorted(wanted, key=lambda name: -int(wanted[name].sum()))
        proposal = self._proposal(image_id, image) if propose else None
        drawn: dict[str, clinician.Drawing] = {}
        before: dict[str, float | None] = {}
        for name in order:
            start = None if proposal is None else proposal.get(name, np.zeros(image.shape, bool))
            before[name] = None if start is None else round(dice(start, wanted[name]), 4)
            drawn[name] = self._draw(image_id, image, name, wanted[name], start if before[name] else None)
        labelmap = cases.merge({n: drawn[n].mask for n in order}, self.labels, image.shape)
        final = {n: round(dice(labelmap == self.labels[n], wanted[n]), 4) for n in order}
        if self.store_truth:
            labelmap = cases.merge({n: wanted[n] for n in order}, self.labels, image.shape)
        self._accept(image_id, labelmap, image, order)
        return {
            "id": image_id,
            "clicks": sum(d.clicks for d in drawn.values()),
            "undone": sum(d.undone for d in drawn.values()),
            "proposal_dice": report.mean(list(before.values())),
            "final_dice": report.mean(list(final.values())),
            "below_threshold": any(v < self.accept_dice for v in final.values()),
            "seconds": round(time.perf_counter() - begin, 3),
            "labels": {
                n: {
                    "clicks": drawn[n].clicks,
                    "first_prompt_box": drawn[n].boxed,
                    "undone": drawn[n].undone,
                    "proposal_dice": before[n],
                    "final_dice": final[n],
                    "dice_after_click": [round(v, 4) for v in drawn[n].history],
                }
                for n in order
            },
        }

    def _proposal(self, image_id: str, image: Image) -> dict[str, BoolArray] | None:
        """The model's masks by label name; None where it is not trained yet, or has nothing for this case."""
        try:
            reply = self.client.infer(self.proposal_model, image_id, {**self.proposal_params, **_REPLY})
        except ServerError as error:
            if error.status in (404, 409):
                return None
            raise
        names = cases.label_indices(reply.params.get("label_names")) or self.all_labels
        return cases.masks_of(reply.onto(np.zeros(image.shape, np.uint8)), names)

    def _draw(
        self, image_id: str, image: Image, name: str, truth: BoolArray, start: BoolArray | None
    ) -> clinician.Drawing:
        model = "sam_click_2d" if image.shape[2] == 1 else "sam_click_3d"
        label = None if start is None else cases.mask_file(start, image)
        base = (np.zeros(image.shape, bool) if start is None else start).astype(np.uint8)
        size = 2 if image.flat else 3

        def ask(clicks: Sequence[clinician.Click], roi: clinician.Roi | None) -> BoolArray:
            request: dict[str, Any] = {
                "label": name,
                "foreground": [list(c.voxel[:size]) for c in clicks if c.positive],
                "background": [list(c.voxel[:size]) for c in clicks if not c.positive],
                "result_region": True,
                **_REPLY,
            }
            if roi is not None:
                request["roi"] = list(roi)
            reply = self.client.infer(model, image_id, request, label=label)
            return reply.onto(base) > 0

        return clinician.draw(
            ask,
            truth,
            start,
            budget=self.budget,
            accept_dice=self.accept_dice,
            box_first=self.box_first,
        )

    def _accept(self, image_id: str, labelmap: NDArray[np.uint8], image: Image, names: Sequence[str]) -> None:
        filename, content = cases.label_file(image_id, labelmap, image)
        listed = [{"name": n, "idx": self.labels[n], "value": self.labels[n]} for n in names]
        self.client.save_label(image_id, filename, content, {"label_info": listed})
