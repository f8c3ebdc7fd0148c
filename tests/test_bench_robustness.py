"""What the soak and the robustness tables say of what happened."""

import ast

import pytest
import requests

from bench import soak
from bench.robustness import stockapp, stores
from bench.robustness.subject import OURS, STOCK, last_error, short, told


def _reply(status, text, kind="application/json"):
    reply = requests.Response()
    reply.status_code, reply._content = status, text.encode()
    reply.headers["content-type"] = kind
    return reply


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (_reply(200, '{"a": 1}'), "200"),
        (_reply(404, '{"detail": "no  such\\nimage"}'), "404 no such image"),
        (_reply(500, "Internal Server Error", "text/plain"), "500 Internal Server Error"),
        (_reply(500, "", "text/plain"), "500 without a word"),
        (_reply(422, '{"detail": "a | b"}'), "422 a / b"),
    ],
)
def test_an_answer_in_a_cell(reply, said):
    assert told(reply) == said


def test_long_texts_are_cut_between_words():
    assert short("word " * 100, 20) == "word word word word ..."


def test_the_last_error_of_a_log():
    log = "[2026] [ERROR] started\nKeyError: 'a'\nValueError: b\n[2026] [INFO] Error again"
    assert last_error(log) == "ValueError: b"
    assert last_error("nothing") == "nothing said"


def test_memory_that_grows_has_a_slope_and_what_warms_up_is_left_out():
    steady = [(float(n), (900 if n > 20 else n * 40) * 1_000_000) for n in range(120)]
    slope, first, last = soak._slope(steady)
    assert abs(slope) < 1e-6
    assert first == last == 900
    growing = [(float(n), int((1000 + n / 6) * 1e6)) for n in range(120)]
    assert soak._slope(growing)[0] == pytest.approx(10, rel=0.01)


def test_what_went_wrong_is_counted_by_kind():
    record = soak.Record(memory=[(float(n), 10**9) for n in range(20)])
    record.seconds["save"] = [0.1, 0.2]
    record.errors["save: 500 oops"] = 3
    text = soak.report(record, 10, 8, 2 * 10**9)
    assert "10 minutes, 8 clients, 2 requests, 3 errors" in text
    assert "- 3 times save: 500 oops" in text
    assert "slope +0.00 MB a minute" in text


def test_the_trivial_application_can_be_read():
    names = {node.name for node in ast.parse(stockapp.MAIN).body if isinstance(node, ast.ClassDef)}
    assert {"Threshold", "Wait", "Trivial"} <= names


@pytest.mark.slow
def test_kills_are_counted(tmp_path):
    assert stores.killed(OURS, tmp_path / "ours", 3).startswith("index damaged by 0 of 3 kills")
    assert "of 3 kills" in stores.killed(STOCK, tmp_path / "stock", 3)
