"""Where models and accepted labels of some studies are kept."""

from argparse import ArgumentParser
from pathlib import Path

import pytest

from apps.samloop.home import DATA_DIR, add_data_argument, home_of, use_data

URL = "http://pacs.example:8042/dicom-web"


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (DATA_DIR, "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_local_studies_keep_what_is_theirs(tmp_path):
    assert home_of(str(tmp_path / "studies")) == tmp_path / "studies" / ".samloop"


def test_a_pacs_has_a_folder_that_nobody_takes_for_a_cache(tmp_path, monkeypatch):
    home = home_of(URL)
    assert home.parent == tmp_path / ".local" / "share" / "samloop"
    same = [f"{URL}/", f"{URL} ", URL.replace("//", "//me:secret@"), f"{URL}?x=1"]
    assert {home_of(url) for url in same} == {home}
    assert home_of(URL.replace("8042", "8043")) != home
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert home_of(URL) == tmp_path / "xdg" / "samloop" / home.name


def test_what_a_version_before_kept_is_used_while_it_is_the_only_one(tmp_path):
    new = home_of(URL)
    old = tmp_path / ".cache" / "samloop" / new.name
    old.mkdir(parents=True)
    assert home_of(URL) == old
    new.mkdir(parents=True)
    assert home_of(URL) == new


def test_a_named_folder_wins_for_this_process_and_its_children(tmp_path, monkeypatch):
    name = home_of(URL).name
    monkeypatch.setenv(DATA_DIR, str(tmp_path / "named"))
    assert home_of(URL) == tmp_path / "named" / name
    parser = ArgumentParser()
    add_data_argument(parser)
    use_data(parser.parse_args([]).data)
    assert home_of(URL) == tmp_path / "named" / name
    use_data(parser.parse_args(["--data", "~/mine"]).data)
    assert home_of(URL) == Path(tmp_path, "mine", name)
    assert home_of(str(tmp_path)) == tmp_path / ".samloop"


@pytest.mark.parametrize("command", ["serve", "predict", "rollback", "doctor"])
def test_every_command_that_knows_studies_can_be_told(command):
    from apps.samloop import doctor, predict, rollback, serve

    commands = ArgumentParser().add_subparsers()
    for module in (serve, predict, rollback, doctor):
        module.add_parser(commands)
    assert "--data DIR" in commands.choices[command].format_help()
