"""The engines that can be served, their checkpoints, where those come from and under which licence.

Beside them stand models of several files that serve engines and are none themselves (`FOLDERS`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sam_infer.engines import architectures, framing
from sam_infer.engines.architectures import Architecture
from sam_infer.engines.framing import Framing

#: Weights that come with the package.
PACKAGED = Path(__file__).resolve().parent.parent / "weights"


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file that is fetched and checked.

    Args:
        name: What `samloop weights fetch` calls it, or what it belongs to.
        file: Its name among the checkpoints, with its folder where it has one.
        packaged: True where the file comes with the package and is never fetched.
        addresses: Where it is fetched from, tried in order.
        size: Bytes; None = not known.
        sha256: Of the file, hexadecimal; None = not known: recorded beside the file when it is first fetched.
        named: Where a user names a copy of their own.
    """

    name: str
    file: str
    packaged: bool = False
    addresses: tuple[str, ...] = ()
    size: int | None = None
    sha256: str | None = None
    named: str = "name the file with --weights or engine.weights"


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is told of a set of weights.

    Args:
        title: What it is.
        page: Where its authors publish it.
        licence: Of the weights.
        code_licence: Of its authors' code.
        hash_source: Where sizes and hashes were read.
        commercial: False where the weights may not be used commercially.
        note: What a user must know.
    """

    title: str
    page: str
    licence: str
    code_licence: str
    hash_source: str = ""
    commercial: bool = True
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry(Download, Published):
    """One engine with one set of weights, in one file.

    Args:
        name: Registry name.
        family: Which engine class runs it.
        architecture: The network; None for the bundled model, whose file says it itself.
        framing: What the checkpoint expects around a SAM network.
        side: Side of the network's input in pixels.
    """

    family: Literal["bundled", "sam", "sam2"]
    architecture: Architecture | None
    side: int
    framing: Framing = framing.SAM


@dataclass(frozen=True, kw_only=True)
class FolderEntry(Published):
    """A model of several files in a folder of their own, which serves engines and is none.

    Args:
        name: What `samloop weights fetch` calls it, and the folder among the checkpoints.
        files: Its files.
    """

    name: str
    files: tuple[Download, ...]

    @property
    def size(self) -> int | None:
        """Bytes of all files whose size is known; None where none is."""
        return sum(one.size or 0 for one in self.files) or None


_META = "https://dl.fbaipublicfiles.com"
_SAM_PAGE = "https://github.com/facebookresearch/segment-anything#model-checkpoints"
_SAM2_PAGE = "https://github.com/facebookresearch/sam2#sam-21-checkpoints"
_APACHE = "Apache-2.0"
_QUOTED = (
    "quoted alike by many public download scripts; upstream's file name holds the first digits of its MD5"
)
_HUB = "micro-sam's registry (micro_sam/v2/util.py, HASHES) and the LFS pointer of facebook/sam2.1-hiera-*"


def _sam(name: str, *, size: int, sha256: str, title: str, network: Architecture, file: str) -> Entry:
    return Entry(
        name=name, title=title, family="sam", architecture=network, file=file, side=1024, size=size,
        sha256=sha256, hash_source=_QUOTED, addresses=(f"{_META}/segment_anything/{file}",), page=_SAM_PAGE,
        licence=_APACHE, code_licence=_APACHE,
    )  # fmt: skip


def _sam2(name: str, *, size: int, sha256: str, title: str, network: Architecture, file: str) -> Entry:
    return Entry(
        name=name, title=title, family="sam2", architecture=network, file=file, side=1024, size=size,
        sha256=sha256, hash_source=_HUB, addresses=(f"{_META}/segment_anything_2/092824/{file}",),
        page=_SAM2_PAGE, licence=_APACHE, code_licence=_APACHE,
    )  # fmt: skip


_ENTRIES = (
    Entry(
        name="bundled", title="crops around the prompts; comes with samloop", family="bundled",
        architecture=None, file="bundled.safetensors", packaged=True, side=128, licence=_APACHE,
        code_licence=_APACHE, page="sam_infer/weights/README.md",
    ),
    _sam(
        "sam_vit_b", title="Segment Anything, ViT-B", network=architectures.VIT_B,
        file="sam_vit_b_01ec64.pth", size=375_042_383,
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    _sam(
        "sam_vit_l", title="Segment Anything, ViT-L", network=architectures.VIT_L,
        file="sam_vit_l_0b3195.pth", size=1_249_524_607,
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    _sam(
        "sam_vit_h", title="Segment Anything, ViT-H", network=architectures.VIT_H,
        file="sam_vit_h_4b8939.pth", size=2_564_550_879,
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    Entry(
        name="medsam", title="MedSAM: ViT-B tuned on medical images, for boxes", family="sam",
        architecture=architectures.VIT_B, framing=framing.MEDSAM, file="medsam_vit_b.pth", side=1024,
        addresses=("https://zenodo.org/records/10689643/files/medsam_vit_b.pth",),
        page="https://github.com/bowang-lab/MedSAM", size=375_049_145,
        sha256="34b34b78c1d18cb8c6bf84cf9c00e135d6d6c965699f3c0e31ef1bc9dcb5be74",
        hash_source="model lists of several public projects; Zenodo publishes the MD5 only "
        "(3bb6db55bd0c9ca30b61248bca72f8d6)",
        licence="CC-BY-4.0 (Zenodo record)", code_licence=_APACHE,
        note="trained with boxes only; answers clicks, but badly",
    ),
    Entry(
        name="medico_sam", title="medico-sam: ViT-B tuned on medical images, interactively", family="sam",
        architecture=architectures.VIT_B, file="vit_b_medicosam.pt", side=1024,
        addresses=("https://owncloud.gwdg.de/index.php/s/f5Ol4FrjPQWfjUF/download",),
        page="https://github.com/computational-cell-analytics/medico-sam",
        hash_source="micro-sam's registry has an xxh128 only (40169f1e3c03a4b67bff58249c176d92)",
        licence="not stated", code_licence="MIT",
    ),
    Entry(
        name="mobile_sam", title="MobileSAM: SAM's decoder on TinyViT, for CPUs", family="sam",
        architecture=architectures.MOBILE_SAM, file="mobile_sam.pt", side=1024,
        addresses=(
            "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/"
            "f706ad9c4eb7f219c00d9050e46328518ffb65d2/weights/mobile_sam.pt",
        ),
        page="https://github.com/ChaoningZhang/MobileSAM", size=40_728_226,
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        hash_source="quoted alike by many public download scripts", licence=_APACHE, code_licence=_APACHE,
    ),
    Entry(
        name="sam_med2d", title="SAM-Med2D: ViT-B at 256 px with adapters", family="sam",
        architecture=architectures.SAM_MED2D, framing=framing.SAM_MED2D, file="sam-med2d_b.pth", side=256,
        addresses=("https://huggingface.co/schengal1/SAM-Med2D_model/resolve/main/sam-med2d_b.pth",),
        page="https://github.com/OpenGVLab/SAM-Med2D", size=2_561_829_701,
        sha256="921d8c130cc4bcc4b7220c064e60f207f15ad59f17ab36de340e41c67a490d18",
        hash_source="one public download script, for the mirror that is fetched from",
        licence=_APACHE, code_licence=_APACHE,
        note="its authors publish on Google Drive, which cannot be fetched from; the address is a mirror's",
    ),
    _sam2(
        "sam2.1_tiny", title="SAM 2.1, Hiera tiny", network=architectures.SAM2_TINY,
        file="sam2.1_hiera_tiny.pt", size=156_008_466,
        sha256="7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
    ),
    _sam2(
        "sam2.1_small", title="SAM 2.1, Hiera small", network=architectures.SAM2_SMALL,
        file="sam2.1_hiera_small.pt", size=184_416_285,
        sha256="6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
    ),
    _sam2(
        "sam2.1_base_plus", title="SAM 2.1, Hiera base+", network=architectures.SAM2_BASE_PLUS,
        file="sam2.1_hiera_base_plus.pt", size=323_606_802,
        sha256="a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
    ),
    _sam2(
        "sam2.1_large", title="SAM 2.1, Hiera large", network=architectures.SAM2_LARGE,
        file="sam2.1_hiera_large.pt", size=898_083_611,
        sha256="2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
    ),
    Entry(
        name="medsam2", title="MedSAM2: SAM 2.1 tiny tuned on medical volumes", family="sam2",
        architecture=architectures.SAM2_TINY, file="MedSAM2_latest.pt", side=512,
        addresses=(
            "https://huggingface.co/wanglab/MedSAM2/resolve/"
            "e4a6f35edd7e091619cbc0750f462f1574e23955/MedSAM2_latest.pt",
        ),
        page="https://github.com/bowang-lab/MedSAM2", size=156_040_129,
        sha256="c92743b99f00d078bf32a3afcc38aaa9faf1c1692dffe3eaa7a90938c1991060",
        hash_source="pinned alike, with this revision, by several public projects",
        licence="research and education only (model card, beside CC-BY-SA-4.0)", code_licence=_APACHE,
        commercial=False,
    ),
    Entry(
        name="sam_tiny", title="a small SAM of samloop's own; comes with samloop", family="sam",
        architecture=architectures.SAM_TINY, file="sam_tiny.safetensors", packaged=True, side=256,
        licence=_APACHE, code_licence=_APACHE, page="sam_infer/weights/sam_tiny.md",
        note="for methods that need SAM's own parts; the bundled engine segments better",
    ),
)  # fmt: skip

#: Registry name -> entry.
CATALOG = {entry.name: entry for entry in _ENTRIES}


_BIOMED_CLIP = "https://huggingface.co/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
_BIOMED_CLIP_REVISION = "9f341de24bfb00180f1b847274256e9b65a3a32e"


def _biomed_clip(file: str, *, size: int | None = None, sha256: str | None = None) -> Download:
    return Download(
        name="biomed_clip", file=f"biomed_clip/{file}", size=size, sha256=sha256,
        addresses=(f"{_BIOMED_CLIP}/resolve/{_BIOMED_CLIP_REVISION}/{file}",),
        named="name the folder in the project file under clip.weights",
    )  # fmt: skip


_FOLDERS = (
    FolderEntry(
        name="biomed_clip",
        title="BiomedCLIP: ViT-B/16 and PubMedBERT, for sam_auto_clip",
        page=_BIOMED_CLIP,
        licence="MIT",
        code_licence="MIT",
        hash_source="pinned alike, with this revision, by several public projects, but for the tokenizer",
        files=(
            _biomed_clip(
                "open_clip_config.json",
                sha256="9a41f334a8c444678772c0ebb9ab854c97ab350bced3a17b803e258d39c23dc0",
            ),
            _biomed_clip("tokenizer_config.json"),
            _biomed_clip("tokenizer.json"),
            _biomed_clip("vocab.txt"),
            _biomed_clip(
                "open_clip_pytorch_model.bin", size=783_705_670,
                sha256="52cc993c5c5ff962bd0c60931874bc001e7e9b41666a385530f4a036294576be",
            ),
        ),
        note="its authors intend it for research; maps of it may not depend on the text, which is checked",
    ),
)  # fmt: skip

#: Name -> models of several files that serve engines and are none themselves.
FOLDERS = {entry.name: entry for entry in _FOLDERS}
