"""What a project's names become."""

from apps.samloop.models import Models
from apps.samloop.project import MODELS, STRATEGIES, TRAINERS, load_project
from tests.fakes import CoarseEngine


def test_everything_that_a_project_can_name_is_made(tmp_path):
    (tmp_path / "all.yaml").write_text(
        f"models: {list(MODELS)}\ntrainers: {list(TRAINERS)}\nstrategies: {list(STRATEGIES)}\n".replace(
            "'", ""
        )
    )
    models = Models(load_project(tmp_path / "all.yaml"), tmp_path / "home")
    assert tuple(models.infers(lambda: None)) == MODELS
    assert tuple(models.infers()) == tuple(name for name in MODELS if name != "pseudo_label"), "no datastore"
    trainers = models.trainers()
    assert tuple(trainers) == TRAINERS
    assert {name: trainer.name for name, trainer in trainers.items()} == {name: name for name in TRAINERS}
    assert tuple(models.strategies()) == STRATEGIES
    assert not (tmp_path / "home").exists(), "nothing is written before it is used"


def test_an_engine_that_keeps_pixels_only_lets_another_describe_images(tmp_path, monkeypatch):
    """The bundled engine has nothing to say of an image; the small SAM's features are kept on disk."""
    models = Models(load_project(), tmp_path)
    assert models.encoder.engine.encoding is None
    assert models.describing.engine.name == "sam_tiny"
    assert models.describing.store is models.encoder.store
    assert "features of sam_tiny" in models.strategies()["diverse"].info()["description"]
    monkeypatch.setattr(type(models.encoder.engine), "encoding", CoarseEngine().encoding)
    chosen = Models(load_project(), tmp_path)
    assert chosen.describing is chosen.encoder
