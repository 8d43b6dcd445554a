"""The loss of target tokens: packed against one by one, against torch, in chunks, through remat and in bfloat16."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import FIXTURE, ITEMS, Case, make_case, save_llama
from peft import PeftModel
from tiny_training import Parts, assert_close, examples, loss_and_gradient, random_histories, rows_of, split, stories
from transformers import AutoModelForCausalLM

from sftrec_jax.config import LoraConfig, PromptConfig
from sftrec_jax.data.segments import Example, PackedBatch
from sftrec_jax.model.cards import CardInfo
from sftrec_jax.model.load import trainable_filter
from sftrec_jax.model.peft_write import export_adapter
from sftrec_jax.train.loss import weighted_cross_entropy

# peft 0.21 asks transformers 5.23 for a name that it renamed; this can go once peft asks for the new one.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FORMATS = {
    "stream": PromptConfig("stream", max_history=2),
    "instruct": PromptConfig("instruct", max_history=2, history="tokens", prefix="Once", separator=" ", suffix="then"),
}
ROW, TARGETS = 32, 32


@pytest.fixture(scope="module")
def parts() -> Parts:
    return stories()


def packed_rows(made: list[Example]) -> PackedBatch:
    """Four rows of the examples in turn, as full as they get."""
    rows: list[list[int]] = [[]]
    for i, example in enumerate(made):
        if sum(len(made[j].tokens) for j in rows[-1]) + len(example.tokens) > ROW:
            rows.append([])
        rows[-1].append(i)
    assert len(rows) <= 4
    assert max(map(len, rows)) > 2
    return rows_of(made, rows + [[]] * (4 - len(rows)), ROW, TARGETS)


def weighted(made: list[Example]) -> list[Example]:
    """Weights that differ, one of them 0, so that a loss that ignores them is caught."""
    rng = np.random.default_rng(5)
    return [dataclasses.replace(e, weights=rng.choice([0.0, 0.5, 1.0, 2.0], len(e.labels)).astype(np.float32)) for e in made]


def some_examples(case: Case, name: str) -> list[Example]:
    return weighted(examples(case, FORMATS[name], random_histories(10, 6))[: 24 if name == "stream" else 12])


@pytest.mark.parametrize("name", FORMATS)
def test_packed_equals_one_by_one(parts: Parts, name: str) -> None:
    made = some_examples(parts.case, name)
    loss, gradient = loss_and_gradient(parts, packed_rows(made))
    # Examples of one length stand in unpadded rows of their own.
    lengths = sorted({len(e.tokens) for e in made})
    assert len(lengths) > 1
    total, summed = 0.0, {name: np.zeros_like(value) for name, value in gradient.items()}
    for length in lengths:
        same = [e for e in made if len(e.tokens) == length]
        alone = rows_of(same, [[i] for i in range(len(same))], length, max(len(e.labels) for e in same))
        assert (alone.segments == 1).all()
        value, part = loss_and_gradient(parts, alone)
        total += value
        summed = {name: summed[name] + part[name] for name in summed}
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert_close(gradient, summed)


def in_peft(case: Case, folder: Path) -> PeftModel:
    export_adapter(case.decoder, case.build, case.codes, case.tokenizer, str(case.base), folder, CardInfo("t", "b", "d", "c"))
    model = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    model.resize_token_embeddings(512 + len(ITEMS), mean_resizing=False)
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def torch_gradients(model: PeftModel) -> dict[str, np.ndarray]:
    """Gradients of PEFT's parameters under our names and in our layout."""
    found: dict[str, list[np.ndarray]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        value = parameter.grad.numpy()
        if "trainable_tokens_delta" in name:
            table = "embed_tokens" if "embed_tokens" in name else "lm_head"
            found[f"{table}/rows"] = [value]
        else:  # base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight; layers come in order
            projection, kind = name.split(".")[-4:-2]
            found.setdefault(f"layers/{projection}/{kind.lower()}", []).append(value.T)
    return {name: v[0] if name.endswith("/rows") else np.stack(v) for name, v in found.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_torch(tmp_path: Path, tied: bool) -> None:
    base = FIXTURE if tied else save_llama(tmp_path / "base", kv_heads=2, tied=False, vocab=512)
    lora = LoraConfig(r=4, alpha=8.0) if tied else LoraConfig(r=3, alpha=7.0)
    case = make_case(base, lora)
    made = some_examples(case, "stream") if tied else some_examples(case, "instruct")
    model = in_peft(case, tmp_path / "adapter")
    total = torch.zeros(())
    for e in made:
        logits = model(torch.tensor(e.tokens[None]).long()).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits[torch.tensor(e.target_positions).long()], torch.tensor(e.labels).long(), reduction="none"
        )
        total = total + (losses * torch.tensor(e.weights)).sum()
    total.backward()
    loss, gradient = loss_and_gradient(split(case), packed_rows(made))
    np.testing.assert_allclose(loss, total.item(), rtol=1e-5)
    assert_close(gradient, torch_gradients(model), 1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("size", [1, 5, 12, 13])
def test_chunks_equal_the_whole(parts: Parts, size: int, method: str) -> None:
    """Two rows of thirteen targets in chunks of `size`, against the gradients of what numpy computes, by JAX."""
    width, decoder = 512 + len(ITEMS), parts.case.decoder
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (2, 13, 64))
    labels = jnp.asarray([*range(9), *decoder.head.row_ids], jnp.int32)[jax.random.randint(keys[1], (2, 13), 0, 9 + len(ITEMS))]
    weights = jax.random.uniform(keys[2], (2, 13)).at[:, 3].set(0.0).at[:, 10:].set(0.0)
    graphdef, trained, frozen = nnx.split(decoder, trainable_filter(method), ...)

    def ours(trained: nnx.State, hidden: jax.Array) -> jax.Array:
        return weighted_cross_entropy(nnx.merge(graphdef, trained, frozen), hidden, labels, weights, 2 * size * width)

    def plain(trained: nnx.State, hidden: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, trained, frozen).logits(hidden)
        own = jax.nn.one_hot(decoder.head.column_of()[labels], width) > 0
        return -(weights * jnp.where(own, jax.nn.log_softmax(logits), 0.0).sum(-1)).sum()

    value, found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(trained, hidden)
    whole, expected = jax.value_and_grad(plain, argnums=(0, 1))(trained, hidden)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * max(1.0, float(jnp.abs(other).max())))
    assert not found[1][:, 3].any() and found[1][:, 4].any()
    logits = np.asarray(decoder.logits(hidden), np.float64)
    own = np.take_along_axis(logits, np.asarray(decoder.head.column_of()[labels])[..., None], -1)[..., 0]
    np.testing.assert_allclose(whole, ((np.log(np.exp(logits).sum(-1)) - own) * np.asarray(weights)).sum(), rtol=1e-6)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(ours)(trained, hidden), whole, rtol=1e-6)  # no gradient asked for


