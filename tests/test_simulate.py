"""The simulated clinician against a small server that answers as the contract says, from the truth."""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import nrrd
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from PIL import Image as PilImage
from requests_toolbelt import MultipartEncoder
from scipy import ndimage

from apps.samloop import cases, clinician, simulate
from apps.samloop.client import Client, ServerError
from apps.samloop.report import plot_reports, summarise
from sam_infer.errors import InputError
from sam_infer.volumes import Image, read_image

LABELS = ["organ", "tumour"]
AFFINE = np.array([[-2.0, 0, 0, 30], [0, -2.0, 0, 40], [0, 0, 5.0, -100], [0, 0, 0, 1]])


class Oracle:
    """A server whose clicks find connected parts of the truth and whose trained model knows the truth."""

    def __init__(self, folder):
        self.folder = folder
        self.truth = {}  # id -> (I, J, K), read without the code under test
        self.state = SimpleNamespace(order=[], saved={}, requests=[], trainings=[], trained=False)
        self.spoil = set()  # numbers of click requests that are answered with a useless mask
        self.needed = 1
        self.pending = 0
        self.ends = "DONE"  # how trainings end; one that is not done leaves the statistics as they were
        self.rounds = 0
        self.regions = True  # whether it knows `result_region`

    def add_picture(self, name, labelmap):
        """``labelmap`` is (rows, columns)."""
        rows, columns = labelmap.shape
        noise = np.random.default_rng(0).integers(0, 255, (rows, columns), np.uint8)
        PilImage.fromarray(noise).save(self.folder / "images" / f"{name}.png")
        PilImage.fromarray(labelmap).save(self.folder / "labels" / f"{name}.png")
        self.truth[name] = labelmap.T[:, :, None]
        self.state.order.append(name)

    def add_volume(self, name, labelmap):
        """``labelmap`` is (I, J, K)."""
        noise = np.random.default_rng(0).integers(0, 255, labelmap.shape).astype(np.int16)
        nib.save(nib.Nifti1Image(noise, AFFINE), self.folder / "images" / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(labelmap, AFFINE), self.folder / "labels" / f"{name}.nii.gz")
        self.truth[name] = labelmap
        self.state.order.append(name)

    def _file(self, name):
        return next((self.folder / "images").glob(name + ".*"))

    def reply(self, labelmap, name, params):
        flat = self._file(name).suffix == ".png"
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "reply.nrrd")
            if flat:
                nrrd.write(path, labelmap[:, :, 0], index_order="F")
            else:
                lps = np.diag([-1, -1, 1, 1]) @ AFFINE
                header = {
                    "space": "left-posterior-superior",
                    "space directions": lps[:3, :3].T,
                    "space origin": lps[:3, 3],
                }
                nrrd.write(path, labelmap, header, index_order="F")
            content = Path(path).read_bytes()
        fields = {
            "params": (None, json.dumps(params), "application/json"),
            "image": ("reply.nrrd", content, "application/octet-stream"),
        }
        encoder = MultipartEncoder(fields=fields)
        return Response(content=encoder.to_string(), media_type=encoder.content_type)

    def click(self, name, params, sent):
        value = LABELS.index(params["label"]) + 1
        parts, _ = ndimage.label(self.truth[name] == value)
        at = lambda p: parts[tuple([*p, 0][:3])]  # noqa: E731
        chosen = {at(p) for p in params["foreground"]} - {0}
        if params.get("roi"):
            i0, i1, j0, j1, k0, k1 = params["roi"]
            chosen |= set(np.unique(parts[i0 : i1 + 1, j0 : j1 + 1, k0 : k1 + 1])) - {0}
        mask = np.isin(parts, list(chosen))
        if sent is not None:
            mask |= sent > 0
        removed, _ = ndimage.label(mask & (parts == 0))
        for point in params["background"]:
            mask &= removed != (removed[tuple([*point, 0][:3])] or -1)
        number = sum(1 for r in self.state.requests if r["model"] != "unet")
        if number in self.spoil:
            mask = np.zeros_like(mask)
        reply = {"label_names": {params["label"]: 1}}
        if not (self.regions and params["result_region"]):
            return self.reply(mask.astype(np.uint8), name, reply)
        changed = np.argwhere(mask if sent is None else mask ^ (sent > 0).reshape(mask.shape))
        if not len(changed):
            return JSONResponse({**reply, "region": None})
        low, high = changed.min(0), changed.max(0)
        part = mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]
        reply["region"] = {"low": low.tolist(), "high": high.tolist()}
        return self.reply(part.astype(np.uint8), name, reply)

    def app(self):
        app = FastAPI()
        state = self.state

        @app.get("/info/")
        def info():
            stats = {
                "round": self.rounds,
                "published": state.trained,
                "candidate_dice": 0.8,
                "champion_dice": None,
            }
            return {
                "labels": LABELS,
                "models": {"unet": {}, "sam_click_2d": {}, "sam_click_3d": {}, "pseudo_label": {}},
                "trainers": {"unet": {}},
                "strategies": {"random": {}, "first": {}},
                "train_stats": {"unet": stats if self.rounds else {}},
                "datastore": {"total": len(state.order), "completed": len(state.saved)},
            }

        @app.post("/activelearning/{strategy}")
        def sample(strategy: str, body: dict):
            assert body["client_id"].startswith("simulate-")
            left = [n for n in state.order if n not in state.saved]
            return {"id": left[body["seed"] % len(left)]} if left else {}

        @app.get("/datastore/image")
        def image(image: str):
            path = self._file(image)
            return FileResponse(path, filename=path.name)

        @app.post("/infer/{model}")
        async def infer(model: str, image: str, output: str, request: Request):
            form = await request.form()
            params = json.loads(form["params"])
            sent = None
            if "label" in form:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / form["label"].filename
                    path.write_bytes(await form["label"].read())
                    sent = nrrd.read(str(path), index_order="F")[0]
            state.requests.append({"model": model, "image": image, "params": params, "mask": sent})
            assert output == "all"
            if model == "pseudo_label":
                raise HTTPException(404, "nothing is stored for this case")
            if model != "unet":
                return self.click(image, params, sent)
            if not state.trained:
                raise HTTPException(409, "no model has been trained yet")
            guess = self.truth[image].copy()
            guess[guess == 2] = 0
            inside = np.argwhere(guess == 1)
            guess[tuple(inside[: len(inside) // 10].T)] = 0
            guess[:2, :2] = 1
            return self.reply(guess, image, {"label_names": {"organ": 1}})

        @app.put("/datastore/label")
        async def save(image: str, tag: str, request: Request):
            form = await request.form()
            path = self.folder / f"saved-{form['label'].filename}"
            path.write_bytes(await form["label"].read())
            state.saved[image] = SimpleNamespace(path=path, tag=tag, params=json.loads(form["params"]))
            return {"image": image}

        @app.post("/train/{trainer}")
        def train(trainer: str, body: dict):
            state.trainings.append((len(state.saved), body))
            if len(state.saved) < self.needed:
                return JSONResponse({"detail": "too few accepted cases"}, 409)
            self.pending = 2
            return {"id": "1", "status": "SUBMITTED"}

        @app.get("/train/")
        def status():
            self.pending -= 1
            if self.pending > 0:
                return {"id": "1", "status": "RUNNING", "details": []}
            if self.ends == "DONE":
                self.rounds += 1
                state.trained = True
            return {"id": "1", "status": self.ends, "details": ["the last line"]}

        return app


@pytest.fixture
def oracle(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    made = Oracle(tmp_path)
    config = uvicorn.Config(made.app(), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    made.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield made
    server.should_exit = True
    thread.join(5)


def picture():
    """40 rows, 60 columns: an organ of two parts and a tumour, nothing symmetric."""
    labelmap = np.zeros((40, 60), np.uint8)
    labelmap[4:16, 30:56] = 1
    labelmap[20:36, 5:14] = 1
    labelmap[25:31, 40:50] = 2
    return labelmap


def volume():
    labelmap = np.zeros((22, 16, 9), np.uint8)
    labelmap[3:9, 2:12, 2:7] = 1
    labelmap[14:18, 9:13, 5:8] = 1
    return labelmap


def play(oracle, **settings):
    values = {"server": oracle.url, "truth": str(oracle.folder / "labels"), "poll_seconds": 0.01}
    return simulate.simulate(**{**values, **settings})


def test_clicks_on_a_picture_are_counted_and_the_label_lands_where_it_should(oracle):
    oracle.add_picture("a", picture())
    done = play(oracle)
    case = done["cases"][0]
    assert done["complete"]
    assert done["clicks_per_case"] == 3
    assert (case["labels"]["organ"]["clicks"], case["labels"]["tumour"]["clicks"]) == (2, 1)
    assert list(case["labels"]) == ["organ", "tumour"]  # the largest first
    assert case["proposal_dice"] is None
    assert done["final_dice"] == 1
    saved = oracle.state.saved["a"]
    stored = PilImage.open(saved.path)
    assert stored.mode == "L"
    assert stored.size == (60, 40)
    np.testing.assert_array_equal(np.asarray(stored), picture())
    assert saved.tag == "final"
    assert saved.params["label_info"] == [
        {"name": "organ", "idx": 1, "value": 1},
        {"name": "tumour", "idx": 2, "value": 2},
    ]
    first = next(r for r in oracle.state.requests if r["model"] == "sam_click_2d")["params"]
    (x, y), labelmap = first["foreground"][0], picture()
    assert labelmap[y, x] == 1
    assert 35 <= x <= 50
    assert 8 <= y <= 11
    assert first["result_extension"] == ".nrrd"


@pytest.mark.parametrize("regions", [True, False])
def test_clicks_in_a_volume_keep_its_geometry(oracle, regions):
    oracle.regions = regions
    oracle.add_volume("v", volume())
    done = play(oracle, label="organ", accept_dice=0.97)
    assert done["clicks_per_case"] == 2
    params = [r["params"] for r in oracle.state.requests if r["model"] == "sam_click_3d"][-1]
    (i, j, k), second = params["foreground"]
    assert 3 <= i < 9
    assert 2 <= j < 12
    assert 2 <= k < 7
    assert volume()[tuple(second)] == 1
    saved = nib.load(oracle.state.saved["v"].path)
    np.testing.assert_array_equal(np.asarray(saved.dataobj), volume())
    np.testing.assert_allclose(saved.affine, AFFINE, atol=1e-4)
    assert oracle.state.saved["v"].path.name.endswith(".nii.gz")


def test_the_budget_is_for_each_label_and_is_kept(oracle):
    oracle.add_picture("a", picture())
    done = play(oracle, budget=1)
    assert done["cases"][0]["clicks"] == 2
    assert done["cases"][0]["below_threshold"]
    assert done["below_threshold"] == 1
    assert np.asarray(PilImage.open(oracle.state.saved["a"].path))[22, 8] == 0


def test_one_label_only(oracle):
    oracle.add_picture("a", picture())
    done = play(oracle, label="tumour")
    assert done["clicks_per_case"] == 1
    stored = np.asarray(PilImage.open(oracle.state.saved["a"].path))
    np.testing.assert_array_equal(stored, np.where(picture() == 2, 2, 0))
    with pytest.raises(InputError, match="organ, tumour"):
        play(oracle, label="liver")


@pytest.mark.parametrize("regions", [True, False])
def test_a_proposal_is_corrected_not_drawn_anew(oracle, regions):
    oracle.regions = regions
    oracle.add_picture("a", picture())
    oracle.state.trained = True
    done = play(oracle, accept_dice=0.97)
    organ = done["cases"][0]["labels"]["organ"]
    assert 0.8 < organ["proposal_dice"] < 0.97
    assert done["cases"][0]["labels"]["tumour"]["proposal_dice"] == 0
    request = next(r for r in oracle.state.requests if r["model"] == "sam_click_2d")
    assert request["mask"] is not None
    assert request["mask"].shape == (60, 40, 1)  # i, j, k
    assert request["mask"][0, 0, 0] == 1
    tumour = [r for r in oracle.state.requests if r["params"].get("label") == "tumour"]
    assert tumour
    assert all(r["mask"] is None for r in tumour)
    assert done["final_dice"] > 0.97


def test_a_good_proposal_costs_no_click(oracle):
    oracle.add_picture("a", picture())
    oracle.state.trained = True
    done = play(oracle, label="organ", accept_dice=0.8)
    assert done["clicks_per_case"] == 0
    assert done["proposal_dice"] == done["final_dice"]


def test_a_click_that_makes_it_worse_is_undone_and_counted(oracle):
    oracle.add_picture("a", picture())
    oracle.spoil = {2}
    done = play(oracle, label="organ")
    organ = done["cases"][0]["labels"]["organ"]
    assert organ["undone"] == 1
    assert organ["clicks"] == 3
    assert organ["final_dice"] == 1
    points = [r["params"]["foreground"] for r in oracle.state.requests if r["model"] == "sam_click_2d"]
    assert [len(p) for p in points] == [1, 2, 2]
    assert points[1][1] != points[2][1]  # not the same place again


def test_a_box_may_come_first_and_counts_two(oracle):
    oracle.add_picture("a", picture())
    done = play(oracle, label="tumour", first_prompt="box")
    assert done["clicks_per_case"] == 2
    assert done["first_prompt"] == "box"
    assert done["cases"][0]["labels"]["tumour"]["first_prompt_box"]
    assert oracle.state.requests[-1]["params"]["roi"] == [40, 49, 25, 30, 0, 0]


def test_training_between_rounds(oracle, tmp_path):
    for name in "abcde":
        oracle.add_picture(name, picture())
    out = tmp_path / "out" / "report.json"
    done = play(oracle, retrain_every=2, train_params={"max_epochs": 3}, out=out)
    assert [count for count, _ in oracle.state.trainings] == [2, 4]
    assert oracle.state.trainings[0][1] == {"max_epochs": 3}
    assert [r["cases"] for r in done["rounds"]] == [2, 2, 1]
    assert [r["proposals"] for r in done["rounds"]] == [0, 2, 1]
    training = done["rounds"][0]["training"]
    assert training["status"] == "DONE"
    assert training["published"] is True
    assert training["stats"]["candidate_dice"] == 0.8
    assert done["rounds"][2]["training"] is None
    assert json.loads(out.read_text()) == done
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_too_few_labels_do_not_stop_it(oracle):
    for name in "ab":
        oracle.add_picture(name, picture())
    oracle.needed = 2
    done = play(oracle, retrain_every=1)
    assert done["rounds"][0]["training"]["status"] == "NOT TRAINED"
    assert "too few" in done["rounds"][0]["training"]["reason"]
    assert done["rounds"][1]["training"]["status"] == "DONE"


@pytest.mark.parametrize("ends", ["STOPPED", "ERROR"])
def test_a_training_that_is_not_done_does_not_get_the_figures_of_an_older_one(oracle, ends):
    for name in "abc":
        oracle.add_picture(name, picture())
    oracle.rounds, oracle.ends = 4, ends
    training = play(oracle, retrain_every=1, max_cases=1)["rounds"][0]["training"]
    assert training["status"] == ends and training["reason"] == f"{ends}: the last line"
    assert not {"published", "candidate_dice", "champion_dice", "stats"} & set(training)
    oracle.ends = "DONE"
    training = play(oracle, retrain_every=1, max_cases=1)["rounds"][0]["training"]
    assert training["stats"]["round"] == 5 and training["published"] is True
    assert "reason" not in training


def test_a_training_without_an_outcome_has_no_figures(oracle, monkeypatch):
    oracle.add_picture("a", picture())
    oracle.rounds = 4
    monkeypatch.setattr(Client, "train_status", lambda self: {"status": "DONE"})
    training = play(oracle, retrain_every=1)["rounds"][0]["training"]
    assert "no outcome" in training["reason"] and "published" not in training


def test_cases_without_truth_are_skipped_and_listed(oracle):
    for name in "abc":
        oracle.add_picture(name, picture())
    (oracle.folder / "labels" / "a.png").unlink()
    PilImage.fromarray(picture().T.copy()).save(oracle.folder / "labels" / "b.png")
    done = play(oracle, strategy="first", label="tumour")
    assert [c["id"] for c in done["cases"]] == ["c"]
    assert {s["id"] for s in done["skipped"]} == {"a", "b"}
    assert "shape" in next(s["reason"] for s in done["skipped"] if s["id"] == "b")
    assert done["complete"]


def test_the_truth_may_be_stored(oracle):
    oracle.add_picture("a", picture())
    done = play(oracle, budget=0, accept="truth")
    assert done["final_dice"] == 0
    np.testing.assert_array_equal(np.asarray(PilImage.open(oracle.state.saved["a"].path)), picture())


def test_a_failure_leaves_a_report(oracle, tmp_path, monkeypatch):
    for name in "ab":
        oracle.add_picture(name, picture())
    save = Client.save_label

    def fail(self, image_id, *args, **kwargs):
        if oracle.state.saved:
            raise ServerError("PUT /datastore/label", 500, "disk full")
        return save(self, image_id, *args, **kwargs)

    monkeypatch.setattr(Client, "save_label", fail)
    with pytest.raises(ServerError, match="disk full"):
        play(oracle, out=tmp_path / "report.json")
    left = json.loads((tmp_path / "report.json").read_text())
    assert not left["complete"]
    assert "disk full" in left["stopped"]
    assert len(left["cases"]) == 1


def _run(*argv):
    parser = argparse.ArgumentParser()
    simulate.add_parser(parser.add_subparsers(dest="command"))
    args = parser.parse_args(["simulate", *map(str, argv)])
    return args.func(args)


def test_command_line(oracle, tmp_path, capsys):
    oracle.add_picture("a", picture())
    truth, out = oracle.folder / "labels", tmp_path / "report.json"
    argv = ["--server", oracle.url, "--truth", truth, "--out", out, "--retrain-every", 1]
    assert _run(*argv, "--train-param", "max_epochs=2", "--train-param", "device=cpu") == 0
    assert oracle.state.trainings[0][1] == {"max_epochs": 2, "device": "cpu"}
    text = capsys.readouterr().out
    assert "round 1: 1 cases" in text
    assert "3.00 clicks a case" in text
    assert _run(*argv) == 1  # nothing is left
    assert "none left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        (["--budget", "-1"], "budget"),
        (["--accept-dice", "2"], "accept_dice"),
        (["--train-param", "epochs"], "KEY=VALUE"),
        ([], "cannot be reached"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, extra, word):
    PilImage.fromarray(picture()).save(tmp_path / "a.png")
    argv = ["--server", "http://127.0.0.1:9", "--truth", tmp_path, "--out", tmp_path / "r.json", *extra]
    assert _run(*argv) == 1
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1


def test_server_detail_is_in_the_error(oracle):
    oracle.add_picture("a", picture())
    with pytest.raises(ServerError, match="no model has been trained") as caught:
        Client(oracle.url).infer("unet", "a")
    assert caught.value.status == 409
    assert caught.value.refused


def test_a_truth_in_another_axis_order_is_turned(tmp_path):
    labelmap = volume()
    image = Image(array=np.zeros(labelmap.shape), affine=AFFINE, key=(), flat=False)
    turned = labelmap[::-1, :, :].transpose(2, 0, 1)  # i flipped, then stored as (k, i, j)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = AFFINE[:3, 2], -AFFINE[:3, 0], AFFINE[:3, 1]
    affine[:3, 3] = AFFINE[:3, 3] + AFFINE[:3, 0] * (labelmap.shape[0] - 1)
    nib.save(nib.Nifti1Image(turned, affine), tmp_path / "turned.nii")
    np.testing.assert_array_equal(cases.read_truth(tmp_path / "turned.nii", image), labelmap)
    nib.save(nib.Nifti1Image(labelmap, AFFINE + np.eye(4, k=3) * 9), tmp_path / "moved.nii")
    with pytest.raises(cases.CaseError, match=r"truth = 'moved.nii': .*elsewhere"):
        cases.read_truth(tmp_path / "moved.nii", image)


def test_label_files_read_back(tmp_path):
    labelmap = volume()[:, :, 3:4].copy()
    flat = Image(array=labelmap, affine=np.diag([-1.0, -1, 1, 1]), key=(), flat=True)
    name, content = cases.label_file("a.b", labelmap, flat)
    (tmp_path / name).write_bytes(content)
    assert name == "a.b.png"
    np.testing.assert_array_equal(read_image(tmp_path / name).array, labelmap)
    name, content = cases.mask_file(volume() == 1, Image(array=volume(), affine=AFFINE, key=(), flat=False))
    (tmp_path / name).write_bytes(content)
    data, header = nrrd.read(str(tmp_path / name), index_order="F")
    np.testing.assert_array_equal(data, volume())
    np.testing.assert_allclose(header["space origin"], [-30, -40, -100])


def test_label_indices():
    assert cases.label_indices({"a": 2, "background": 0}) == {"a": 2}
    assert cases.label_indices(["background", "a", "b"]) == {"a": 1, "b": 2}
    assert cases.label_indices(None) == {}


def test_place_click_takes_the_largest_error_in_3d():
    truth = volume() == 1
    click = clinician.place_click(truth, np.zeros_like(truth))
    assert click.positive
    assert truth[click.voxel]
    assert 3 <= click.voxel[0] < 9
    mask = truth.copy()
    mask[12:22, 1:8, 0:4] = True
    click = clinician.place_click(truth, mask)
    assert not click.positive
    assert not truth[click.voxel]
    assert mask[click.voxel]
    assert clinician.place_click(truth, truth) is None


def test_a_deaf_server_does_not_get_the_same_click_twice():
    truth = np.zeros((30, 20, 1), bool)
    truth[4:24, 4:16] = True
    seen = []

    def deaf(clicks, roi):
        seen.append(clicks[-1].voxel)
        return np.zeros_like(truth)

    result = clinician.draw(deaf, truth, budget=5, accept_dice=0.9)
    assert result.clicks == 5
    assert len(set(seen)) == 5


def test_figure_of_several_reports(tmp_path):
    def one(clicks):
        rows = [
            {
                "round": 1 + n // 2,
                "clicks": c,
                "proposal_dice": 0.1 * n or None,
                "final_dice": 0.9,
                "seconds": 1.0,
            }
            for n, c in enumerate(clicks)
        ]
        return {"cases": rows, "rounds": summarise(rows, {})}

    plot_reports({"first": one([6, 5, 3, 2]), "second": one([7, 7, 6])}, tmp_path / "curve.png")
    plot_reports({"none": one([])}, tmp_path / "empty.png")
    assert PilImage.open(tmp_path / "curve.png").size[0] > 800


@pytest.mark.parametrize("trainer", ["unet", "pseudo_label", "weak_box", "cam_classifier"])
def test_what_most_trainers_train_proposes_where_nothing_is_named(oracle, trainer):
    """`pseudo_label` is a model too, but of what is stored for some cases."""
    oracle.add_picture("a", picture())
    oracle.state.trained = True
    done = play(oracle, trainer=trainer)
    assert done["proposal_model"] == "unet"
    assert done["proposal_dice"] > 0


def test_a_model_that_has_nothing_for_a_case_proposes_nothing(oracle):
    oracle.add_picture("a", picture())
    oracle.state.trained = True
    done = play(oracle, proposal_model="pseudo_label")
    assert done["proposal_model"] == "pseudo_label"
    assert done["cases"][0]["proposal_dice"] is None
    assert done["complete"]
