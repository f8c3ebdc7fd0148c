"""Where a CLIP model comes from: a folder that may not be there yet."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

from sam_infer.clip.model import CONFIG, WEIGHTS, ClipModel
from sam_infer.engines.catalog import FOLDERS
from sam_infer.engines.location import folder_in


class ClipSource(Protocol):
    """Whatever knows where a CLIP model is."""

    def current(self) -> tuple[ClipModel | None, str]:
        """The model and "", or None and what to do."""


class ClipFolder:
    """The CLIP model of a folder, once its files are there. Safe to call from several threads.

    Args:
        folder: The user's folder; None = that of the catalogue's ``name`` among the fetched checkpoints.
        name: One of `sam_infer.engines.catalog.FOLDERS`.
        device: Torch device.
    """

    def __init__(
        self, folder: Path | str | None = None, *, name: str = "biomed_clip", device: str = "cpu"
    ) -> None:
        self._entry = FOLDERS[name]
        self._given = None if folder is None else Path(folder)
        self._device = device
        self._model: ClipModel | None = None
        self._lock = threading.Lock()

    def current(self) -> tuple[ClipModel | None, str]:
        """The model and "", or None and what to do."""
        folder = folder_in(self._entry) if self._given is None else self._given
        with self._lock:
            if self._model is None or self._model.folder != folder:
                if not (folder / CONFIG).is_file() or not any((folder / n).is_file() for n in WEIGHTS):
                    return None, (
                        f"{folder} holds no CLIP model; fetch it with `samloop weights fetch "
                        f"{self._entry.name}` on a machine with internet, or name a folder in the project "
                        "file under clip.weights"
                    )
                self._model = ClipModel(folder, device=self._device)
            return self._model, ""
