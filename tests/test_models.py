"""What a project's names become."""

import pytest

from apps.samloop.models import Models
from apps.samloop.project import MODELS, STRATEGIES, TRAINERS, load_project
from sam_infer.errors import InputError
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


def test_an_engine_that_can_learn_is_served_with_what_it_learned(tmp_path):
    (tmp_path / "tiny.yaml").write_text("engine: {name: sam_tiny, device: cpu}\nlabels: [liver]\n")
    models = Models(load_project(tmp_path / "tiny.yaml"), tmp_path / "home")
    assert models.encoder.engine is models.tuned and models.tuned_encoder is models.encoder
    assert models.tuned.base is models.base and models.base.name == "sam_tiny"
    assert models.tuned.path == models.trainers()["sam_finetune"].path
    learning = [models.trainers()[name] for name in ("sam_finetune", "sam_mix", "preference")]
    assert all(trainer.base is models.base and trainer.store is models.store for trainer in learning)


def test_another_sam_learns_beside_an_engine_that_cannot(tmp_path):
    models = Models(load_project(), tmp_path)
    assert models.encoder.engine.name == "bundled" and models.tuned_encoder is not models.encoder
    assert models.tuned_encoder.engine is models.tuned and models.base.name == "sam_tiny"
    assert models.tuned_encoder.store is models.store
    tasks = models.infers()
    for name in ("sam_tuned", "sam_auto_text", "sam_auto_mix"):
        with pytest.raises(InputError, match="not trained yet") as error:
            tasks[name].answer({"image": "a.png"})
        assert error.value.status == 409


def test_prompts_that_are_not_to_be_had_say_what_to_train(tmp_path):
    models = Models(load_project(), tmp_path)
    assert tuple(models.prompters) == ("unet", "cam", "clip")
    for name, told in (("unet", "POST /train/unet"), ("cam", "POST /train/cam_classifier")):
        with pytest.raises(InputError, match=told) as error:
            models.prompters[name]()
        assert error.value.status == 409
        with pytest.raises(InputError, match=told):
            models.trainers()["preference"].check({"prompts": name})
