import json
import math
from pathlib import Path

import pytest

from sam_infer.errors import InputError
from trainers.evaluate import Score, summarize
from trainers.gate import Publisher, decide, publisher_of, publishers, sha256_of

A, B = b"first weights", b"second weights"


def score(*values, label="liver"):
    return summarize({f"case{i}": {label: v} for i, v in enumerate(values)}, [label])


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def publish(publisher, content, new, old=None, **record):
    candidate = write(publisher.served.parent / "candidate.safetensors", content)
    return publisher.publish(candidate, candidate_score=new, champion_score=old, record=record)


@pytest.fixture
def publisher(tmp_path):
    return Publisher(served=tmp_path / "model" / "unet.safetensors", keep=2)


def test_first_model_is_published_and_a_useless_or_unjudged_one_is_not():
    assert decide(score(0.4), None).publish
    assert not decide(score(0.0), None).publish
    unjudged = decide(score(math.nan), None)
    assert not unjudged.publish and "no held-out case" in unjudged.reason


def test_only_a_better_candidate_is_published():
    assert decide(score(0.81, 0.7), score(0.8, 0.7)).publish
    assert not decide(score(0.8, 0.7), score(0.8, 0.7)).publish
    worse = decide(score(0.2, 0.7), score(0.8, 0.7))
    assert not worse.publish and "0.450 against 0.750" in worse.reason


def test_scores_on_different_cases_are_not_compared():
    with pytest.raises(ValueError, match="same held-out cases"):
        decide(score(0.9), score(0.5, 0.5))


def test_refused_candidate_leaves_the_served_file_and_a_line(publisher):
    publish(publisher, A, score(0.8), seed=1)
    decision = publish(publisher, B, score(0.5), score(0.8), seed=2, held_out_ids=["case0"])
    assert not decision.publish
    assert publisher.served.read_bytes() == A
    assert not publisher.history.exists()
    first, second = publisher.rounds()
    assert (first["decision"], second["decision"]) == ("published", "refused")
    assert second["candidate"]["dice"] == 0.5 and second["champion"]["dice"] == 0.8
    assert second["seed"] == 2 and second["held_out_ids"] == ["case0"]
    assert second["champion_sha256"] == sha256_of(publisher.served) == first["candidate_sha256"]


def test_published_candidate_replaces_and_the_history_is_bounded(publisher):
    for round_, value in enumerate((0.1, 0.2, 0.3, 0.4)):
        publish(publisher, b"w%d" % round_, score(value), score(value - 0.1) if round_ else None)
    assert publisher.served.read_bytes() == b"w3"
    assert sorted(f.read_bytes() for f in publisher.history.iterdir()) == [b"w1", b"w2"]
    assert {f.name for f in publisher.served.parent.iterdir()} == {
        "unet.safetensors",
        "unet-history",
        "unet-ledger.jsonl",
    }


def in_force(publisher):
    """The number of the line in force."""
    return publisher.lines().index(publisher.in_force())


@pytest.mark.parametrize("swapped", [False, True])
def test_a_crash_at_the_swap_leaves_a_whole_file_and_its_record(publisher, monkeypatch, swapped):
    """Before the rename the old file is in service, after it the new one; either has its line."""
    publish(publisher, A, score(0.5))
    replace = Path.replace

    def crash(self, target):
        if Path(target) == publisher.served:
            if swapped:
                replace(self, target)
            raise OSError("power cut")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        publish(publisher, B, score(0.6), score(0.5))
    assert publisher.served.read_bytes() == (B if swapped else A)
    assert len(publisher.rounds()) == 2
    assert in_force(publisher) == int(swapped)


def test_a_line_is_in_force_again_when_its_weights_are_copied_back(publisher):
    publish(publisher, A, score(0.5))
    publish(publisher, B, score(0.6), score(0.5))
    assert in_force(publisher) == 1
    (kept,) = publisher.history.iterdir()
    publisher.served.write_bytes(kept.read_bytes())
    assert in_force(publisher) == 0
    assert publisher.state()["history"] == 0  # what is served is nothing to go back to


def test_a_refused_line_is_never_in_force_and_nothing_is_before_the_first(publisher):
    assert publisher.in_force() is None
    publish(publisher, A, score(0.5), seed=1)
    publish(publisher, A, score(0.5), score(0.5), seed=2)  # the same weights anew
    assert in_force(publisher) == 0


def test_publishers_are_found_by_their_ledgers(publisher):
    folder = publisher.served.parent
    assert publishers(folder) == {}
    with pytest.raises(InputError, match="no model has been trained here yet"):
        publisher_of(folder, "unet")
    publish(publisher, A, score(0.5))
    publish(Publisher(served=folder / "cam.safetensors"), B, score(0.0))  # refused: nothing is served
    assert list(publishers(folder)) == ["cam", "unet"]
    assert publisher_of(folder, "unet").served == publisher.served
    with pytest.raises(InputError, match="choose one of cam, unet") as error:
        publisher_of(folder, "../unet")
    assert error.value.status == 404
    assert publishers(folder)["cam"].state()["sha256"] is None


def test_a_line_cut_short_by_a_crash_spoils_neither_older_nor_newer_ones(publisher):
    publish(publisher, A, score(0.5), seed=1)
    with publisher.ledger.open("a") as file:
        file.write('{"decision": "publ')
    publish(publisher, B, score(0.4), score(0.5), seed=3)
    assert [line["seed"] for line in publisher.rounds()] == [1, 3]


def test_ledger_is_plain_json_also_for_labels_that_occur_nowhere(publisher):
    both = Score(value=0.5, per_label={"a": 0.5, "b": math.nan}, cases={"c": {"a": 0.5, "b": math.nan}})
    publish(publisher, A, both)
    line = json.loads(publisher.ledger.read_text(), parse_constant=pytest.fail)
    assert line["candidate"]["per_label"] == {"a": 0.5, "b": None}
