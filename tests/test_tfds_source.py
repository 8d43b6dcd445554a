"""TFDS folders in ArrayRecord, written here and read without TensorFlow, in a process of its own (tfds has import-time state)."""

import subprocess
import sys
from pathlib import Path

import pytest

from sftrec_jax.data.tfds_source import parse_source
from sftrec_jax.errors import UserError

WRITE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text, number = tfds.features.Text(), np.int64
        features = {"who": text, "item": number, "when": number, "rating": np.float32}
        features["vector"] = tfds.features.Tensor(shape=(2,), dtype=np.float32)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(1000), "test": self._generate_examples(10)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"who": f"ü{i % 10}", "item": i % 7, "when": 5000 - i, "rating": 1.0, "vector": [0.0, 1.0]}

tfds.disable_progress_bar()
Toy(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""

READ = """
import sys
from sftrec_jax.config import DataConfig
from sftrec_jax.data.prepare import prepare_dataset
from sftrec_jax.errors import UserError

assert "tensorflow_datasets" not in sys.modules  # imported only when a tfds: source is named
prepare_dataset(DataConfig())
assert "tensorflow_datasets" not in sys.modules
names = {"user_column": "who", "item_column": "item", "time_column": "when", "user_core": 0}
folder = sys.argv[1]
data = prepare_dataset(DataConfig(source=f"tfds:{folder}", rating_column="rating", **names))
assert data.report["interactions_read"] == 1000, data.report
assert data.user_ids.tolist() == [f"ü{u}" for u in range(10)]
for u in range(10):
    rows = [(5000 - i, str(i % 7)) for i in range(1000) if i % 10 == u]
    assert data.item_ids[data.history(u)].tolist() == [item for _, item in sorted(rows)]
small = prepare_dataset(DataConfig(source=f"tfds:{folder}:test", **names))
assert len(small.items) == 10
part = prepare_dataset(DataConfig(source=f"tfds:{folder}:train[:50%]", **names))
assert len(part.items) == 500

def message(source, **changes):
    try:
        prepare_dataset(DataConfig(source=source, **(names | changes)))
    except UserError as error:
        assert "\\n" not in str(error)
        return str(error)
    raise AssertionError(source)

assert "nearest: 'who'" in message(f"tfds:{folder}", user_column="whom")
assert "train, test" in message(f"tfds:{folder}:valid") or "test, train" in message(f"tfds:{folder}:valid")
assert "shuffled" in message(f"tfds:{folder}", time_column=None)
assert "is an array" in message(f"tfds:{folder}", user_column="vector")
assert "dataset_info.json" in message(f"tfds:{folder}/..")
assert "does not exist" in message(f"tfds:{folder}-none")
assert "cannot open" in message(f"tfds:{folder}:train[:banana]")
assert "tensorflow" not in sys.modules
"""


def test_arrayrecord_folder_without_tensorflow(tmp_path: Path) -> None:
    for code, argument in ((WRITE, tmp_path), (READ, tmp_path / "toy" / "1.0.0")):
        done = subprocess.run([sys.executable, "-c", code, str(argument)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("tfds:movielens/latest-small-ratings", ("movielens/latest-small-ratings", None)),
        ("tfds:movielens/latest-small-ratings:0.1.1", ("movielens/latest-small-ratings:0.1.1", None)),
        ("tfds:movielens:0.1.1:train[:10%]", ("movielens:0.1.1", "train[:10%]")),
        ("tfds:/data/toy/1.0.0:test", ("/data/toy/1.0.0", "test")),
    ],
)
def test_source_names_data_set_and_split(source: str, expected: tuple[str, str | None]) -> None:
    assert parse_source(source) == expected


def test_source_needs_a_name() -> None:
    with pytest.raises(UserError, match="NAME_OR_FOLDER"):
        parse_source("tfds:")