def with_flags(parts: Parts, **flags: object) -> Parts:
    """The same variables in a decoder with other static attributes."""
    decoder = nnx.clone(parts.case.decoder)
    for name, value in flags.items():
        setattr(decoder, name, value)
    return split(dataclasses.replace(parts.case, decoder=decoder))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(parts: Parts, remat: str) -> None:
    batch = packed_rows(some_examples(parts.case, "stream"))
    assert parts.case.decoder.remat == "none"
    loss, gradient = loss_and_gradient(parts, batch)
    kept_loss, kept_gradient = loss_and_gradient(with_flags(parts, remat=remat), batch)
    np.testing.assert_allclose(loss, kept_loss, rtol=1e-6)
    assert_close(gradient, kept_gradient)  # what is computed again is fused, and so rounded, in another way


def test_bfloat16_is_near_and_adapters_stay_float32(parts: Parts) -> None:
    """Bounds: bfloat16 rounds by up to 2^-9 of a value. About 12 roundings in each of 5 layers add up like a random walk to
    8 x 2^-9 = 1.5 % of a logit, and a target's loss moves by no more than twice the largest of these; gradients pass through
    the same roundings forward and back, and 10 % is three times the 3 % so estimated."""
    batch = packed_rows(some_examples(parts.case, "stream"))
    exact, gradient = loss_and_gradient(parts, batch)
    half, rounded = loss_and_gradient(with_flags(parts, dtype=jnp.dtype(jnp.bfloat16)), batch)
    decoder = parts.case.decoder
    largest = float(jax.jit(lambda b: jnp.abs(decoder.logits(decoder.packed_hidden(b))).max())(batch))
    assert 0 < abs(half - exact) < 2 * 0.015 * largest * float(batch.weights.sum())
    for name, value in gradient.items():
        assert rounded[name].dtype == np.float32
        assert np.linalg.norm(rounded[name] - value) < 0.1 * np.linalg.norm(value), name


def test_padding_and_unused_targets_count_for_nothing(parts: Parts) -> None:
    batch = packed_rows(some_examples(parts.case, "stream"))
    loss, gradient = loss_and_gradient(parts, batch)
    other = dataclasses.replace(
        batch, tokens=np.where(batch.segments > 0, batch.tokens, 7), labels=np.where(batch.weights > 0, batch.labels, 9)
    )
    again, same = loss_and_gradient(parts, other)
    assert loss == again
    for name, value in gradient.items():
        np.testing.assert_array_equal(same[name], value)
