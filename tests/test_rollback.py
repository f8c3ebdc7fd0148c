"""Taking a model back: files and ledger, also after a kill; the command line; the served application."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image as PilImage

from apps.samloop.cli import main
from apps.samloop.routes.published import router
from sam_infer.errors import InputError
from tests.loop_data import Folder, basis
from tests.test_gate import A, B, publish, score
from tests.unets import constant_unet
from trainers.gate import ROLLED_BACK, Publisher, sha256_of
from trainers.rounds import Rounds
from trainers.unet import UnetTrainer

C = b"third weights"
LABELS = {"liver": 1, "spleen": 2, "aorta": 3}


@pytest.fixture
def publisher(tmp_path):
    return Publisher(served=tmp_path / "model" / "unet.safetensors")


def two(publisher):
    publish(publisher, A, score(0.5), round=1)
    publish(publisher, B, score(0.6), score(0.5), round=2)


def contents(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*"))]


def consistent(publisher):
    """Whether the ledger tells of what serves, and of nothing otherwise."""
    line = publisher.in_force()
    return line is not None and line["candidate_sha256"] == sha256_of(publisher.served)


def test_what_was_replaced_serves_again_and_then_nothing(publisher):
    two(publisher)
    a, b = sha256_of(publisher._kept(publisher.history)[0]), sha256_of(publisher.served)
    facts = publisher.rollback(who="Ada")
    assert publisher.served.read_bytes() == A and contents(publisher.history) == []
    assert contents(publisher.taken_back) == [B]
    reason = "round 1 serves again; round 2 was taken back"
    assert facts == {"sha256": a, "round": 1, "reason": reason, "taken_back": {"sha256": b, "round": 2}}
    line = publisher.lines()[-1]
    assert line == publisher.in_force() and line.pop("time")
    assert line == {
        "decision": "rolled back",
        "reason": reason,
        "who": "Ada",
        "round": 1,
        "candidate_sha256": a,
        "champion_sha256": b,
    }
    facts = publisher.rollback()
    assert not publisher.served.exists() and contents(publisher.taken_back) == [B, A]
    assert (facts["sha256"], facts["round"], facts["taken_back"]["round"]) == (None, None, 1)
    assert "nothing that was trained serves now" in facts["reason"] and consistent(publisher)
    with pytest.raises(InputError, match="nothing to take back") as error:
        publisher.rollback()
    assert error.value.status == 409 and len(publisher.lines()) == 4


def test_a_rollback_is_no_round_and_the_next_publication_goes_on_from_it(publisher):
    two(publisher)
    publisher.rollback()
    assert [line["round"] for line in publisher.rounds()] == [1, 2]
    publish(publisher, C, score(0.55), score(0.5), round=3)
    assert publisher.served.read_bytes() == C and contents(publisher.history) == [A]
    assert publisher.state()["round"] == 3 and publisher.state()["history"] == 1
    publisher.rollback()
    assert publisher.served.read_bytes() == A, "what was taken back is not gone back to"
    assert publisher.state()["decision"] == ROLLED_BACK and publisher.state()["round"] == 1


def test_what_was_taken_back_is_kept_so_many_times(tmp_path):
    publisher = Publisher(served=tmp_path / "unet.safetensors", keep=2)
    for content in (b"a", b"b", b"c"):
        publish(publisher, content, score(0.5))
        publisher.rollback()
    assert contents(publisher.taken_back) == [b"b", b"c"]


def test_a_rollback_during_a_training_is_refused_and_changes_nothing(publisher):
    two(publisher)
    training = Rounds(publisher.served.parent, "mean_teacher")
    with training.one(), pytest.raises(InputError, match="a training is running") as error:
        publisher.rollback()
    assert error.value.status == 409
    assert publisher.served.read_bytes() == B and len(publisher.lines()) == 2


def killed(step, number):
    """Run a step in a process that is killed before its ``number``-th touch of a file; None where it ends."""
    child = os.fork()
    if child == 0:
        touched = []

        def watch(event, _):
            if event in ("open", "os.rename", "os.remove", "os.mkdir"):
                touched.append(event)
                if len(touched) == number:
                    os._exit(9)

        sys.addaudithook(watch)
        step()
        os._exit(0)
    return None if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 else number


def kills(step, prepare):
    """Prepare, kill a step ever later, and give the turn back each time; ends after a step that ends."""
    for number in range(1, 200):
        prepare()
        if killed(step, number) is None:
            assert number > 5, "nothing was killed"
            return
        yield number
    pytest.fail("the step never ends")


def test_a_rollback_that_is_killed_anywhere_loses_nothing_and_can_be_done_again(tmp_path):
    seen = set()
    publisher = Publisher(served=tmp_path / "model" / "unet.safetensors")

    def prepare():
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        two(publisher)

    for number in kills(publisher.rollback, prepare):
        serves = publisher.served.read_bytes()
        seen.add(serves)
        assert serves in (A, B) and consistent(publisher), number
        left = {serves, *contents(publisher.history), *contents(publisher.taken_back)}
        assert {A, B} <= left, number
        publisher.rollback()
        assert publisher.served.is_file() == (serves == B) and consistent(publisher), number
        if serves == B:
            assert publisher.served.read_bytes() == A
            assert len(publisher.rounds()) == 2
    assert seen == {A, B}


def test_taking_the_first_model_away_survives_a_kill_anywhere(tmp_path):
    seen = set()
    publisher = Publisher(served=tmp_path / "model" / "unet.safetensors")

    def prepare():
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        publish(publisher, A, score(0.5), round=1)

    for number in kills(publisher.rollback, prepare):
        seen.add(publisher.served.is_file())
        assert consistent(publisher), number
        assert (publisher.served.is_file(), contents(publisher.taken_back)) in ((True, []), (False, [A]))
    assert seen == {True, False}


def test_a_publication_that_was_killed_anywhere_is_rolled_back_from(tmp_path):
    """A copy of the served weights that it left in the history is not gone back to."""
    copies = 0
    publisher = Publisher(served=tmp_path / "model" / "unet.safetensors")

    def prepare():
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        publish(publisher, A, score(0.5), round=1)

    def second():
        publish(publisher, B, score(0.6), score(0.5), round=2)

    for number in kills(second, prepare):
        serves = publisher.served.read_bytes()
        copies += serves == A and A in contents(publisher.history)
        assert publisher.state()["history"] == (serves == B), number
        publisher.rollback()
        assert publisher.served.is_file() == (serves == B) and consistent(publisher), number
        assert serves in contents(publisher.taken_back)
        if serves == B:
            assert publisher.served.read_bytes() == A
            publisher.rollback()
            assert not publisher.served.is_file()
    assert copies


@pytest.mark.usefixtures("one_thread")
def test_the_next_training_is_judged_against_what_serves_again(tmp_path):
    store = Folder(tmp_path)
    for seed in range(8):
        store.add_disc(f"case_{seed:04d}", seed, value=1)
    task = UnetTrainer(basis(tmp_path / "model", {"disc": 1}))
    path = task.path.with_name("next.safetensors")
    for round_, winner in ((1, 1), (2, 0)):  # all is disc, nothing is
        constant_unet(path, {"disc": 1}, winner=winner, rounds=round_)
        better = score(0.1 * round_)
        task.publisher.publish(path, candidate_score=better, champion_score=None, record={"round": round_})
    task.publisher.rollback()
    third = task({"iterations": 1, "warm_start": False}, store)
    held_out = [np.asarray(PilImage.open(case.label)) for case in task.split(store).held_out]
    expected = np.mean([2 * mask.sum() / (mask.sum() + mask.size) for mask in held_out])
    assert third["round"] == 3 and third["champion_dice"] == pytest.approx(expected, abs=1e-4)
    assert task.publisher.lines()[-1]["champion_sha256"] == task.publisher.lines()[-2]["candidate_sha256"]


def run(studies, *more):
    return main(["rollback", "--studies", str(studies), *more])


def test_command_line(tmp_path, capsys):
    publisher = Publisher(served=tmp_path / ".samloop" / "models" / "unet.safetensors")
    assert run(tmp_path, "unet") == 2 and "no model has been trained here yet" in capsys.readouterr().err
    assert not publisher.served.parent.exists()
    two(publisher)
    publish(publisher, C, score(0.3), score(0.6), round=3)
    publish(Publisher(served=publisher.served.with_name("cam.safetensors")), A, score(0.5), round=1)
    assert run(tmp_path) == 2 and "cam, unet" in capsys.readouterr().err
    assert run(tmp_path, "sam") == 2 and "choose one of cam, unet" in capsys.readouterr().err
    assert run(tmp_path, "unet") == 0
    assert capsys.readouterr().out == "unet: round 1 serves again; round 2 was taken back\n"
    assert publisher.served.read_bytes() == A and publisher.lines()[-1]["who"]
    assert run(tmp_path, "unet") == 0 and run(tmp_path, "unet") == 2
    assert "nothing to take back" in capsys.readouterr().err


def test_listing(tmp_path, capsys):
    assert run(tmp_path, "--list") == 0 and "no model has been trained" in capsys.readouterr().out
    publisher = Publisher(served=tmp_path / ".samloop" / "models" / "unet.safetensors")
    two(publisher)
    publish(publisher, C, score(0.3), score(0.6), round=3)
    publisher.rollback()
    before = publisher.ledger.read_bytes()
    assert run(tmp_path, "--list") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"unet: {sha256_of(publisher.served)[:12]} serves, 0 to go back to"
    assert [line[0] for line in lines] == [" ", " ", " ", "*"]
    for line, fact in zip(lines, publisher.lines(), strict=True):
        told = (fact["time"], fact["decision"], fact["reason"], str(fact["candidate_sha256"])[:12])
        assert all(part in line for part in told)
    assert "candidate dice 0.600, champion dice 0.500" in lines[1]
    assert publisher.ledger.read_bytes() == before
    publisher.rollback()
    assert run(tmp_path, "--list", "unet") == 0
    head, *_, last = capsys.readouterr().out.splitlines()
    assert head == "unet: nothing that was trained serves, 0 to go back to" and last.startswith("* ")


def serve_unet(publisher, winner, round_, **champion):
    path = publisher.served.with_name("next.safetensors")
    constant_unet(path, LABELS, winner=winner, rounds=round_)
    publisher.publish(path, candidate_score=score(0.1 * round_), record={"round": round_}, **champion)


def answered(client):
    reply = client.post("/infer/unet?image=photo&output=json")
    return list(reply.json()["label_names"]) if reply.status_code == 200 else reply.status_code


def test_the_served_application_answers_with_what_serves_again(served):
    client, studies, _ = served
    assert client.get("/published/").json() == {}
    unknown = client.post("/published/unet/rollback")
    assert unknown.status_code == 404 and "no model has been trained here yet" in unknown.json()["detail"]
    publisher = Publisher(served=studies / ".samloop" / "models" / "unet.safetensors")
    serve_unet(publisher, 1, 1, champion_score=None)
    assert answered(client) == ["liver"]
    serve_unet(publisher, 2, 2, champion_score=score(0.1))
    assert answered(client) == ["spleen"]
    found = client.get("/published/").json()["unet"]
    assert found["sha256"] == sha256_of(publisher.served) and (found["round"], found["history"]) == (2, 1)
    assert "better than the served model" in found["reason"]

    with Rounds(publisher.served.parent, "unet").one():
        busy = client.post("/published/unet/rollback")
    assert busy.status_code == 409 and "a training is running" in busy.json()["detail"]
    assert answered(client) == ["spleen"]

    assert client.post("/published/cam/rollback").status_code == 404
    reply = client.post("/published/unet/rollback")
    assert reply.status_code == 200 and reply.json()["model"] == "unet" and reply.json()["round"] == 1
    assert answered(client) == ["liver"]
    assert "round 1" in client.get("/info/").json()["models"]["unet"]["description"]
    found = client.get("/published/").json()["unet"]
    assert (found["decision"], found["round"], found["history"]) == (ROLLED_BACK, 1, 0)
    assert found["sha256"] == reply.json()["sha256"]

    assert client.post("/published/unet/rollback").json()["sha256"] is None
    assert answered(client) == 409
    nothing = client.post("/published/unet/rollback")
    assert nothing.status_code == 409 and "nothing to take back" in nothing.json()["detail"]
    assert json.loads(publisher.ledger.read_text().splitlines()[-1])["candidate_sha256"] is None

    serve_unet(publisher, 3, 3, champion_score=None)
    assert answered(client) == ["aorta"]


def test_only_an_administrator_takes_a_model_back():
    roles = {
        (*route.methods, route.path): [d.call.roles for d in route.dependant.dependencies]
        for route in router.routes
    }
    assert roles == {
        ("GET", "/published/"): ["monailabel-user"],
        ("POST", "/published/{name}/rollback"): ["monailabel-admin"],
    }
