"""3D Slicer's own client modules, and its panel between them and the viewer: what buttons send and import.

`Panel` does step by step what MONAILabel.py of the extension does; segments are NumPy masks where the
extension has nodes of 3D Slicer.
"""

import importlib
import importlib.util
import json
import os
import site
import sys
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import quote_plus

import numpy as np
import pytest
import SimpleITK as sitk

NOT_SAVED = ("background", "foreground_scribbles", "background_scribbles")


def _plugin(path):
    roots = [Path(sys.prefix), *map(Path, site.getsitepackages())]
    found = (p for root in roots for p in sorted(root.glob(f"monailabel*/**/plugins/slicer/{path}")))
    file = next(found, None)
    if file is None:
        pytest.skip(f"3D Slicer's {path} is not among the files that monailabel installed")
    return file


def client_module():
    """The module MONAILabelLib/client.py."""
    path = _plugin("MONAILabel/MONAILabelLib/client.py")
    spec = importlib.util.spec_from_file_location("slicer_client", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reviewer_module(name, monkeypatch):
    """A module of the reviewer's library, such as "ImageDataController"."""
    library = _plugin("MONAILabelReviewer/MONAILabelReviewerLib/MonaiServerREST.py").parent
    monkeypatch.syspath_prepend(str(library.parent))
    return importlib.import_module(f"MONAILabelReviewerLib.{name}")


def values_of(path):
    """(I, J, K) voxels of a file, as 3D Slicer reads it."""
    return sitk.GetArrayFromImage(_volume(path)).T


def _volume(path):
    image = sitk.ReadImage(str(path))
    return image if image.GetDimension() == 3 else sitk.JoinSeries(image)


class Panel:
    """The panel over one server: `info`, the volume that is open, and `segments`, name -> (I, J, K) mask.

    Args:
        url: What is typed as the server's address.
        folder: Where results are written.
        shared: Whether 3D Slicer sees the server's files, as on the same machine.
        password: What is typed in the dialog that asks for it.
    """

    def __init__(self, url, folder, *, shared=True, password="", user="user-test"):
        self.module = client_module()
        self.url, self.folder, self.shared = url, Path(folder), shared
        self.user, self.password, self.token = user, password, None
        self.extension = ".nii.gz"
        self.sample, self.volume, self.segments, self.points = {}, None, {}, {}
        self.label_changed = False
        self.refresh()

    def client(self):
        """A client for each request, logged in where the server wants it, as `MONAILabelLogic._client`."""
        client = self.module.MONAILabelClient(self.url, str(self.folder), self.user)
        if client.auth_enabled():
            if self.token:
                client.update_auth(self.token)
            if not self.token or not client.auth_valid_token():
                try:
                    self.token = client.auth_token(self.user, self.password)
                    client.update_auth(self.token)
                except self.module.MONAILabelClientException:
                    self.token = None
        return client

    def refresh(self):
        """The button beside the address; what `updateGUIFromParameterNode` computes must not fail."""
        self.info = self.client().info()
        assert not self.info.get("config"), "the panel would ask to upgrade the server"
        assert all(model["type"] and model["description"] for model in self.info["models"].values())
        counts = self.info["datastore"]
        self.progress = counts["completed"] / max(counts["total"], 1) * 100
        stats = self.info["train_stats"]
        first = next(iter(stats.values())) if stats else {}
        self.dice = first.get("best_metric", 0) * 100
        self.epochs = 100 * (0 if first.get("total_time") else first.get("epoch", 1))
        self.epochs /= first.get("total_epochs", 1)

    def options(self, section, name):
        """A config as it comes back from the table of options: text, but for lists and flags."""
        found = {}
        for key, value in self.info[section][name].get("config", {}).items():
            if isinstance(value, list | dict):
                assert all(isinstance(one, str) for one in value), f"{key} of {name}: a combo box holds texts"
                shown = next(iter(value))
                found[key] = shown if isinstance(value, list) else value
            elif isinstance(value, bool):
                found[key] = value
            else:
                text = str(value) if value else ""
                kind = type(value) if isinstance(value, int | float) else str
                found[key] = kind(text or 0) if kind is not str else text
        return found

    # Cases

    def next_sample(self, strategy):
        """*Next Sample*; the sample's id, or None where the panel says that none was found."""
        self.sample, self.volume, self.segments, self.points = {}, None, {}, {}
        sample = self.client().next_sample(strategy, self.options("strategies", strategy))
        if not sample.get("id"):
            return None
        self.open(sample)
        return sample["id"]

    def open(self, sample):
        """Load a sample's volume, what was proposed for it, and an empty segment for each label."""
        image_id, path = sample["id"], sample.get("path")
        if not (self.shared and path and os.path.exists(path)):
            path = self.folder / sample.get("name", image_id)
            uri = f"{self.url.rstrip('/')}/datastore/image?image={quote_plus(image_id)}"
            urllib.request.urlretrieve(uri, path)
        self.volume = _volume(path)
        self.sample = dict(sample)
        try:
            info = self.client().datastore()["objects"][image_id]["labels"]["original"]["info"]
            names = info.get("params", {}).get("label_names", {})
            names = list(names.keys()) if names else self.info["labels"]
            mask = self.client().download_label(image_id, "original")
        except (KeyError, self.module.MONAILabelClientException):
            pass
        else:
            self.update(mask, names)
        for name in self.info["labels"]:
            self.segments.setdefault(name, self.empty())

    def open_volume(self, path, name):
        """*File > Add Data*: a volume that the server does not have, by the name that 3D Slicer gives it."""
        self.volume, self.segments, self.points = _volume(path), {}, {}
        self.sample = {"id": name, "session": True}
        for label in self.info["labels"]:
            self.segments[label] = self.empty()

    def empty(self):
        """(I, J, K) zeros."""
        return np.zeros(self.volume.GetSize(), bool)

    def upload(self, *, session=False):
        """*Upload Volume*, or what an inference does first for a volume that the server does not have."""
        path = self._write(self.volume)
        if session:
            self.sample["session_id"] = self.client().create_session(path)["session_id"]
        else:
            self.client().upload_image(path, self.sample["id"])
            self.sample["session"] = False

    def _session(self):
        if not self.sample.get("session"):
            return None
        found = self.sample.get("session_id")
        if not found or not self.client().get_session(found):
            self.upload(session=True)
        return self.sample["session_id"]

    def _write(self, volume):
        path = tempfile.mktemp(suffix=self.extension, dir=self.folder)
        sitk.WriteImage(volume, path)
        return path

    # Inference

    def infer(self, model, params, label=None):
        """`MONAILabelLogic.infer`; the result's file and its JSON."""
        params.update({"result_extension": ".nrrd", "result_dtype": "uint8"})
        session = self._session()
        path, reply = self.client().infer(model, self.sample["id"], params, label, None, session)
        return path, json.loads(json.dumps(reply))

    def segment(self, model):
        """*Auto Segmentation > Run*; the JSON."""
        path, reply = self.infer(model, self.options("models", model))
        self.update(path, self._names(model, reply))
        return reply

    def click(self, model, label, *, foreground=(), background=(), roi=None, point=None, freeze=None):
        """*SmartEdit*: points placed for a segment, which keeps those placed before; the JSON.

        Args:
            model: One of type deepgrow or deepedit.
            label: The chosen segment.
            foreground: (i, j, k) of new points.
            background: The same.
            roi: (i0, i1, j0, j1, k0, k1) as the panel computes it, in whatever order.
            point: The point just placed; None = *Update* was pressed.
            freeze: Whether *Freeze* is ticked.
        """
        assert label in self.segments, "the panel asks to add the label"
        points = self.points.setdefault(label, ([], []))
        points[0].extend(map(list, foreground))
        points[1].extend(map(list, background))
        flat = self.info["models"][model].get("dimension", 3) == 2
        several = self.info["models"][model]["type"] == "deepedit" and self.info["models"][model]["labels"]
        if point is None:
            point = next(iter([*points[0][-1:], *points[1][-1:]]), None)
            if flat and roi:
                middle = [roi[n + 1] + (roi[n + 1] - roi[n]) // 2 for n in (0, 2)]
                point = [*middle, round(abs(roi[4]))]
        k = None
        if several:
            params = {name: self.points.get(name, ([], []))[0] for name in self.info["labels"]}
        else:
            k = point[2] if point is not None else None
            kept = [p for p in points[0] if not flat or not k or p[2] == k]
            against = [p for p in points[1] if not flat or not k or p[2] == k]
            params = {"foreground": kept, "background": against}
        params["label"] = label
        params.update(self.options("models", model))
        if roi:
            params["roi"] = list(roi)
        if flat:
            params["slice"] = k
        if self.label_changed:
            params["reset_state"] = True
        path, reply = self.infer(model, params)
        names = self._names(model, reply) if several else [label]
        self.update(path, names, k=k if flat else None, freeze=[label] if freeze else None)
        return reply

    def scribble(self, model, label, *, roi=()):
        """*Scribbles > Update*: all segments in one file, what was painted among them; the JSON."""
        names = list(self.segments)
        params = self.options("models", model)
        params["roi"] = list(roi)
        params["label_info"] = [{"name": name, "id": n} for n, name in enumerate(names, start=1)]
        params["selected_label_name"] = label
        path, reply = self.infer(model, params, self._export(names))
        self.update(path, [label])
        return reply

    def _names(self, model, reply):
        names = (reply and reply.get("label_names")) or self.info["models"][model].get("labels")
        if isinstance(names, dict):
            names = [name for name, _ in sorted(names.items(), key=lambda item: item[1])]
        return names

    def update(self, path, labels, k=None, freeze=None):
        """`updateSegmentationMask`: the n-th value found is the n-th name, whatever the numbers are."""
        if path is None:
            return
        labels = [label for label in labels if label != "background"]
        place, own = _volume(path), self.volume
        for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            np.testing.assert_allclose(getattr(place, what)(), getattr(own, what)(), atol=1e-3)
        found = values_of(path)
        for n, value in enumerate(sorted(set(np.unique(found).tolist()) - {0})):
            part = found == value
            if k is None and freeze is None:
                self.segments[labels[n]] = part
                continue
            label = labels[n] if n < len(labels) else f"unknown {n}"
            if label in self.segments and (freeze is None or label in freeze):
                if k is not None:
                    kept = self.segments[label].copy()
                    kept[:, :, k] = False
                    part = kept | part
                self.segments[label] = part

    # Labels

    def submit(self):
        """*Submit Label*; the server's answer."""
        if self.sample.get("session"):
            self.upload()
        names, info = [], []
        for n, name in enumerate(self.segments):
            if name not in NOT_SAVED:
                names.append(name)
                info.append({"name": name, "idx": n + 1})
        saved = self.client().save_label(self.sample["id"], self._export(names), params={"label_info": info})
        self.refresh()
        return saved

    def _export(self, names):
        """The label map of some segments: the n-th has the value n, also where others are empty."""
        values = np.zeros(self.volume.GetSize(), np.int16)
        for n, name in enumerate(names, start=1):
            values[self.segments[name]] = n
        image = sitk.GetImageFromArray(values.T)
        image.CopyInformation(self.volume)
        return self._write(image)
