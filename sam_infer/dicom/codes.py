"""SNOMED CT codes of what labels are called, for other systems that read a DICOM SEG."""

from __future__ import annotations

import re

from pydicom.dataset import Dataset

_SIDES = {"left": ("7771000", "Left"), "right": ("24028007", "Right")}
_STRUCTURE = ("123037004", "Anatomical Structure")
_ABNORMAL = ("49755003", "Morphologically Abnormal Structure")
#: What is said of a name that is not listed: it is a structure, made of tissue.
_UNKNOWN = ("85756007", "Tissue")
_ANATOMY = {
    "adrenal gland": ("23451007", "Adrenal gland"),
    "aorta": ("15825003", "Aorta"),
    "bladder": ("89837001", "Bladder"),
    "bone": ("272673000", "Bone"),
    "brain": ("12738006", "Brain"),
    "breast": ("76752008", "Breast"),
    "clavicle": ("51299004", "Clavicle"),
    "colon": ("71854001", "Colon"),
    "duodenum": ("38848004", "Duodenum"),
    "esophagus": ("32849002", "Esophagus"),
    "eye": ("81745001", "Eye"),
    "fat": ("256674009", "Fat"),
    "femur": ("71341001", "Femur"),
    "gallbladder": ("28231008", "Gallbladder"),
    "heart": ("80891009", "Heart"),
    "humerus": ("85050009", "Humerus"),
    "inferior vena cava": ("64131007", "Inferior Vena Cava"),
    "kidney": ("64033007", "Kidney"),
    "liver": ("10200004", "Liver"),
    "lung": ("39607008", "Lung"),
    "lymph node": ("59441001", "Lymph node"),
    "mandible": ("91609006", "Mandible"),
    "muscle": ("71616004", "Muscle"),
    "ovary": ("15497006", "Ovary"),
    "pancreas": ("15776009", "Pancreas"),
    "parotid gland": ("45289007", "Parotid gland"),
    "portal vein": ("32764006", "Portal Vein"),
    "prostate": ("41216001", "Prostate"),
    "pulmonary artery": ("81040000", "Pulmonary artery"),
    "rectum": ("34402009", "Rectum"),
    "rib": ("113197003", "Rib"),
    "sacrum": ("54735007", "Sacrum"),
    "scapula": ("79601000", "Scapula"),
    "skeletal muscle": ("127954009", "Skeletal muscle"),
    "skin": ("39937001", "Skin"),
    "skull": ("89546000", "Skull"),
    "small intestine": ("30315005", "Small intestine"),
    "spinal cord": ("2748008", "Spinal cord"),
    "spine": ("421060004", "Spine"),
    "spleen": ("78961009", "Spleen"),
    "sternum": ("56873002", "Sternum"),
    "stomach": ("69695003", "Stomach"),
    "testis": ("40689003", "Testis"),
    "thyroid": ("69748006", "Thyroid"),
    "tooth": ("38199008", "Tooth"),
    "trachea": ("44567001", "Trachea"),
    "uterus": ("35039007", "Uterus"),
    "vertebra": ("51282000", "Vertebra"),
}
_FINDINGS = {
    "cyst": ("367643001", "Cyst"),
    "edema": ("79654002", "Edema"),
    "hemorrhage": ("50960005", "Hemorrhage"),
    "lesion": ("52988006", "Lesion"),
    "necrosis": ("6574001", "Necrosis"),
    "neoplasm": ("108369006", "Neoplasm"),
    "nodule": ("27925004", "Nodule"),
    "tumor": ("108369006", "Neoplasm"),
    "tumour": ("108369006", "Neoplasm"),
}


def property_codes(name: str) -> tuple[Dataset, Dataset]:
    """The category and type of a segment by its label's name, as in "left kidney" or "kidney_left".

    A name that is not listed is an anatomical structure of the type tissue.

    Returns:
        Items of SegmentedPropertyCategoryCodeSequence and SegmentedPropertyTypeCodeSequence.
    """
    words = re.sub(r"[\W_]+", " ", name.lower()).split()
    sides = [_SIDES[word] for word in words if word in _SIDES]
    plain = " ".join(word for word in words if word not in _SIDES)
    if plain in _FINDINGS:
        return code(*_ABNORMAL), code(*_FINDINGS[plain])
    found = code(*_ANATOMY.get(plain, _UNKNOWN))
    if plain in _ANATOMY and len(sides) == 1:
        found.SegmentedPropertyTypeModifierCodeSequence = [code(*sides[0])]
    return code(*_STRUCTURE), found


def code(value: str, meaning: str, *, scheme: str = "SCT") -> Dataset:
    """An item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item
