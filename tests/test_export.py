"""Exports, verified by those who read them: transformers and peft on torch."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import FIXTURE, Case, greedy, largest_difference, make_case, python_block, save_llama, source_of
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sftrec_jax.config import LoraConfig
from sftrec_jax.errors import UserError
from sftrec_jax.model.cards import CardInfo
from sftrec_jax.model.export import ExportReport, export_merged
from sftrec_jax.model.export_files import plan_shards
from sftrec_jax.model.load import source_architecture
from sftrec_jax.model.peft_write import export_adapter

# peft 0.21 asks transformers 5.23 for a name that it renamed; this can go once peft asks for the new one.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METRICS = {"model": {"recall@10": 0.0651, "ndcg@10": 0.03, "recall@10_unmasked": 0.01}, "popularity": {"recall@10": 0.04}}
CARD = CardInfo("tiny: a test", "tiny", "MovieLens: 610 users.", "sftrec run configs/quick.yaml", METRICS)
LORA = LoraConfig(r=3, alpha=5.0, targets=("q_proj", "o_proj", "down_proj"))

# kv_heads, tied, base vocabulary (the tokenizer has 512 tokens, then come 7 item tokens), ids without a row before them
CASES = {
    "past the table, tied": (1, True, 512, 0),
    "inside a padded table, untied": (2, False, 600, 0),
    "part inside, after a gap, tied": (4, True, 515, 1),
    "gap past the table, untied": (2, False, 512, 5),
}


def case_of(name: str, folder: Path) -> Case:
    kv_heads, tied, vocab, skip = CASES[name]
    return make_case(save_llama(folder / "base", kv_heads, tied, vocab), LORA, skip_ids=skip)


def merged(case: Case, out: Path, **options: Any) -> ExportReport:
    return export_merged(case.decoder, case.build, case.codes, case.tokenizer, out, CARD, **options)


def adapter(case: Case, out: Path, **options: Any) -> ExportReport:
    return export_adapter(case.decoder, case.build, case.codes, case.tokenizer, str(case.base), out, CARD, **options)


def run_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the lines of README.md in the folder and returns the names they define."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(python_block(folder / "README.md"), names)
    return names


def check(case: Case, model: Any, tokenizer: Any) -> float:
    """Logits, then greedy text from a prompt of text and items."""
    difference = largest_difference(case, model)
    assert difference < 1e-4
    prompt = tokenizer("Once upon" + "".join(case.codes.new_tokens[:3]), return_tensors="pt")
    ids = prompt["input_ids"][0].tolist()
    assert set(case.codes.new_token_ids[:3].tolist()) <= set(ids)
    theirs = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(ids) :]
    assert tokenizer.decode(theirs) == case.tokenizer.decode(greedy(case, ids))
    return difference


@pytest.mark.parametrize("name", CASES)
def test_merged_and_adapter_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(name, tmp_path)
    size = max(case.build.arch.vocab_size, int(case.codes.new_token_ids.max()) + 1)
    limit = 60_000 if case.build.arch.tied else 10**9
    report = merged(case, tmp_path / "out", max_shard_bytes=limit)
    names = run_readme(report.folder, monkeypatch)
    model, tokenizer = names["model"], names["tokenizer"]
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == report.vocab_size == size
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == case.build.arch.tied == model.config.tie_word_embeddings
    assert (len(list(report.folder.glob("*.safetensors"))) > 1) == (limit < 10**9)
    first = check(case, model, tokenizer)
    assert report.merge_change == report.round_change and report.merge_change is not None and report.merge_change < 1e-4

    written = adapter(case, tmp_path / "out" / "adapter")
    names = run_readme(written.folder, monkeypatch)
    text = (written.folder / "README.md").read_text()
    assert ("resize_token_embeddings" in text) == (size > case.build.arch.vocab_size)
    assert names["BASE"] == str(case.base)
    second = check(case, names["model"], names["tokenizer"])
    print(f"{name}: merged {first:.1e}, adapter {second:.1e}")
    # Ids that nobody trained are the same in both forms, and never the most likely.
    with torch.no_grad():
        tokens = torch.tensor([[5, 9, int(case.codes.new_token_ids[0])]])
        one, other = model(tokens).logits, names["model"](tokens).logits
    assert torch.allclose(one, other, atol=1e-4)
    gap = [i for i in range(case.build.arch.vocab_size, size) if i not in case.codes.new_token_ids]
    assert (one[..., gap] < one.max(-1, keepdim=True).values).all()
    assert (len(gap) > 0) == ("gap past" in name)


def test_pretrained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(FIXTURE, LORA)
    names = run_readme(merged(case, tmp_path / "merged").folder, monkeypatch)
    one = check(case, names["model"], names["tokenizer"])
    names = run_readme(adapter(case, tmp_path / "adapter").folder, monkeypatch)
    print(f"stories260K: merged {one:.1e}, adapter {check(case, names['model'], names['tokenizer']):.1e}")


@pytest.mark.parametrize("limit", [10**9, 30_000])
def test_untrained_base_comes_back_bit_for_bit(tmp_path: Path, limit: int) -> None:
    """Square matrices too (q and o are 64 x 64): a transposed view written by mistake would show here."""
    case = make_case(FIXTURE, None, atomic=False, trained=False)
    out = merged(case, tmp_path / "out", max_shard_bytes=limit).folder
    files = sorted(out.glob("*.safetensors"))
    got = {k: v for file in files for k, v in load_numpy(file).items()}
    expected = load_numpy(FIXTURE / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
        assert got[name].dtype == np.float32
    index = out / "model.safetensors.index.json"
    assert index.exists() == (limit == 30_000) == (len(files) > 1)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(v.nbytes for v in expected.values())
        assert all(name in load_numpy(out / content["weight_map"][name]) for name in expected)
    before, after = (replace(source_architecture(source_of(f)), raw="") for f in (FIXTURE, out))
    assert before == after


@pytest.mark.parametrize("name", ["past the table, tied", "gap past the table, untied"])
def test_bfloat16_is_the_merged_float32_rounded_once(name: str, tmp_path: Path) -> None:
    case = case_of(name, tmp_path)
    wide = load_file(merged(case, tmp_path / "wide").folder / "model.safetensors")
    report = merged(case, tmp_path / "narrow", dtype="bfloat16")
    narrow = load_file(report.folder / "model.safetensors")
    assert wide.keys() == narrow.keys()
    for key, value in wide.items():
        assert narrow[key].dtype == torch.bfloat16
        assert torch.equal(value.to(torch.bfloat16), narrow[key]), key
    assert AutoModelForCausalLM.from_pretrained(report.folder).dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: each weight is off by 2^-9 at most, of its own size; ten products lie between input and logit.
    difference = largest_difference(case, AutoModelForCausalLM.from_pretrained(report.folder, dtype=torch.float32))
    assert report.round_change is not None and report.merge_change is not None and report.largest_logit is not None
    assert report.merge_change < 1e-4 < report.round_change < 10 * 2**-8 * report.largest_logit
    assert difference < 10 * 2**-8 * report.largest_logit
    assert f"{report.round_change:.1e}" in (report.folder / "README.md").read_text()


def test_full_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(save_llama(tmp_path / "base", 2, False, 512), None)
    names = run_readme(merged(case, tmp_path / "out").folder, monkeypatch)
    check(case, names["model"], names["tokenizer"])
    with pytest.raises(UserError, match=r"only train\.method: lora makes one"):
        adapter(case, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("layout", ["old", "new"])
def test_config_loses_nothing(layout: str, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", 2, True, 512)
    config = json.loads((base / "config.json").read_text())
    config.pop("rope_parameters")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    if layout == "old":
        config |= {"rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
        config.pop("dtype")
    else:
        config |= {"rope_parameters": {"rope_theta": 5e5, **scaling}}
    config |= {"note_of_the_maker": [1, {"a": None}], "eos_token_id": [2, 7]}
    (base / "config.json").write_text(json.dumps(config))
    case = make_case(base, LORA)
    out = merged(case, tmp_path / "out").folder
    got = json.loads((out / "config.json").read_text())
    changed = {"vocab_size": 519, "dtype": "float32", "torch_dtype": "float32"}
    assert got == {**config, **changed, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"do_sample": False, "bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 7]
    check(case, AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out))


def test_cards(tmp_path: Path) -> None:
    case = make_case(FIXTURE, LORA)
    for folder, tags in ((merged(case, tmp_path / "m").folder, 3), (adapter(case, tmp_path / "a").folder, 4)):
        text = (folder / "README.md").read_text()
        front = yaml.safe_load(text.split("---\n")[1])
        assert front["base_model"] == "tiny" and front["license"] == "other" and len(front["tags"]) == tags
        for expected in ("# tiny: a test", "610 users", "sftrec run configs/quick.yaml", "jax ", "| model | 0.0651 | 0.0300 |"):
            assert expected in text
        assert "| popularity | 0.0400 |  |" in text and "unmasked" not in text


def test_existing_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(FIXTURE, LORA)
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)  # empty: taken
    for write in (merged, adapter):
        write(case, out, overwrite=True)
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        with pytest.raises(UserError, match="not empty") as caught:
            write(case, out)
        assert "\n" not in str(caught.value)
        monkeypatch.setattr("sftrec_jax.model.export_files.save_file", full_disk)
        with pytest.raises(UserError, match="cannot be written") as caught:
            write(case, out, overwrite=True)
        monkeypatch.undo()
        assert "\n" not in str(caught.value)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before  # a failure leaves the old export whole
        write(case, out, overwrite=True)
        assert [p.name for p in out.parent.iterdir()] == ["out"]  # and nothing beside it
    assert not (out / "config.json").exists()  # the merged model was replaced as a whole
    readable = {p.stat().st_mode & 0o777 for p in out.iterdir()}
    assert readable == {(out / "README.md").stat().st_mode & 0o777}
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        merged(case, out, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        merged(case, out / "thesis.tex")


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, os.strerror(28))


def test_wrong_arguments(tmp_path: Path) -> None:
    case = make_case(FIXTURE, LORA)
    with pytest.raises(UserError, match="float16"):
        merged(case, tmp_path / "out", dtype="float16")
    case.tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    with pytest.raises(UserError, match="tokenizer of the run"):
        merged(case, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_shards_hold_every_tensor_once_in_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = {str(n): int(s) for n, s in enumerate(rng.integers(1, 50, rng.integers(1, 20)))}
        shards = plan_shards(sizes, 40)
        assert [n for shard in shards for n in shard] == list(sizes)
        assert all(len(shard) == 1 or sum(sizes[n] for n in shard) <= 40 for shard in shards)
        assert all(shards)
