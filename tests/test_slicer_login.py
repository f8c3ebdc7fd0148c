"""3D Slicer against a server that wants a token: by the dialog, and by the address that carries one."""

import re

import numpy as np
import pytest
import requests

from tests.conftest import save_png, serving
from tests.slicer_parts import Panel, reviewer_module

TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server that wants a token, over two pictures; gives (url, studies)."""
    studies = tmp_path_factory.mktemp("guarded")
    for n in range(2):
        grey = np.full((40, 50), 20, np.uint8)
        grey[10:20, 15:30] = 200
        save_png(studies / f"picture_{n}.png", grey)
    secret = tmp_path_factory.mktemp("secret") / "token"
    secret.write_text(TOKEN)
    with serving(studies, tmp_path_factory.mktemp("apart"), "--token-file", str(secret)) as url:
        yield url, studies


def test_the_dialogs_name_and_token_let_the_panel_do_everything(guarded, tmp_path):
    url, _ = guarded
    panel = Panel(url, tmp_path, user="Dr. A", password=TOKEN)
    assert panel.client().auth_enabled() is True
    assert panel.client().auth_valid_token() is True
    assert panel.next_sample("first") == "picture_0"
    panel.click("sam_click_2d", "liver", foreground=[[22, 15, 0]], point=[22, 15, 0])
    assert panel.segments["liver"].any()
    panel.submit()
    stored = panel.client().datastore()["objects"]["picture_0"]["labels"]["final"]["info"]
    assert stored["user"] == "Dr. A"
    assert panel.client().train_stop() is None


def test_a_wrong_token_is_told(guarded, tmp_path):
    url, _ = guarded
    with pytest.raises(Exception) as caught:
        Panel(url, tmp_path, user="Dr. A", password="wrong")
    assert "Status: 401" in caught.value.msg
    assert "token" in caught.value.msg


def test_one_client_for_many_requests(guarded, tmp_path):
    """Scripts keep a client, which repeats the headers of the request before: a length, and no body."""
    url, _ = guarded
    panel = Panel(url, tmp_path, user="Dr. A", password=TOKEN)
    panel.open({"id": "picture_1", "name": "picture_1.png", "path": str(guarded[1] / "picture_1.png")})
    client = panel.client()
    client.infer("sam_click_2d", "picture_1", {"foreground": [[22, 15]], "label": "liver"})
    assert client.info()["labels"]
    assert client.datastore()["objects"]
    assert client.train_status(check_if_running=True) is False
    assert client.train_stop() is None


@pytest.fixture
def address(guarded):
    """The address for 3D Slicer on another computer, as the page shows it to a browser that has logged in."""
    url, _ = guarded
    browser = requests.Session()
    browser.post(f"{url}/login", data={"username": "Dr. B", "password": TOKEN}).raise_for_status()
    (found,) = re.findall(rf"{re.escape(url)}/key/[^<\s]+/", browser.get(url).text)
    (cookie,) = browser.cookies
    assert found == f"{url}/key/{cookie.value}/", "it lets in as long as the login, and no longer"
    return found


def test_another_computer_gets_its_cases_by_the_address_that_carries_a_token(guarded, address, tmp_path):
    panel = Panel(address, tmp_path, shared=False, user="somebody")
    assert panel.client().auth_enabled() is False, "no dialog"
    assert panel.next_sample("random")
    panel.click("sam_click_2d", "liver", foreground=[[22, 15, 0]], point=[22, 15, 0])
    panel.submit()
    stored = panel.client().datastore()["objects"][panel.sample["id"]]["labels"]["final"]["info"]
    assert stored["user"] == "Dr. B"


def test_the_reviewer_needs_that_address(guarded, address, monkeypatch):
    controller = reviewer_module("ImageDataController", monkeypatch).ImageDataController()
    assert controller.connectToMonaiServer(address.rstrip("/"))
    assert controller.initMetaDataProcessing()
    assert set(controller.getMultImageDataByIds(["picture_0"])) == {"picture_0"}
    assert not controller.connectToMonaiServer(guarded[0] + "/info/")


@pytest.mark.parametrize("key", ["x", TOKEN, "sl1.eA.1.x", "sl1.eA.9999999999.x", "..", "%2e%2e", ""])
def test_no_other_address_lets_anybody_in(guarded, key):
    url, _ = guarded
    reply = requests.get(f"{url}/key/{key}/info/", allow_redirects=False)
    assert reply.status_code == 401
    assert "labels" not in reply.text


def test_without_tokens_there_is_no_such_address(served):
    client, _, _ = served
    assert client.get("/key/sl1.eA.9999999999.x/info/").status_code == 404
