"""Data sets under $SFTREC_DATA that configurations name: where the folder is, and where to get a file that is not there."""

import os
from dataclasses import dataclass
from pathlib import Path

from sftrec_jax.errors import UserError

VARIABLE = "SFTREC_DATA"
DEFAULT = "data"


@dataclass(frozen=True)
class KnownFile:
    """What a file is and whose, for the error of somebody who lacks it."""

    what: str
    """Ends with the source."""
    sha256: str
    """Of the gzipped file that was used here; another compression of the same content has another one."""


_INDUSTRIAL = "Industrial and Scientific (github.com/AkaliKong/MiniOneRec)"
_OFFICE = "Office Products (github.com/AkaliKong/MiniOneRec)"
_GAMES = "Video Games (github.com/Mr-Peach0301/Flower)"
_REBUILT = "rebuilt from the histories of users in valid and test of MiniOneRec's"
_EVENTS = "one user a line with times and ratings (github.com/sober-clever/ReRe) for MiniOneRec's"

FILES = {
    "amazon-beauty/sequences.txt.gz": KnownFile(
        "S3-Rec's Beauty.txt, gzipped (github.com/aHuiWang/CIKM2020-S3Rec)",
        "d90327e98288647f5bae59c0dba82e153af2d940eafb7540f4b05185e108d0fe",
    ),
    "amazon-beauty/items.jsonl.gz": KnownFile(
        "one item a line: item_id of S3-Rec, asin (github.com/Wenyueh/LLM-RecSys-ID), title "
        "(github.com/dh-r/LLM-Sequential-Recommendation), brand, categories, keyphrase (github.com/agiresearch/IDGenRec)",
        "f85438203ca745701133dcfa8b6254c4fb90bde4782549c4a4cf468e37e41877",
    ),
    "amazon-beauty/item2attributes.json.gz": KnownFile(
        "S3-Rec's item attributes of Beauty, gzipped (github.com/aHuiWang/CIKM2020-S3Rec)",
        "1914fdc21c3e1b0c36d23c3fc5e2cf64205bcc47f311ccbe7b51089221188fad",
    ),
    "amazon-beauty/attribute_names.json.gz": KnownFile(
        "the names of S3-Rec's attribute ids (github.com/Wenyueh/LLM-RecSys-ID)",
        "5774ee4d7db1f8ce949215fb166df29920cb3aba2b19d22a12127d3d98ef01b2",
    ),
    "amazon-beauty/semantic_ids_letter.json.gz": KnownFile(
        "LETTER's item ids of Beauty, gzipped (github.com/HonghuiBao2000/LETTER)",
        "f846f203fb7a9afc5e3b3d3e001eb41e50a6ec504cc224bf70d98089ca10b564",
    ),
    "amazon-games/items.jsonl.gz": KnownFile(
        f"one item a line (item_id, title, asin) of {_GAMES}",
        "5f48bb701a4b5e9fa4749d19e5a32db1852baff9fa4832cb934721f184556a07",
    ),
    "amazon-games/train.csv.gz": KnownFile(
        f"the training examples (history_item_id, item_id) of {_GAMES}",
        "c9d6666889fb1a2b07adbdd78f4c0ba8ff7e20d9cce979a2572a1d156eab1918",
    ),
    "amazon-games/valid.csv.gz": KnownFile(
        f"the validation examples, gzipped, of {_GAMES}",
        "49db79db3011c88f1d11101262c80a1bc1cf0d98acf4dd11249b92ab06e6e334",
    ),
    "amazon-games/test.csv.gz": KnownFile(
        f"the test examples, gzipped, of {_GAMES}",
        "0c566ab0c11ad26d2c412ff1502743f678a72f7a190a29289f4b3b88710bdec1",
    ),
    "amazon-industrial/valid.csv.gz": KnownFile(
        f"MiniOneRec's validation examples, gzipped, of {_INDUSTRIAL}",
        "3da8409a86471738ace3470668fdf429df33ab6a2dbaec4b055548161d4c0b44",
    ),
    "amazon-industrial/test.csv.gz": KnownFile(
        f"MiniOneRec's test examples, gzipped, of {_INDUSTRIAL}",
        "e78a2d65076784515bf4fa6f902eb9044dc7db757e07504c2a30d0e2994a86d6",
    ),
    "amazon-industrial/train_partial.csv.gz": KnownFile(
        f"training examples {_REBUILT} {_INDUSTRIAL}",
        "7f32a3daf48d0d45823ec374275a03efa91065dbefcdd2bfc63968c37673a96a",
    ),
    "amazon-industrial/events.jsonl.gz": KnownFile(
        f"{_EVENTS} {_INDUSTRIAL}",
        "18d23d8eaf447f76b42942ff643ce7d48846d6371d06a53896c69253467282f9",
    ),
    "amazon-industrial/item.json.gz": KnownFile(
        f"MiniOneRec's item.json, gzipped, of {_INDUSTRIAL}",
        "34cc1b6f74084740e67ad99181c5b7300a6cf0059de06dc2362ccc808a2a6f31",
    ),
    "amazon-industrial/index.json.gz": KnownFile(
        f"MiniOneRec's index.json, gzipped, of {_INDUSTRIAL}",
        "e94da19aea457a28feabcef00f0ba9473235d2758febe40b24c5df0e7bc9b96f",
    ),
    "amazon-industrial/info.txt.gz": KnownFile(
        f"MiniOneRec's table of semantic id, title, item id, gzipped, of {_INDUSTRIAL}",
        "a3279e3bcea238e6fb6a40849087f39ae2e16778dab4237b3690171d70a9ca03",
    ),
    "amazon-office/valid.csv.gz": KnownFile(
        f"MiniOneRec's validation examples, gzipped, of {_OFFICE}",
        "6eb4c716959c747ff9f72b62946c1e8de1054d3da2175cbabda1cb6933b91d73",
    ),
    "amazon-office/test.csv.gz": KnownFile(
        f"MiniOneRec's test examples, gzipped, of {_OFFICE}",
        "8fd51ef32842dd7d76aa510287d5b0b3337a93365dd576fcafcd54e381fe8d32",
    ),
    "amazon-office/train_partial.csv.gz": KnownFile(
        f"training examples {_REBUILT} {_OFFICE}",
        "effdd3b934ccc222ee7d77c430baeca6656a9c96e51ee48077689b22a9bcf384",
    ),
    "amazon-office/events.jsonl.gz": KnownFile(
        f"{_EVENTS} {_OFFICE}",
        "72e16fd6ac5e02d728c4dbcca6bbffb7abdb8b9d59389ef2ac2c99377b7e4055",
    ),
    "amazon-office/item.json.gz": KnownFile(
        f"MiniOneRec's item.json, gzipped, of {_OFFICE}",
        "e392c1cf070f69f8c57c5d3f46532a0bc1707dba76278493f91762cd79e6b919",
    ),
    "amazon-office/index.json.gz": KnownFile(
        f"MiniOneRec's index.json, gzipped, of {_OFFICE}",
        "8fc469e072eb9f4c7e8478f1d27a04460985612d47b27bee215369c47ee2e409",
    ),
    "amazon-office/info.txt.gz": KnownFile(
        f"MiniOneRec's table of semantic id, title, item id, gzipped, of {_OFFICE}",
        "3540a933b32f926a24ec51724d07de48d7c8765a3fcafc87a71c4ec4eb6c2707",
    ),
}
"""By path below the folder. S3-Rec: Zhou et al., CIKM 2020; LETTER: Wang et al., CIKM 2024; IDGenRec: Tan et al., SIGIR 2024;
MiniOneRec: Kong et al., 2025; Flower: Gao et al., SIGIR 2025. Items and reviews: McAuley lab, Amazon 2014 and 2018."""


