"""Embeddings on disk: found again by content, bounded, shared by processes, and never served damaged."""

import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from sam_infer.embeddings import SliceEncoder
from sam_infer.embeddingstore import EmbeddingStore, content_key, pack
from sam_infer.engines.base import Embedding
from sam_infer.intensity import Window
from sam_infer.library import ImageLibrary
from sam_infer.types import Prompts
from tests.fakes import CoarseEngine, ThresholdEngine

UNIT = Window(level=0, width=200)
BOX = Prompts(box=(5.0, 5.0, 12.0, 12.0))


def entry(seed=0, count=1000):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return pack(Embedding(image_size=(5, 7), features={"image": values}), narrow=True)


def key(number):
    return content_key(np.full((2, 2), number, np.float32), "engine")


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore(folder=tmp_path / "embeddings", limit=1 << 20, reserve=0)


@pytest.fixture
def volume(tmp_path):
    def write(name, seed=0):
        array = np.random.default_rng(seed).normal(0, 60, (24, 20, 3)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / name)
        return ImageLibrary(limit=1 << 24).read(tmp_path / name)

    return write


def files(store):
    return sorted(p for p in store.folder.rglob("*") if p.is_file())


def test_what_is_read_is_what_was_packed(store):
    features = {
        "image": torch.randn(1, 3, 4),
        "ids": torch.arange(3),
        "large": torch.tensor([1e6]),
        "half": torch.ones(2, dtype=torch.float16),
    }
    packed = pack(Embedding(image_size=(5, 7), features=features), narrow=True)
    assert packed.narrowed == {"image"}, "1e6 is too large for half precision, and the rest is not float32"
    assert store.put(key(1), packed)
    read = EmbeddingStore(folder=store.folder, limit=1 << 20).get(key(1))
    assert read.image_size == (5, 7)
    for name, tensor in packed.unpacked().features.items():
        found = read.unpacked().features[name]
        assert found.dtype == tensor.dtype == features[name].dtype
        assert torch.equal(found, tensor)
    assert store.get(key(2)) is None
    assert key(1) in store
    assert key(2) not in store


def test_a_click_answers_the_same_from_memory_from_disk_and_fresh(store, volume):
    image = volume("a.nii")
    fresh = SliceEncoder(engine=CoarseEngine(), store=store)
    first = fresh.decode_history(image, 1, UNIT, BOX)
    engine = CoarseEngine()
    again = SliceEncoder(engine=engine, store=store)
    warm = again.decode_history(image, 1, UNIT, BOX)
    without = SliceEncoder(engine=CoarseEngine()).decode_history(image, 1, UNIT, BOX)
    assert engine.encoded == 0
    np.testing.assert_array_equal(first.logits, warm.logits)
    np.testing.assert_array_equal(first.logits, without.logits)


def test_content_decides_not_the_file(store, volume, tmp_path):
    image = volume("a.nii")
    engine = CoarseEngine()
    encoder = SliceEncoder(engine=engine, store=store)
    assert not encoder.embedding(image, 1, UNIT)[1]
    shutil.copy(tmp_path / "a.nii", tmp_path / "restored.nii")
    restored = ImageLibrary(limit=1 << 24).read(tmp_path / "restored.nii")
    assert restored.key != image.key
    assert encoder.embedding(restored, 1, UNIT)[1], "the same bytes elsewhere"
    assert engine.encoded == 1
    for other in (
        (volume("a.nii", seed=1), 1, UNIT, None),
        (image, 2, UNIT, None),
        (image, 1, Window(level=0, width=201), None),
        (image, 1, UNIT, (0, 0, 9, 9)),
    ):
        assert not encoder.embedding(*other[:3], crop=other[3])[1]
    assert engine.encoded == 5
    tuned = SliceEncoder(engine=CoarseEngine(fingerprint="coarse-2"), store=store)
    assert not tuned.embedding(image, 1, UNIT)[1]


def damaged(content):
    half = len(content) // 2
    return {
        "cut": content[:half],
        "empty": b"",
        "longer": content + b"x",
        "a bit": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
        "its size": content.replace(b"[5, 7]", b"[7, 5]"),
        "other format": content.replace(b"embedding-1", b"embedding-0"),
        "no tensors": b"garbage" * 100,
    }


