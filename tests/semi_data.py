"""A store of accepted and open discs, and the trainers that learn from both."""

import numpy as np

from sam_infer.embeddings import SliceEncoder
from sam_infer.geometry import Region
from tests.fakes import ThresholdEngine
from tests.loop_data import Folder, basis, disc
from tests.sam_data import Bright, label_texts, rate, small_base
from trainers.boxes import BoxStore
from trainers.cam_classifier import CamClassifierTrainer
from trainers.mean_teacher import MeanTeacherTrainer
from trainers.preference import PreferenceTrainer
from trainers.preferences import PreferenceStore
from trainers.pseudo_label import PseudoLabelTrainer, SelfTrainingTrainer
from trainers.sam_finetune import SamFinetuneTrainer
from trainers.sam_mix import SamMixTrainer
from trainers.split import is_held_out
from trainers.unet import UnetTrainer
from trainers.weak_box import WeakBoxTrainer

LABELS = {"disc": 5}
SAM_TRAINERS = ("sam_finetune", "sam_mix", "preference")
UNET_TRAINERS = ("unet", "mean_teacher", "self_training", "pseudo_label", "weak_box")
NAMES = [f"case_{n:04d}" for n in range(16)]
HELD = [name for name in NAMES if is_held_out(name, fraction=0.25)]


def make_store(root):
    """Of 16 discs those that are held out and 4 others are accepted."""
    store, others = Folder(root), 0
    for seed, name in enumerate(NAMES):
        others += name not in HELD
        store.add_disc(name, seed, value=5, accepted=name in HELD or others <= 4)
    return store


def add_blanks(store):
    """Accepted images without a disc, so that presence can be learned and judged."""
    for seed in range(10):
        image, mask = disc(seed, bright=60)
        store.add(f"blank_{seed:04d}", image, mask * 0)


def truth(name):
    """(48, 48, 1) bool, the disc of a case."""
    return disc(NAMES.index(name))[1].T[:, :, None]


def draw_boxes(root, names):
    """A box around each disc."""
    boxes = BoxStore(root / "boxes")
    for name in names:
        i, j, _ = np.nonzero(truth(name))
        region = Region(low=(int(i.min()), int(j.min()), 0), high=(int(i.max()), int(j.max()), 0))
        boxes.put(name, {"disc": [region]}, who="ann")
    return boxes


def rate_discs(root):
    """Ratings of discs in one another on two open cases."""
    preferences = PreferenceStore(root / "preferences")
    for name in [n for n in NAMES if n not in HELD][-2:]:
        rate(preferences, name, size=(48, 48), label="disc")


def make_trainer(name, root, **kwargs):
    """A trainer of this name whose models lie in ``root``/model."""
    own = basis(root / "model", LABELS, **kwargs)
    encoder = SliceEncoder(engine=ThresholdEngine())
    makers = {
        "unet": lambda: UnetTrainer(own),
        "mean_teacher": lambda: MeanTeacherTrainer(own),
        "self_training": lambda: SelfTrainingTrainer(own),
        "pseudo_label": lambda: PseudoLabelTrainer(own, encoder=encoder),
        "cam_classifier": lambda: CamClassifierTrainer(own),
        "weak_box": lambda: WeakBoxTrainer(own, encoder=encoder, boxes=BoxStore(root / "boxes")),
        "sam_finetune": lambda: SamFinetuneTrainer(own, base=small_base()),
        "sam_mix": lambda: SamMixTrainer(own, base=small_base()),
        "preference": lambda: PreferenceTrainer(
            own,
            base=small_base(),
            store=None,
            prompters={"bright": Bright("disc")},
            texts=lambda: label_texts(root, label="disc"),
            preferences=PreferenceStore(root / "preferences"),
        ),
    }
    return makers[name]()