def data_root() -> Path:
    """The folder that `$SFTREC_DATA` stands for: the environment variable, or `data` where it is not set or empty."""
    return Path(os.environ.get(VARIABLE) or DEFAULT)


def expand(value: str) -> str:
    """A configured path with a leading `$SFTREC_DATA/` or `${SFTREC_DATA}/` replaced; others are unchanged."""
    for start in (f"${VARIABLE}/", f"${{{VARIABLE}}}/"):
        if value.startswith(start):
            return str(data_root() / value[len(start) :])
    return value


def check_present(path: Path) -> None:
    """UserError for a path below `data_root()` that does not exist; it says what a known file is and where to get it.

    A path elsewhere is left to its reader. The content is not checked: files may have been compressed again.
    """
    root = data_root()
    if path.exists() or not _absolute(path).is_relative_to(_absolute(root)):
        return
    name = _absolute(path).relative_to(_absolute(root)).as_posix()
    holds = f"the folder that holds {name.split('/')[0]}{'/' if '/' in name else ''}"
    file = FILES.get(name)
    if file is None:
        raise UserError(f"{path}: not found; put it there, correct the path, or set {VARIABLE} to {holds}")
    raise UserError(f"{path}: not found; it is {file.what}, SHA-256 {file.sha256}; put it there or set {VARIABLE} to {holds}")


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
