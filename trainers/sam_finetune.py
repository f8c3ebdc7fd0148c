"""The trainer behind ``POST /train/sam_finetune``: accepted cases in, a SAM that needs fewer clicks out."""

from __future__ import annotations

from typing import Any

from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.engines.sam import SamEngine
from sam_infer.tuning.learner import SamLearner
from sam_infer.tuning.tunedfile import TunedSam
from trainers.basis import Basis, Parts
from trainers.evaluate import Score
from trainers.modelrecipe import Trained
from trainers.round import Round
from trainers.samrecipe import SamRecipe
from trainers.samscore import prompted_score
from trainers.samsteps import tuning_step


class SamFinetuneTrainer(SamRecipe):
    """Tunes the SAM that answers clicks on the accepted cases, by prompts such as clinicians give.

    With ``method`` "decoder" the encoder stands still: each slice is encoded once, and embeddings that the
    server keeps are used again. It is judged by Dice of a box, one click and three clicks on the held-out
    cases, against what is served: the base itself in the first round.

    Args:
        basis: What it stands on.
        base: The SAM that is tuned; it is never changed.
        store: Embeddings of the base on disk; None = they are made again each time.
    """

    def __init__(self, basis: Basis, *, base: SamEngine, store: EmbeddingStore | None = None) -> None:
        super().__init__(
            basis,
            base=base,
            store=store,
            name="sam_finetune",
            served="sam",
            description="Tunes the SAM that answers clicks on the accepted cases",
        )

    def config(self) -> dict[str, Any]:
        """What a request may set, with the defaults; the first entry of a list is the default."""
        return {**super().config(), "batch_size": 4}  # each view is asked for twice and corrected

    def _train(self, now: Round, start: TunedSam | None) -> Trained:
        tuning = self.tuning(now.plan)
        views = self.views(now, now.parts.training, still=tuning.encoder == "frozen")
        learner = SamLearner(self.base.model, tuning=tuning, seed=now.plan.settings.seed)
        if start is not None:
            learner.restore(start.network.learned())
        step = tuning_step(views, frame=self.frame, batch=now.plan.batch)
        run = now.train("training", learner, step)
        return Trained(run=run, slices=len(views), facts={"base": self.base.name, "tuning": tuning.record()})

    def _score(self, model: TunedSam, parts: Parts) -> Score:
        return prompted_score(
            self.encoder(model.engine(self.base)),
            parts.held_out,
            labels=self.basis.labels,
            window_for=self.basis.window_for,
            read=self.basis.read,
        )
