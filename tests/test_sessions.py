"""Over REST: a click that is taken back costs nothing, and no reader ever sees another's state."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sam_infer.embeddings import SliceEncoder
from sam_infer.library import ImageLibrary
from sam_infer.tasks.click import ClickInfer
from sam_infer.types import Candidates
from sam_infer.volumes import empty_labelmap, labelmap_bytes, read_image
from tests.fakes import CoarseEngine
from tests.test_server import infer, parts

A, B, OUT = [6, 6, 2], [8, 7, 2], [15, 12, 2]
BOX = [3, 11, 4, 10, 2, 2]


def mask_file(studies):
    """A part of the bright block on slices 1 to 3."""
    image = read_image(studies / "ct.nii.gz")
    mask = empty_labelmap(image.shape)
    mask[4:7, 5:9, 1:4] = 1
    return "mask.nrrd", labelmap_bytes(mask, image.affine, ".nrrd")


HISTORIES = {
    "clicks": [{"foreground": [A]}, {"foreground": [A, B]}, {"foreground": [A, B], "background": [OUT]}],
    "box": [
        {"roi": BOX},
        {"roi": BOX, "foreground": [A]},
        {"roi": BOX, "foreground": [A], "background": [OUT]},
    ],
    "mask": [{"foreground": [A]}, {"foreground": [A, B]}, {"foreground": [A, B], "background": [OUT]}],
}


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("model", ["sam_click_2d", "sam_click_3d"])
def test_taking_clicks_back_decodes_nothing_and_gives_the_same_bytes(served, model, history):
    client, studies, engine = served
    files = {"label": mask_file(studies)} if history == "mask" else None
    window = {"window_level": 110, "window_width": 190 + len(history) + 10 * (model == "sam_click_3d")}

    def ask(step):
        reply = infer(
            client, model, files=files, result_extension=".nrrd", **HISTORIES[history][step], **window
        )
        assert reply.status_code == 200, reply.text
        found = parts(reply)
        params = json.loads(found["params"])
        return found["image"], {k: params[k] for k in ("score", "slices", "prompts", "empty", "propagation")}

    there = [ask(step) for step in range(3)]
    counts = len(engine.decoded), engine.encoded
    assert [ask(step) for step in (1, 0)] == [there[1], there[0]]
    assert (len(engine.decoded), engine.encoded) == counts
    assert ask(2) == there[2], "and again"


class Everything(CoarseEngine):
    """Its logits depend on all of the prompts and of the image, so that whatever leaks is seen."""

    def decode(self, embedding, prompts):
        grey = torch.nn.functional.interpolate(embedding.features["image"], embedding.image_size)[
            0, 0
        ].numpy()
        return [self._logits(grey, prompt) for prompt in prompts]

    def _logits(self, grey, prompt):
        y, x = np.indices(grey.shape, np.float32)
        logits = 4 * (grey - 0.5)
        for (px, py), label in zip(prompt.points, prompt.point_labels, strict=True):
            logits += (2 * label - 1) * 6 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 18)
        if prompt.box is not None:
            x0, y0, x1, y1 = prompt.box
            logits += np.where((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1), 1.5, -4)
        if prompt.mask_logits is not None:
            logits += 0.25 * prompt.mask_logits
        return Candidates(logits=logits[None].astype(np.float32), iou=np.array([0.8], np.float32))


def work(seed, shape):
    """The clicks of one reader on one object of one image: more each time, one taken back, a box for some."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(shape[2]))
    points = [[int(rng.integers(n)) for n in shape[:2]] + [k] for _ in range(5)]
    box = {"roi": [2, 12 + seed % 5, 3, 13, k, k]} if seed % 2 else {}
    steps = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 1), (3, 2)]
    return [{"foreground": points[:p], "background": points[3 : 3 + n], **box} for p, n in steps]


@pytest.mark.parametrize("dimension", [2, 3])
def test_readers_at_once_get_bit_for_bit_what_each_gets_alone(tmp_path, dimension):
    """Nine readers: three images, several objects on one slice, two readers of the very same object."""
    rng = np.random.default_rng(3)
    shape, images = (24, 22, 4), []
    for n in range(3):
        array = np.asfortranarray(rng.integers(0, 255, shape).astype(np.uint8))
        images.append(tmp_path / f"{n}.nrrd")
        images[-1].write_bytes(labelmap_bytes(array, np.diag([1, 1, 2, 1.0]), ".nrrd"))
    readers = [(images[n % 3], work(min(n, 7), shape)) for n in range(9)]
    readers[8] = readers[7]

    def task():
        encoder = SliceEncoder(engine=Everything(side=12), embedding_bytes=4000)
        return ClickInfer(encoder=encoder, library=ImageLibrary(limit=1 << 24), dimension=dimension)

    def click(task, path, request):
        file, params = task.answer({"image": path, "result_extension": ".nrrd", **request})
        return b"".join(file.parts), params["score"], params["crop"]

    alone = []
    for path, requests in readers:
        own = task()
        alone.append([click(own, path, request) for request in requests])
    shared = task()
    with ThreadPoolExecutor(len(readers)) as pool:
        together = list(
            pool.map(lambda reader: [click(shared, reader[0], request) for request in reader[1]], readers)
        )
    assert together == alone
    assert len({answer[0] for answers in alone for answer in answers}) > 20, "the requests do differ"
