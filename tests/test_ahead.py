"""Encoding ahead: from the slice in use outward, behind every request, and no further than can be kept."""

import logging
import threading
import time

import nibabel as nib
import numpy as np
import pytest

from sam_infer.ahead import EncodeAhead
from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore
from sam_infer.intensity import Window
from sam_infer.library import ImageLibrary
from tests.fakes import CoarseEngine, ThresholdEngine

COUNT = 7
WINDOW = Window(level=COUNT / 2, width=COUNT)


class Noted(CoarseEngine):
    """Notes which slices it encodes, each while ``go`` is set; slice k of the volumes below holds k."""

    def __init__(self, **kwargs):
        super().__init__(side=8, **kwargs)
        self.slices = []
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Semaphore(0)

    def encode(self, image):
        self.slices.append(round(float(image.mean()) * COUNT))
        self.begun.release()
        assert self.go.wait(30)
        return super().encode(image)


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 10 s")


@pytest.fixture
def case(tmp_path):
    def write(name):
        array = np.broadcast_to(np.arange(COUNT, dtype=np.int16), (10, 12, COUNT))
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii")
        return tmp_path / f"{name}.nii"

    return write


@pytest.fixture
def library():
    return ImageLibrary(limit=1 << 24)


@pytest.fixture
def make(library):
    made = []

    def start(engine, *, quiet=0.0, **kwargs):
        encoder = SliceEncoder(engine=engine, **kwargs)
        made.append(EncodeAhead(encoder=encoder, library=library, quiet=quiet))
        return made[-1], encoder

    yield start
    for ahead in made:
        ahead.close()


def test_outward_from_the_slice_in_use_and_a_click_finds_it_there(make, case, library):
    engine = Noted()
    ahead, encoder = make(engine)
    path = case("a")
    assert ahead.progress(path) is None
    ahead.open(path, window=WINDOW, k=2)
    until(lambda: ahead.progress(path) == {"done": COUNT, "of": COUNT})
    assert engine.slices == [2, 3, 1, 4, 0, 5, 6]
    image = library.read(path)
    assert all(encoder.embedding(image, k, WINDOW)[1] for k in range(COUNT))
    ahead.open(path, window=WINDOW, k=5)
    assert ahead.progress(path) == {"done": COUNT, "of": COUNT}
    assert engine.encoded == COUNT


def test_it_follows_the_reader_to_another_slice(make, case):
    engine = Noted()
    engine.go.clear()
    ahead, _ = make(engine)
    path = case("a")
    ahead.open(path, window=WINDOW, k=0)
    assert engine.begun.acquire(timeout=10)
    ahead.open(path, window=WINDOW, k=6)
    engine.go.set()
    until(lambda: ahead.progress(path) == {"done": COUNT, "of": COUNT})
    assert engine.slices == [0, 6, 5, 4, 3, 2, 1]


def test_another_window_leaves_the_reader_where_they_are(make, case):
    engine = Noted()
    ahead, _ = make(engine)
    path = case("a")
    ahead.open(path, window=Window(level=1, width=50), k=6)
    until(lambda: ahead.progress(path) == {"done": COUNT, "of": COUNT})
    engine.slices.clear()
    ahead.open(path, window=WINDOW)
    until(lambda: ahead.progress(path) == {"done": COUNT, "of": COUNT})
    assert engine.slices == [6, 5, 4, 3, 2, 1, 0]


def test_no_slice_is_begun_while_a_request_is_served_or_shortly_after(make, case):
    engine = Noted()
    ahead, _ = make(engine, quiet=0.2)
    path = case("a")
    with ahead.request():
        ahead.open(path, window=WINDOW, k=2)
        assert not engine.begun.acquire(timeout=0.4)
        with ahead.request():
            pass
        assert not engine.begun.acquire(timeout=0.4), "one is still served"
    ended = time.monotonic()
    assert engine.begun.acquire(timeout=10)
    assert time.monotonic() - ended >= 0.2
    until(lambda: ahead.progress(path) == {"done": COUNT, "of": COUNT})


def test_a_request_waits_for_one_slice_at_most(make, case):
    """The one that is being encoded ends; the next is not begun."""
    engine = Noted()
    engine.go.clear()
    ahead, _ = make(engine)
    ahead.open(case("a"), window=WINDOW, k=2)
    assert engine.begun.acquire(timeout=10)
    with ahead.request():
        engine.go.set()
        assert not engine.begun.acquire(timeout=0.3)
    assert engine.begun.acquire(timeout=10)


def test_another_case_ends_the_one_before(make, case):
    engine = Noted()
    engine.go.clear()
    ahead, _ = make(engine)
    first, second = case("a"), case("b")
    ahead.open(first, window=WINDOW, k=0)
    assert engine.begun.acquire(timeout=10)
    ahead.open(second, window=WINDOW, k=6)
    assert ahead.progress(first) is None
    engine.go.set()
    until(lambda: ahead.progress(second) == {"done": COUNT, "of": COUNT})
    assert engine.slices == [0, 6, 5, 4, 3, 2, 1, 0]


def test_it_ends_where_no_more_can_be_kept(make, case, tmp_path):
    """An entry takes 2 bytes for each of 8 x 7 values."""
    engine = Noted()
    ahead, _ = make(engine, embedding_bytes=3 * 2 * 56)
    path = case("a")
    ahead.open(path, window=WINDOW, k=2)
    until(lambda: ahead.progress(path) == {"done": 3, "of": COUNT})
    time.sleep(0.1)
    assert engine.slices == [2, 3, 1]
    store = EmbeddingStore(folder=tmp_path / "e", limit=1 << 20, reserve=0)
    ahead, _ = make(engine, embedding_bytes=3 * 2 * 56, store=store)
    ahead.open(path, window=WINDOW, k=2)
    until(lambda: ahead.progress(path) == {"done": COUNT, "of": COUNT})


def test_closing_ends_it(make, case):
    engine = Noted()
    engine.go.clear()
    ahead, _ = make(engine)
    ahead.open(case("a"), window=WINDOW, k=2)
    assert engine.begun.acquire(timeout=10)
    threading.Timer(0.1, engine.go.set).start()
    ahead.close()
    assert engine.encoded == 1
    ahead.open(case("b"), window=WINDOW)
    assert engine.encoded == 1


def test_an_engine_without_encoder_has_its_case_read(make, case, library, monkeypatch):
    engine = ThresholdEngine()
    ahead, _ = make(engine)
    path = case("a")
    ahead.open(path)
    until(lambda: library._images.nbytes)
    time.sleep(0.05)
    assert engine.encoded == 0
    assert ahead.progress(path) is None


def test_a_damaged_case_and_a_failing_engine_do_not_end_it(make, case, tmp_path, caplog):
    engine = Noted()
    ahead, _ = make(engine)
    (tmp_path / "bad.nii").write_bytes(b"garbage")
    ahead.open(tmp_path / "bad.nii")
    fine = engine.encode
    engine.encode = lambda image: 1 / 0
    failing = case("b")
    with caplog.at_level(logging.ERROR):
        ahead.open(failing, window=WINDOW)
        until(lambda: "b.nii is not encoded ahead" in caplog.text)
    engine.encode = fine
    path = case("a")
    ahead.open(path, window=WINDOW, k=2)
    until(lambda: ahead.progress(path) == {"done": COUNT, "of": COUNT})
