"""nnU-Net through its own package: a row that is run where nnunetv2 is installed and it is asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.papers.learners import slices_of, truths
from bench.papers.sets import LabelImage, Sample
from sam_infer.errors import InputError
from sam_infer.networks.unet import from_square

#: A trainer of the package with few epochs (of 250 steps each); its own is 1000, days without a GPU.
TRAINER = "nnUNetTrainer_5epochs"
_NUMBER = "1"
_NAME = "Dataset001_papers"
_COMMANDS = ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict")


def check_installed() -> None:
    """Refuse where the package's commands are not there."""
    missing = [command for command in _COMMANDS if shutil.which(command) is None]
    if missing:
        raise InputError("nnunet", True, f"{missing[0]} is not on the path; run pip install nnunetv2")


def learn_and_predict(
    labelled: Sequence[Sample],
    test: Sequence[Sample],
    *,
    labels: Mapping[str, int],
    size: int,
    folder: Path,
    trainer: str = TRAINER,
    device: str = "cpu",
) -> dict[str, LabelImage]:
    """Plan, train on all labelled images, and predict, each by the package's own command.

    Args:
        labelled: Trained on, with their truth.
        test: Predicted.
        labels: Label name to value.
        size: Longest side in pixels of what it sees, as of the other U-Nets.
        folder: Scratch files lie in a folder below it and are removed.
        trainer: Name of a trainer class of the package.
        device: As the package names it.

    Returns:
        Test image to (H, W) uint8 label values; probabilities are resized, as those of the other U-Nets are.

    Raises:
        InputError: When the package is not installed.
        RuntimeError: When one of its commands fails, with the end of what it said.
    """
    check_installed()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        root = Path(scratch)
        write_dataset(labelled, test, labels=labels, size=size, folder=root / "raw" / _NAME)
        names = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": "results"}
        environment = {**os.environ, **{name: str(root / part) for name, part in names.items()}}
        environment |= {"nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2", "nnUNet_compile": "f"}
        common = ["-d", _NUMBER, "-c", "2d"]
        _call([_COMMANDS[0], *common, "-np", "2", "-npfp", "2"], environment)
        _call([_COMMANDS[1], _NUMBER, "2d", "all", "-tr", trainer, "-device", device], environment)
        images, found = str(root / "raw" / _NAME / "imagesTs"), root / "found"
        options = ["-i", images, "-o", str(found), "-f", "all", "-tr", trainer, "-device", device]
        options += ["-npp", "1", "-nps", "1", "--save_probabilities"]
        _call([_COMMANDS[2], *common, *options], environment)
        return {sample.name: _read(found / f"{sample.name}.npz", sample, labels) for sample in test}


def write_dataset(
    labelled: Sequence[Sample], test: Sequence[Sample], *, labels: Mapping[str, int], size: int, folder: Path
) -> None:
    """Write images, label maps and dataset.json as the package expects them: consecutive labels, PNG."""
    for part, samples in (("Tr", labelled), ("Ts", test)):
        slices = slices_of(samples, truths(samples), labels=labels, size=size)
        for sample, image, channels in zip(samples, slices.images, slices.labels, strict=True):
            _save(folder / f"images{part}" / f"{sample.name}_0000.png", image)
            if part == "Tr":
                _save(folder / "labelsTr" / f"{sample.name}.png", channels)
    description = {
        "channel_names": {"0": "grey"},
        "labels": {"background": 0, **{name: n for n, name in enumerate(labels, start=1)}},
        "numTraining": len(labelled),
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def _save(path: Path, pixels: LabelImage) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _read(path: Path, sample: Sample, labels: Mapping[str, int]) -> LabelImage:
    with np.load(path) as file:
        probabilities = torch.from_numpy(file["probabilities"].astype(np.float32))
    channels = from_square(probabilities.reshape(1, -1, *probabilities.shape[-2:]), *sample.size).argmax(1)
    return np.array([0, *labels.values()], np.uint8)[channels[0].numpy()]


def _call(command: list[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stdout + done.stderr)[-800:]}")
