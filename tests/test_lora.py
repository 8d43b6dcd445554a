"""Our LoRA against PEFT: forward pass, initialisation, dropout, names."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import ITEMS, Case, by_token, largest_difference, make_case, packed, prompts, save_llama
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sftrec_jax.config import LoraConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.adapters import PROJECTIONS, AdapterSpec, adapter_spec
from sftrec_jax.model.cards import CardInfo
from sftrec_jax.model.hf_config import read_architecture
from sftrec_jax.model.lora import Linear
from sftrec_jax.model.merge import arrays_of
from sftrec_jax.model.peft_write import export_adapter

# peft 0.21 asks transformers 5.23 for a name that it renamed; this can go once peft asks for the new one.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CARD = CardInfo("test", "base", "data", "command")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base"), kv_heads=2, tied=True, vocab=512)


def in_peft(case: Case, folder: Path) -> PeftModel:
    export_adapter(case.decoder, case.build, case.codes, case.tokenizer, str(case.base), folder, CARD)
    model = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    if len(case.codes.new_tokens):
        model.resize_token_embeddings(512 + len(ITEMS), mean_resizing=False)
    return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize(
    ("targets", "r", "alpha", "atomic"),
    [(("q_proj", "v_proj"), 4, 8.0, False), (("down_proj",), 3, 2.5, False), ("all-linear", 2, 16.0, True)],
)
def test_forward_equals_peft(
    base: Path, tmp_path: Path, targets: str | tuple[str, ...], r: int, alpha: float, atomic: bool
) -> None:
    case = make_case(base, LoraConfig(r=r, alpha=alpha, dropout=0.3, targets=targets), atomic=atomic)
    model = in_peft(case, tmp_path / "adapter")
    difference = largest_difference(case, model)
    print(f"largest logit difference to peft {difference:.2e}")
    assert difference < 1e-4
    with model.disable_adapter():
        assert largest_difference(case, model) > 0.1  # the adapter does something


def test_adapter_starts_as_in_peft_and_changes_nothing(base: Path) -> None:
    plain = make_case(base, None, atomic=False, trained=False)
    case = make_case(base, LoraConfig(r=32, dropout=0.2), atomic=False, trained=False)
    batch = packed(prompts(plain), 24)
    np.testing.assert_array_equal(by_token(plain.decoder, batch), by_token(case.decoder, batch))
    reference = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PeftConfig(r=32, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    )
    theirs = {n: p for n, p in reference.named_parameters() if ".layers.0." in n and "lora_A" in n}
    arrays = arrays_of(case.decoder)
    seen = []
    for name in PROJECTIONS:
        a = np.asarray(arrays[f"layers/{name}/lora_a"])
        bound = a.shape[1] ** -0.5
        (other,) = (p.detach().numpy() for n, p in theirs.items() if name in n)
        for drawn in (a, other):
            # Of 1,500 or more uniform draws the largest lies within 1 % of the bound but for one case in 4 million.
            assert 0.99 * bound < np.abs(drawn).max() <= bound
            assert abs(drawn.mean()) < 5 * bound / (3 * drawn.size) ** 0.5
        assert abs(a.std() / (bound / 3**0.5) - 1) < 0.06
        assert not np.asarray(arrays[f"layers/{name}/lora_b"]).any()
        seen += [layer.ravel()[:20].tobytes() for layer in a]
    assert len(set(seen)) == len(seen)  # no two matrices alike


@pytest.mark.parametrize("targets", [("q_proj", "query"), "q", ()])
def test_unmatched_target_is_an_error(base: Path, targets: str | tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"lora\.targets: .*q_proj"):
        adapter_spec(LoraConfig(targets=targets), read_architecture(base))


def test_dropout_is_unbiased_and_off_without_a_key() -> None:
    def one_layer(dropout: float) -> Linear:
        linear = Linear("q_proj", 1, 24, 16, AdapterSpec(4, 8.0, dropout, ("q_proj",)), jax.random.key(0))
        graphdef, state = nnx.split(linear)
        linear = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], state))
        linear.lora_b[...] = jax.random.normal(jax.random.key(1), (4, 16))
        return linear

    x = jax.random.normal(jax.random.key(2), (2, 3, 24))
    dropping, keeping = one_layer(0.4), one_layer(0.0)
    exact = keeping(x)
    np.testing.assert_array_equal(dropping(x, None), exact)
    np.testing.assert_array_equal(keeping(x, jax.random.key(3)), exact)
    repeated = jnp.broadcast_to(x, (4000, *x.shape)).reshape(-1, 3, 24)  # every copy gets a mask of its own
    draws = dropping(repeated, jax.random.key(4)).reshape(4000, 2, 3, 16)
    error = jnp.abs(draws.mean(0) - exact) / (draws.std(0) / 4000**0.5)
    assert float(error.max()) < 5  # standard errors, 96 outputs
    assert float(draws.std(0).min()) > 0.01
