"""The public data sets that m3oe_fast reads: where their publishers offer them, on what terms, how to cite them.

No file of theirs comes with this package. Sizes and checksums are those of the publisher's files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m3oe_fast.errors import DataError

_GROUPLENS_TERMS = "research use, with acknowledgement; without permission no redistribution and no commercial use"
_HARPER_KONSTAN = (
    "F. M. Harper, J. A. Konstan: The MovieLens Datasets: History and Context. "
    "ACM Transactions on Interactive Intelligent Systems 5(4), article 19, 2015"
)
_KUAIRAND_TERMS = "CC BY-SA 4.0: any use, with attribution, and derived data under the same licence"
_GAO = (
    "C. Gao, S. Li, Y. Zhang, J. Chen, B. Li, W. Lei, P. Jiang, X. He: KuaiRand: An Unbiased Sequential "
    "Recommendation Dataset with Randomly Exposed Videos. CIKM 2022"
)
_MA = (
    "X. Ma, L. Zhao, G. Huang, Z. Wang, Z. Hu, X. Zhu, K. Gai: Entire Space Multi-Task Model: An Effective Approach "
    "for Estimating Post-Click Conversion Rate. SIGIR 2018"
)


@dataclass(frozen=True)
class PublishedFile:
    """A publisher's archive.

    Attributes:
        name: its file name.
        url: where it is fetched.
        size: bytes.
        checksum: ``ALGORITHM:HEX`` of its content, the algorithm by its name in hashlib.
    """

    name: str
    url: str
    size: int
    checksum: str


@dataclass(frozen=True)
class PublicLog:
    """A public data set.

    Attributes:
        title: what its publisher calls it.
        holds: in a few words.
        page: the publisher's page.
        terms: the licence, in our words; the publisher's text is what counts.
        citation: what its publisher asks to be cited.
        file: the archive, where anybody may fetch it.
        by_hand: else the names of the files to fetch by hand.
        why_by_hand: what stands in the way of a program.
    """

    title: str
    holds: str
    page: str
    terms: str
    citation: str
    file: PublishedFile | None = None
    by_hand: tuple[str, ...] = ()
    why_by_hand: str = ""

    @property
    def file_names(self) -> str:
        """What to fetch, for messages."""
        return self.file.name if self.file is not None else " and ".join(self.by_hand)

    @property
    def size(self) -> str:
        """How much there is to fetch, for people."""
        return "-" if self.file is None else readable_size(self.file.size)


CATALOGUE = {
    "movielens-100k": PublicLog(
        "MovieLens 100K",
        "100,000 ratings, 943 users, 1,682 movies",
        "https://grouplens.org/datasets/movielens/100k/",
        _GROUPLENS_TERMS,
        _HARPER_KONSTAN,
        PublishedFile(
            "ml-100k.zip",
            "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
            4_924_029,
            "sha256:50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        ),
    ),
    "movielens-1m": PublicLog(
        "MovieLens 1M",
        "1,000,209 ratings, 6,040 users, 3,706 movies",
        "https://grouplens.org/datasets/movielens/1m/",
        _GROUPLENS_TERMS,
        _HARPER_KONSTAN,
        PublishedFile(
            "ml-1m.zip",
            "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
            5_917_549,
            "sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        ),
    ),
    "kuairand-pure": PublicLog(
        "KuaiRand-Pure",
        "2,622,668 views, 27,285 users, 7,583 videos",
        "https://kuairand.com/",
        _KUAIRAND_TERMS,
        _GAO,
        PublishedFile(
            "KuaiRand-Pure.tar.gz",
            "https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz",
            47_432_272,
            "sha256:c814bf6f3624c0cfae83c57de3df26b2ed206e5c57bab4c4dcbfabbabe20cbf0",
        ),
    ),
    "kuairand-1k": PublicLog(
        "KuaiRand-1K",
        "11,756,073 views, 1,000 users, 4,369,953 videos",
        "https://kuairand.com/",
        _KUAIRAND_TERMS,
        _GAO,
        PublishedFile(
            "KuaiRand-1K.tar.gz",
            "https://zenodo.org/records/10439422/files/KuaiRand-1K.tar.gz",
            1_135_436_720,
            "md5:6b0b9c8222d67fcd4c676218edca3f1f",
        ),
    ),
    "ali-ccp": PublicLog(
        "Ali-CCP (Alibaba Click and Conversion Prediction)",
        "about 85 million views; over 10 GB of text",
        "https://tianchi.aliyun.com/dataset/408",
        "the terms of the Tianchi laboratory, shown after the login; research use",
        _MA,
        by_hand=("sample_train.tar.gz", "sample_test.tar.gz"),
        why_by_hand="its publisher asks for a login",
    ),
    "census-income": PublicLog(
        "Census-Income (KDD)",
        "299,285 persons",
        "https://archive.ics.uci.edu/dataset/117/census+income+kdd",
        "CC BY 4.0: any use, with attribution",
        "Census-Income (KDD). UCI Machine Learning Repository, 2000, doi 10.24432/C5N30T",
        by_hand=("census-income.data", "census-income.test"),
        why_by_hand="its publisher gives no checksum",
    ),
}


def downloadable(name: str) -> PublishedFile:
    """The archive of the data set ``name``.

    Raises:
        DataError: there is no such data set, or a person has to fetch it.
    """
    if name not in CATALOGUE:
        raise DataError(f"--download: {name} is no public data set; choose one of {', '.join(CATALOGUE)}")
    log = CATALOGUE[name]
    if log.file is None:
        raise DataError(f"--download cannot fetch {log.title}: {_how_by_hand(name, log)}")
    return log.file


def place_in(cache: Path, file: PublishedFile) -> Path:
    """Where ``prepare --download`` keeps an archive."""
    return cache / "raw" / file.name


def find_files(name: str, data_path: str | None, cache: Path) -> str:
    """Where the files of the data set ``name`` are: at ``data_path``, else the archive downloaded into ``cache``.

    Raises:
        DataError: no ``data_path``, and nothing was downloaded; the message says what to type.
    """
    if data_path is not None:
        return data_path
    log = CATALOGUE[name]
    if log.file is None:
        raise DataError(f"--data {name} needs --data_path: {_how_by_hand(name, log)}")
    place = place_in(cache, log.file)
    if place.is_file():
        return str(place)
    raise DataError(
        f"--data {name} needs --data_path, as {place} is not there: python -m m3oe_fast.prepare {name} --download "
        f"fetches it ({log.size}; {log.page})"
    )


def readable_size(count: int) -> str:
    """A number of bytes with its unit, as publishers count: 1 MB is 10^6 bytes."""
    for unit, width in (("GB", 1e9), ("MB", 1e6)):
        if count >= width:
            return f"{count / width:.1f} {unit}"
    return f"{count:,} bytes"


def _how_by_hand(name: str, log: PublicLog) -> str:
    return (
        f"{log.why_by_hand}; fetch {log.file_names} at {log.page} into one folder, then type: "
        f"python -m m3oe_fast.prepare {name} --from FOLDER"
    )
