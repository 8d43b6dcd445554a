"""Every kind of adapter against PEFT on torch, both ways: written here and read there, trained there and gone on with here."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from family_models import save_family
from flax import nnx
from helpers import Case, by_token, largest_difference, make_case, packed, prompts, save_llama, source_of
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tiny_run import trained, write_inputs
from transformers import AutoModelForCausalLM

from sftrec_jax.cli import main
from sftrec_jax.config import LoraConfig, MeshConfig, ModelConfig, TrainConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.adapters import PROJECTIONS, adapter_spec
from sftrec_jax.model.cards import CardInfo
from sftrec_jax.model.export import export_merged
from sftrec_jax.model.hf_config import read_architecture
from sftrec_jax.model.load import TRAINABLE, load_decoder, make_build, trainable_filter
from sftrec_jax.model.merge import arrays_of
from sftrec_jax.model.mesh import make_mesh
from sftrec_jax.model.peft_write import export_adapter
from sftrec_jax.model.sharding import named_arrays, with_arrays
from sftrec_jax.train.optimizer import make_optimizer

# peft 0.21 asks transformers 5.23 for a name that it renamed; this can go once peft asks for the new one.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:.*PiSSA.*")

CARD = CardInfo("test", "base", "data", "command")
ATTENTION = ("q_proj", "v_proj", "o_proj")

# name -> our config, PEFT's
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "regex": (
        {"targets": r"model\.layers\.[02]\.(self_attn\.k_proj|mlp\..*_proj)"},
        {"target_modules": r"model\.layers\.[02]\.(self_attn\.k_proj|mlp\..*_proj)"},
    ),
    "layers": ({"layers_to_transform": (1, 2)}, {"layers_to_transform": [1, 2]}),
    "patterns": (
        {"rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 1}, "alpha_pattern": {r".*\.2\..*": 9.0, "down_proj": 1.5}},
        {"rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 1}, "alpha_pattern": {r".*\.2\..*": 9.0, "down_proj": 1.5}},
    ),
    "all at once": (
        {"use_rslora": True, "use_dora": True, "layers_to_transform": (0, 2), "rank_pattern": {"layers.2.self_attn.q_proj": 6}},
        {"use_rslora": True, "use_dora": True, "layers_to_transform": [0, 2], "rank_pattern": {"layers.2.self_attn.q_proj": 6}},
    ),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "pissa with all": (
        {"init": "pissa", "use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 5}},
        {"init_lora_weights": "pissa", "use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 5}},
    ),
}

OFTEN = ("plain", "dora", "all at once", "pissa")
SOME = [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


def config_of(kind: str, **more: Any) -> LoraConfig:
    ours = KINDS[kind][0]
    targets = ours.get("targets", ATTENTION if kind != "patterns" and kind != "pissa" else "all-linear")
    return LoraConfig(**{"r": 3, "alpha": 5.0, **ours, "targets": targets, **more})


def peft_of(kind: str) -> PeftConfig:
    theirs = {"target_modules": list(ATTENTION if kind not in ("patterns", "pissa") else PROJECTIONS), **KINDS[kind][1]}
    return PeftConfig(r=3, lora_alpha=5.0, task_type="CAUSAL_LM", **theirs)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("base"), kv_heads=2, tied=True, vocab=512, num_hidden_layers=3)


def torch_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", SOME)
def test_written_here_and_read_by_peft(kind: str, base: Path, tmp_path: Path) -> None:
    case = make_case(base, config_of(kind), atomic=False)
    folder = tmp_path / "adapter"
    export_adapter(case.decoder, case.build, case.codes, case.tokenizer, str(base), folder, CARD)
    model = PeftModel.from_pretrained(torch_base(base), folder).eval()
    assert largest_difference(case, model) < 1e-4
    with model.disable_adapter():
        assert largest_difference(case, model) > 0.05  # the adapter does something
    report = export_merged(case.decoder, case.build, case.codes, case.tokenizer, tmp_path / "merged", CARD)
    print(f"{kind}: merging changes logits by {report.merge_change:.1e}")
    assert largest_difference(case, torch_base(tmp_path / "merged").eval()) < 1e-4


@pytest.mark.parametrize("kind", SOME)
def test_trained_by_peft_and_gone_on_with_here(kind: str, base: Path, tmp_path: Path) -> None:
    """Logits after a step of PEFT; then gradients of the same loss, so that the next step is the same too."""
    torch.manual_seed(3)
    model = get_peft_model(torch_base(base), peft_of(kind))
    tokens = np.random.default_rng(0).integers(3, 512, (2, 12)).astype(np.int32)
    direction = np.random.default_rng(1).normal(size=(2, 12, 512)).astype(np.float32)

    def loss_of_torch() -> torch.Tensor:
        return (model(torch.tensor(tokens).long()).logits * torch.tensor(direction)).sum()

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    loss_of_torch().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(1e-3 * parameter.grad)
                parameter.grad = None
    model.save_pretrained(tmp_path)
    case = make_case(base, LoraConfig(start=str(tmp_path)), atomic=False, trained=False)
    # Two float32 decompositions differ: PEFT's base under a PiSSA adapter is not ours to 1e-5 of a weight.
    loose = 10 if "pissa" in kind else 1
    assert largest_difference(case, model.eval()) < 1e-4 * loose

    loss_of_torch().backward()
    graphdef, trained, frozen = nnx.split(case.decoder, TRAINABLE, ...)
    batch = jax.tree.map(jnp.asarray, packed([[row] for row in tokens], 12))

    def loss(arrays: dict[str, jax.Array]) -> jax.Array:
        decoder = nnx.merge(graphdef, with_arrays(trained, arrays), frozen)
        return jnp.sum(decoder.logits(decoder.packed_hidden(batch)) * direction)

    gradients = jax.jit(jax.grad(loss))(named_arrays(trained))
    wanted = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "lora_magnitude"}
    compared = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = next(part for part in wanted if part in name)
        layer, projection = int(name.split("layers.")[1].split(".")[0]), next(p for p in PROJECTIONS if p in name)
        theirs = parameter.grad.numpy().T
        ours = np.asarray(gradients[f"layers/{projection}/{wanted[part]}"][layer])
        ours = ours[:, : theirs.shape[1]] if part == "lora_A" else ours[: theirs.shape[0]] if part == "lora_B" else ours
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * loose * np.abs(theirs).max())
        compared += 1
    assert compared >= 6
    # Beyond the rank of a layer nothing moves.
    for target in case.build.adapters.targets if case.build.adapters else ():
        for layer, rank in enumerate(case.build.adapters.layer_ranks(target, 3)):
            assert not np.asarray(gradients[f"layers/{target}/lora_a"][layer, :, rank:]).any()
            assert not np.asarray(gradients[f"layers/{target}/lora_b"][layer, rank:]).any()
            if not rank and case.build.adapters.dora:
                assert not np.asarray(gradients[f"layers/{target}/lora_magnitude"][layer]).any()


@pytest.mark.parametrize("kind", ["dora", "pissa", "all at once"])
def test_begins_where_the_base_is(kind: str, base: Path) -> None:
    plain = make_case(base, None, atomic=False, trained=False)
    case = make_case(base, config_of(kind), atomic=False, trained=False)
    batch = packed(prompts(plain), 24)
    np.testing.assert_allclose(by_token(case.decoder, batch), by_token(plain.decoder, batch), atol=1e-4)


def test_pissa_takes_the_principal_part_as_peft_does(base: Path) -> None:
    model = get_peft_model(torch_base(base), peft_of("pissa"))
    arrays = arrays_of(make_case(base, config_of("pissa"), atomic=False, trained=False).decoder)
    modules = dict(model.named_modules())
    for layer in range(3):
        theirs = modules[f"base_model.model.model.layers.{layer}.mlp.up_proj"]
        product = (theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight).detach().numpy().T
        a, b = (np.asarray(arrays[f"layers/up_proj/lora_{x}"][layer]) for x in "ab")
        np.testing.assert_allclose(a @ b, product, atol=1e-5)
        np.testing.assert_allclose(arrays["layers/up_proj/kernel"][layer], theirs.base_layer.weight.detach().numpy().T, atol=5e-5)


@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_families_with_biases_and_windows(kind: str, tmp_path: Path) -> None:
    for name in ("qwen2", "gemma2"):
        save_family(name, tmp_path / name, 512)
        case = make_case(tmp_path / name, config_of(kind), atomic=False)
        folder = tmp_path / f"{name}-adapter"
        export_adapter(case.decoder, case.build, case.codes, case.tokenizer, str(case.base), folder, CARD)
        assert largest_difference(case, PeftModel.from_pretrained(torch_base(case.base), folder).eval()) < 1e-4


def test_tokens_of_the_same_name_go_on(base: Path, tmp_path: Path) -> None:
    """Rows of an earlier run's items, by the name of their token; others begin as ever."""
    first = make_case(base, config_of("plain"))
    export_adapter(first.decoder, first.build, first.codes, first.tokenizer, str(base), tmp_path, CARD)
    fresh = make_case(base, config_of("plain"), skip_ids=3, trained=False)  # the same items under other ids
    second = make_case(base, LoraConfig(start=str(tmp_path)), skip_ids=3, trained=False)
    rows = [np.asarray(arrays_of(case.decoder)["embed_tokens/rows"]) for case in (first, second, fresh)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert np.abs(rows[0] - rows[2]).max() > 0.1


def test_lora_plus_steps_as_peft_does() -> None:
    """Two AdamW steps on the same gradients."""
    rng = np.random.default_rng(0)
    names = {"layers/q_proj/lora_a": (6, 4), "layers/q_proj/lora_b": (4, 6), "layers/q_proj/lora_magnitude": (6,)}
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    steps = [{name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()} for _ in range(2)]
    config = TrainConfig(
        learning_rate=1e-3, loraplus_lr_ratio=16.0, weight_decay=0.1, warmup_fraction=0.0, final_fraction=1.0, clip_norm=0.0
    )
    optimizer = make_optimizer(config, 10)
    ours: Any = {name: jnp.asarray(value) for name, value in start.items()}
    state = optimizer.init(ours)
    model = torch.nn.Module()
    layer = torch.nn.Module()
    model.add_module("layer", layer)
    theirs = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_magnitude": "bias"}  # that never decays there
    for name, value in start.items():
        held = torch.nn.Module()
        held.weight = torch.nn.Parameter(torch.tensor(value))
        layer.add_module(theirs[name.rsplit("/", 1)[1]], held)
    other = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8
    )
    for gradients in steps:
        updates, state = optimizer.update({k: jnp.asarray(v) for k, v in gradients.items()}, state, ours)
        ours = {name: value + updates[name] for name, value in ours.items()}
        for name, value in gradients.items():
            layer.get_submodule(theirs[name.rsplit("/", 1)[1]]).weight.grad = torch.tensor(value)
        other.step()
    for name, value in ours.items():
        held = layer.get_submodule(theirs[name.rsplit("/", 1)[1]])
        np.testing.assert_allclose(value, held.weight.detach().numpy(), atol=2e-6)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"targets": ("q_prj",)}, "q_prj.*nearest is q_proj"),
    "regex": ({"targets": "q_proj["}, "regular expression"),
    "nothing": ({"targets": ()}, "empty.*all-linear"),
    "rank": ({"rank_pattern": {"w_proj": 4}}, "rank_pattern.*w_proj.*nearest"),
    "alpha": ({"targets": ("q_proj",), "alpha_pattern": {"v_proj": 4.0}}, "alpha_pattern.*v_proj"),
    "layer": ({"layers_to_transform": (0, 3)}, "layers_to_transform: 3.*0 to 2"),
    "folder": ({"start": "/nowhere"}, "start.*/nowhere.*adapter_config.json"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_matches_nothing_costs_one_line(name: str, base: Path) -> None:
    options, expected = WRONG[name]
    with pytest.raises(UserError, match=expected) as error:
        make_case(base, LoraConfig(**options), atomic=False)
    assert "\n" not in str(error.value)


def test_an_adapter_to_start_from_decides_its_sizes(base: Path, tmp_path: Path) -> None:
    get_peft_model(torch_base(base), peft_of("rslora")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lora\.r is 8, but the adapter .* has 3; leave lora.r out"):
        make_case(base, LoraConfig(r=8, start=str(tmp_path)), atomic=False)
    case = make_case(base, LoraConfig(dropout=0.1, start=str(tmp_path)), atomic=False)
    assert case.build.adapters == adapter_spec(config_of("rslora", dropout=0.1), case.build.arch)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged safetensors"):
        make_case(base, LoraConfig(start=str(tmp_path)), atomic=False)


def test_a_run_goes_on_from_an_earlier_one(tmp_path: Path) -> None:
    """One line of the config; the run keeps what it starts from, so that it is evaluated without the earlier one."""
    earlier = shutil.copytree(trained() / "export", tmp_path / "earlier" / "export").parent
    config, out = write_inputs(tmp_path), tmp_path / "run"
    still = ["--train.max-steps", "1", "--train.learning-rate", "1e-9", "--train.rows-learning-rate", "1e-9"]
    assert main(["run", str(config), "--out", str(out), "--lora.start", str(earlier), *still]) == 0
    shutil.rmtree(earlier)
    assert main(["evaluate", str(out)]) == 0
    before, after = (json.loads((run / "metrics.json").read_text())["model"] for run in (trained(), out))
    assert after["ndcg@10"] == pytest.approx(before["ndcg@10"], abs=1e-6) and after["mrr"] == pytest.approx(before["mrr"])


# name -> options, PEFT's config, whether the base's head is tied
WHOLE: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "table, tied": (
        {"modules_to_save": ("embed_tokens",)},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "table and head": ({"modules_to_save": ("embed_tokens", "lm_head")}, {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "head": ({"modules_to_save": ("lm_head",)}, {"modules_to_save": ["lm_head"]}, False),
    "norms": (
        {"modules_to_save": ("input_layernorm", "model.norm")},
        {"modules_to_save": ["input_layernorm", "model.norm"]},
        True,
    ),
    "tokens, tied": ({"trainable_token_indices": (7, 3, 300)}, {"trainable_token_indices": [3, 7, 300]}, True),
    "tokens, untied": (
        {"trainable_token_indices": (7, 300)},
        {"trainable_token_indices": {"embed_tokens": [7, 300], "lm_head": [7, 300]}},
        False,
    ),
}


def moved(case: Case) -> Case:
    """With every trained parameter moved."""
    graphdef, trained, frozen = nnx.split(case.decoder, trainable_filter("lora", case.build.whole), ...)
    rng = np.random.default_rng(5)
    arrays = {name: value + rng.normal(0, 0.1, value.shape).astype(np.float32) for name, value in named_arrays(trained).items()}
    return dataclasses.replace(case, decoder=nnx.merge(graphdef, with_arrays(trained, arrays), frozen))


@pytest.mark.parametrize("atomic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "new tokens"])
@pytest.mark.parametrize("name", WHOLE)
def test_modules_and_tokens_of_the_base(name: str, atomic: bool, tmp_path: Path) -> None:
    """Trained as a whole here, read by PEFT; and with PEFT's own, read here."""
    ours, theirs, tied = WHOLE[name]
    base = save_llama(tmp_path / "base", kv_heads=2, tied=tied, vocab=512)
    case = moved(make_case(base, LoraConfig(r=2, targets=("q_proj",), **ours), atomic=atomic, trained=False))
    folder = tmp_path / "adapter"
    export_adapter(case.decoder, case.build, case.codes, case.tokenizer, str(base), folder, CARD)
    model = torch_base(base)
    if atomic:
        model.resize_token_embeddings(519, mean_resizing=False)
    assert largest_difference(case, PeftModel.from_pretrained(model, folder).eval()) < 1e-4
    export_merged(case.decoder, case.build, case.codes, case.tokenizer, tmp_path / "merged", CARD)
    assert largest_difference(case, torch_base(tmp_path / "merged").eval()) < 1e-4
    if atomic:
        return
    options = {key: value for key, value in ours.items() if "token" in key}
    again = make_case(base, LoraConfig(start=str(folder), **options), atomic=False, trained=False)
    np.testing.assert_array_equal(*(by_token(c.decoder, packed(prompts(case), 32)) for c in (case, again)))

    other = get_peft_model(torch_base(base), PeftConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **theirs))
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    other.save_pretrained(tmp_path / "theirs")
    read = make_case(base, LoraConfig(start=str(tmp_path / "theirs"), **options), atomic=False, trained=False)
    assert largest_difference(read, other.eval()) < 1e-4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"modules_to_save": ("lm_head",)}, "lm_head.*token table; use embed_tokens"),
        ({"modules_to_save": ("up_proj",)}, "up_proj.*none of embed_tokens, input_layernorm.*lora.targets"),
        ({"trainable_token_indices": (512,)}, "512; the base has tokens 0 to 511"),
    ],
)
def test_modules_that_cannot_be_saved_cost_one_line(options: dict[str, Any], expected: str, base: Path) -> None:
    with pytest.raises(UserError, match=expected):
        make_case(base, LoraConfig(**options), atomic=False)


def test_embeddings_alone_are_trained(base: Path) -> None:
    """The table moves, nothing else; where the head is not tied, it too."""
    for tied in (True, False):
        folder = save_llama(base.parent / f"tied-{tied}", 2, tied, 512)
        codes, arch = make_case(folder, None, atomic=False, trained=False).codes, read_architecture(folder)
        build = make_build(ModelConfig(compute_dtype="bfloat16"), LoraConfig(), TrainConfig(method="embeddings"), arch, codes)
        decoder = load_decoder(build, source_of(folder), codes, make_mesh(MeshConfig(), jax.devices()[:1]), 0, False)
        _, trained, _ = nnx.split(decoder, trainable_filter("embeddings", build.whole), ...)
        names = named_arrays(trained)
        assert set(names) == ({"embed_tokens/weight"} if tied else {"embed_tokens/weight", "lm_head/weight"})
        assert all(value.dtype == jnp.float32 for value in names.values())
        assert arrays_of(decoder)["layers/q_proj/kernel"].dtype == jnp.bfloat16
