"""A small studies folder, made inline, and what one sees of a folder."""

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np

from apps.samloop.journal import HOME, NAME
from apps.samloop.store import SafeDatastore

LABELS = {"liver": 1, "spleen": 2}
SHAPE = (6, 5, 4)


def write(path, values, shape=SHAPE, dtype=np.uint8):
    """A NIfTI file of one value, or of an array; its path as text."""
    array = np.full(shape, values, dtype) if np.isscalar(values) else np.asarray(values)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return str(path)


def make_folder(folder, names=("a", "b")):
    """A studies folder with an image for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write(folder / f"{name}.nii.gz", 0, dtype=np.int16)
    return folder


def open_store(folder, **how):
    """A store over a folder that nobody watches."""
    return SafeDatastore(str(folder), labels=LABELS, **{"auto_reload": False, **how})


def lines(folder):
    """The journal's lines."""
    return [json.loads(text) for text in (folder / HOME / NAME).read_text().splitlines()]


def values(store, image_id, tag="final"):
    """The values that occur in a stored label."""
    return np.unique(np.asarray(nib.load(store.get_label_uri(image_id, tag)).dataobj)).tolist()


def digest(path):
    """sha256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tree(folder, without=()):
    """Every file, folder and link below a folder with what it holds, those of some names left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not any(part in without for part in path.relative_to(folder).parts):
            found[name] = (
                str(path.readlink()) if path.is_symlink() else digest(path) if path.is_file() else None
            )
    return found