@pytest.mark.parametrize("how", damaged(b"0" * 10))
def test_a_damaged_entry_is_dropped_aloud_and_made_again(store, volume, how, caplog):
    store.put(key(1), entry())
    (path,) = files(store)
    path.write_bytes(damaged(path.read_bytes())[how])
    with caplog.at_level(logging.WARNING):
        assert store.get(key(1)) is None
    assert "damaged" in caplog.text
    assert path.name in caplog.text
    assert not path.exists()
    assert store.put(key(1), entry())
    assert store.get(key(1)) is not None


def refuse(*_, **__):
    raise PermissionError("not yours")


def test_an_entry_that_others_own_is_read_and_a_damaged_one_costs_no_click(store, monkeypatch, caplog):
    store.put(key(1), entry())
    monkeypatch.setattr(os, "utime", refuse)
    assert store.get(key(1)) is not None
    assert store.get(key(2)) is None
    monkeypatch.setattr(Path, "unlink", refuse)
    files(store)[0].write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        assert store.get(key(1)) is None
    assert "damaged" in caplog.text


def test_the_least_recently_used_go_first_and_the_limit_holds(tmp_path):
    probe = EmbeddingStore(folder=tmp_path / "probe", limit=1 << 20, reserve=0)
    probe.put(key(0), entry())
    size = probe.nbytes()
    store = EmbeddingStore(folder=tmp_path / "lru", limit=5 * size, reserve=0)
    for number in range(5):
        store.put(key(number), entry())
        os.utime(store._path(key(number)), (1000 + number, 1000 + number))
    assert store.get(key(0)) is not None
    store.put(key(5), entry())
    assert key(0) in store, "it was used last"
    assert key(1) not in store
    assert key(5) in store
    assert store.nbytes() <= 5 * size
    assert not store.put(key(6), entry(count=10_000)), "larger than the limit"


def test_a_full_disk_is_left_alone_and_told_once(tmp_path, caplog):
    store = EmbeddingStore(folder=tmp_path / "e", limit=1 << 20, reserve=1 << 60)
    with caplog.at_level(logging.WARNING):
        assert not store.put(key(1), entry())
        assert not store.put(key(2), entry())
    assert caplog.text.count("not kept on disk") == 1
    assert files(store) == []


def test_a_folder_that_cannot_be_written_costs_no_click(tmp_path, volume, caplog):
    (tmp_path / "e").write_text("a file where the folder should be")
    encoder = SliceEncoder(
        engine=CoarseEngine(), store=EmbeddingStore(folder=tmp_path / "e", limit=1 << 20, reserve=0)
    )
    with caplog.at_level(logging.WARNING):
        assert encoder.decode_history(volume("a.nii"), 1, UNIT, BOX).logits.shape == (1, 20, 24)
    assert "not kept on disk" in caplog.text


def test_what_is_cheaper_to_make_is_not_kept(store, volume):
    SliceEncoder(engine=ThresholdEngine(), store=store).embedding(volume("a.nii"), 1, UNIT)
    assert not store.folder.exists()


def test_nothing_is_written_of_an_image_that_is_not_stored(store, volume, tmp_path):
    volume("a.nii")
    image = ImageLibrary(limit=1 << 24).read(tmp_path / "a.nii", transient=True)
    engine = CoarseEngine()
    encoder = SliceEncoder(engine=engine, store=store)
    assert encoder.decode_history(image, 1, UNIT, BOX).logits.shape == (1, 20, 24)
    assert not store.folder.exists()


def hammer(folder, limit, seed):
    store = EmbeddingStore(folder=folder, limit=limit, reserve=0)
    rng = np.random.default_rng(seed)
    for number in rng.integers(0, 12, 150).tolist():
        found = store.get(key(number))
        assert found is None or torch.equal(found.features["image"], entry(number).features["image"])
        if found is None:
            store.put(key(number), entry(number))
        store._counted = None if number % 3 else store._counted


def test_processes_share_it(store, caplog):
    """Three of them read, write and drop the same entries; none meets half an entry or another's."""
    store.put(key(0), entry())
    limit = 6 * store.nbytes()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=hammer, args=(store.folder, limit, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert store.nbytes() <= limit + 3 * limit // 6
    assert all(path.suffix == ".safetensors" for path in files(store))
