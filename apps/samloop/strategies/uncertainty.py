"""`uncertainty`: the case that the model is least sure of."""

from __future__ import annotations

from collections.abc import Callable

from apps.samloop.strategies.scored import Judge, Scored
from apps.samloop.strategies.survey import ReadImage, WindowFor
from sam_infer.networks.unet import UnetModel

UNTRAINED = "no U-Net is published yet: accept cases and start training (POST /train/unet)"


class Uncertainty(Scored):
    """The open case that the U-Net is least confident about.

    Confidence is the mean probability of the predicted class where background is not certain
    (`UnetModel.confidence`): least-confidence sampling (Settles, Active Learning Literature Survey, 2009,
    section 3.1) averaged over the pixels in question.

    Args:
        model: The published model, or None while there is none.
        window_for: The window of an image for a request.
        read: Path to image; a cached reader.
        candidates: Open cases looked at per call, a random subset.
        seconds: No further case is looked at after this time.
    """

    def __init__(
        self,
        *,
        model: Callable[[], UnetModel | None],
        window_for: WindowFor,
        read: ReadImage,
        candidates: int = 30,
        seconds: float = 5.0,
    ) -> None:
        super().__init__(
            name="uncertainty",
            figure="confidence",
            chosen="least confident",
            highest=False,
            read=read,
            window_for=window_for,
            candidates=candidates,
            seconds=seconds,
            description="Open case that the U-Net is least confident about",
        )
        self._model = model

    def _judge(self) -> Judge | str:
        model = self._model()
        if model is None:
            return UNTRAINED
        return Judge(
            figure=model.confidence, fingerprint=model.fingerprint, facts={"model": model.fingerprint}
        )
