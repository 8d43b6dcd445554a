"""Readers of outside files against hostile input: a share of `hostile.py` by default, a thousand inputs each in slow tests."""

import gzip
import re
import subprocess
import sys
import time
from pathlib import Path

import hostile
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hostile_readers import READERS

from sftrec_jax.config_file import load_config
from sftrec_jax.data import delimited, json_files, textfile
from sftrec_jax.data.arrow_files import _rows_at_once, read_parquet
from sftrec_jax.data.delimited import read_delimited
from sftrec_jax.data.readers import read_table
from sftrec_jax.data.table import Column
from sftrec_jax.data.templates import PromptTemplate
from sftrec_jax.data.textfile import _last_break, read_utf8
from sftrec_jax.errors import LONGEST, UserError
from sftrec_jax.items.titles import TitleIndex
from sftrec_jax.model.hub import _snapshot
from sftrec_jax.model.tensor_files import open_tensors
from sftrec_jax.safe_yaml import load_yaml

ROOT = Path(__file__).parent.parent
ITEM = [Column("item", "item_id", "data.item_column")]


def fed(reader: str, count: int, seed: int) -> None:
    outcome = hostile.feed(reader, count, seed)
    assert outcome.crashes == []
    assert outcome.inputs == count == outcome.refused + outcome.accepted
    assert outcome.refused and outcome.accepted, outcome  # some of each, or it says nothing


@pytest.mark.parametrize("reader", READERS)
def test_some_hostile_inputs(reader: str) -> None:
    fed(reader, 60, 1)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_a_thousand_hostile_inputs(reader: str) -> None:
    fed(reader, 1_000, 2)


def test_crashes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The net itself: exceptions, messages of two lines and files that an input made count as crashes."""

    def read_badly(rng: object, folder: Path, given: int) -> None:
        if given == 0:
            raise KeyError("x")
        if given == 1:
            (folder.parent / "escaped").touch()
        if given == 2:
            error = UserError("")
            error.args = ("two\nlines",)
            raise error

    made = iter([0, 1, 2, 3])
    monkeypatch.setitem(READERS, "bad", READERS["csv"]._replace(make=lambda rng, folder: next(made), read=read_badly))
    found = [hostile.read_one(tmp_path / "input", "bad", n, 0, room=None) for n in range(4)]
    assert found[0].startswith("KeyError") and "escaped" in found[1] and "not one printable line" in found[2]
    assert found[3] == "accepted"


def test_messages_are_one_printable_line() -> None:
    text = str(UserError("a\nb\x1b[2J\u202e\udcff é " + "x" * 10_000))
    assert text.startswith("a\\nb\\x1b[2J\\u202e\\udcff é ") and text.isprintable() and len(text) < LONGEST + 10


def test_nothing_runs_code() -> None:
    """No pickle, no code of a model's repository, no loader of YAML but the safe ones."""
    for path in (ROOT / "sftrec_jax").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (pickle|dill|cloudpickle|joblib|shelve|marshal)\b", text, re.M), path
        assert not re.search(
            r"torch\.load|allow_pickle=True|trust_remote_code=True|(?<![\w.])(eval|exec)\(|extractall|unpack_archive", text
        ), path
        assert not re.search(r"yaml\.(unsafe_load|full_load|load_all|load)\((?!text, _Loader\))", text), path
        if "import numpy" in text:
            # Of files that the program did not write itself.
            for call in re.findall(r"np\.load\([^\n]*", text):
                assert "allow_pickle=False" in call or path.name in ("session.py", "extend.py"), call


def test_yaml_is_bounded() -> None:
    shared = load_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert shared == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    assert len(laughs) < 1000
    for text, why in (
        (laughs, "more than 100,000 values"),
        ("&a [*a]", "within itself"),
        ("[" * 60 + "]" * 60, "more than 50 lists"),
        ("- " * 5000, "more than 50 lists|too deep"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: 2001-99-99", "not a value of its kind"),
        ("a: !!int x", "not a value of its kind"),
        ("9" * 5000, "not a value of its kind"),
        ("0x" + "f" * 5000, "more than 128 bits"),
    ):
        with pytest.raises(yaml.YAMLError, match=why):
            load_yaml(text)


def test_shipped_configs_stay_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        assert load_yaml(path.read_text(encoding="utf-8")) == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_names_that_no_file_has(tmp_path: Path) -> None:
    for source in ("./" + "a" * 5000, "a" * 5000, "./a\0b"):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"source": source}}), encoding="utf-8")
        with pytest.raises(UserError, match="cannot be the name of a file"):
            load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("revision", ["../../evil", "a/../b", "/etc", "", "a\nb", "~"])
def test_revisions_stay_in_the_cache(revision: str) -> None:
    with pytest.raises(UserError, match="is no branch, tag or commit"):
        _snapshot("org/name", revision, [])


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x.bin", "", ".."])
def test_shards_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"w": "{name}"}}}}', encoding="utf-8")
    with pytest.raises(UserError, match="no .safetensors file of this folder"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz", "a.txt.gz"])
def test_a_line_without_end_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfile, "BLOCK", 1 << 20)
    (tmp_path / name).write_bytes(gzip.compress(b"item_id\na\n" + b"x" * (40 << 20)))
    read = 0
    with pytest.raises(UserError, match=r"row 3: a .* has more than 1 MB|row 1"):
        for block in textfile.text_blocks(tmp_path / name, b'"' if "csv" in name else None, 1 << 20):
            read += len(block.data)
    assert read < 3 << 20


def test_what_is_taken_whole_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfile, "WHOLE", 1 << 20)
    monkeypatch.setattr(textfile, "BLOCK", 1 << 18)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'{"a": "' + b" " * (2 << 20) + b'"}'))
    with pytest.raises(UserError, match="unpacks to more than 1 MB"):
        read_utf8(tmp_path / "a.json.gz")


def test_stray_quotation_marks_take_no_time(tmp_path: Path) -> None:
    data = b'"\n' + b"a,b\n" * 500_000
    begin = time.process_time()
    assert _last_break(data, b'"') == 0
    assert time.process_time() - begin < 5  # was minutes: every line counted those before it
    some = b'a\n"b\nc"\nd\n"e\nf\n'
    assert [_last_break(some[:end], b'"') for end in range(len(some) + 1)] == [
        max((at + 1 for at in range(end) if some[at : at + 1] == b"\n" and some.count(b'"', 0, at) % 2 == 0), default=0)
        for end in range(len(some) + 1)
    ]


def test_short_lines_are_parsed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty lines, which are rows of nothing, do not fill the memory; rows keep their numbers."""
    monkeypatch.setattr(delimited, "CELLS", 3000)
    text = "item_id,b\n" + "\n" * 5000 + 'x,"1\n2"\n' * 50 + "\n" * 4000 + "y,3\n"
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    tables = list(read_delimited(tmp_path / "a.csv", ".csv", ITEM))
    assert len(tables) > 4
    frame = pl.concat([table.frame for table in tables])
    assert frame["item"].to_list() == ["x"] * 50 + ["y"]
    assert frame["row"].to_list() == [*range(5002, 5052), 9052]
    (tmp_path / "a.jsonl").write_text("\n" * 5000 + '{"item_id": 1}\n', encoding="utf-8")
    monkeypatch.setattr(json_files, "LINES", 1000)
    assert next(json_files.read_json_lines(tmp_path / "a.jsonl", ITEM)).frame["row"].to_list() == [5001]


def test_columns_and_names_have_limits(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"," * 60_000 + b"\n1\n")
    with pytest.raises(UserError, match="row 1 has 60,001 fields"):
        list(read_delimited(tmp_path / "a.csv", ".csv", ITEM))
    (tmp_path / "b.csv").write_text(f"{'item' * 100_000},b\n1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match="no column 'item_id'; it has itemitem"):
        read_table(tmp_path / "b.csv", ITEM)


def test_one_long_text_for_a_million_rows(tmp_path: Path) -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 30_000, pa.int32()), pa.array(["x" * 200_000]))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"item_id": texts}), path)
    assert path.stat().st_size < 1 << 20
    with pq.ParquetFile(path) as file:
        assert _rows_at_once(path, file, ["item_id"]) == (1 << 29) // 200_000
    first = next(iter(read_parquet(path, ITEM)))
    assert 0 < first.frame.height < 3000 and first.frame["item"][0] == "x" * 200_000
    plain = tmp_path / "b.parquet"
    pq.write_table(pa.table({"item_id": [f"i{n}" for n in range(9000)]}), plain)
    with pq.ParquetFile(plain) as file:
        assert _rows_at_once(plain, file, ["item_id"]) == 1 << 20


def test_text_that_utf8_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"1": {"title": "\\ud800"}}', encoding="utf-8")
    with pytest.raises(UserError, match="half of a surrogate pair"):
        read_table(tmp_path / "a.json", [Column("title", "title", "data.title_column")])


def test_long_titles_are_compared_by_their_beginning() -> None:
    index = TitleIndex(["a" * 100_000, "Heat", "b " * 50_000])
    begin = time.process_time()
    assert len(index.nearest("a" * 100_000)) == 3
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "go through too much"),
        (
            "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "go through too much|more than 1,000,000",
        ),
        (
            "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "go through too much|more than 1,000,000",
        ),
        (
            "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}",
            "a list within a list",
        ),
        ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion|too much"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", "too much"),
        ("{{ 'a'|center(999999999) }}", "No filter named 'center'"),
        ("{{ 'a'.ljust(999999999) }}", "SecurityError"),
        ("{{ '%999999999d' % 1 }}", "SecurityError"),
        ("{{ '{:999999999}'.format(1) }}", "SecurityError"),
        ("{{ '{0.__class__}'.format(title) }}", "SecurityError"),
        ("{{ title.__class__ }}", "SecurityError"),
        ("{{ title|map(attribute='__class__')|list|join }}", "SecurityError|UndefinedError"),
        ("{{ lipsum(9) }}", "there is no field 'lipsum'"),
        ("{{ " + "(" * 5000 + " }}", "too many brackets"),
        ("{{ " + "9" * 5000 + " }}", "Exceeds the limit"),
        ("{% if 1 %}" * 200 + "{% endif %}" * 200, "within one another|in one another"),
    ],
)
def test_templates_are_bounded(text: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "a.j2").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=error):
        PromptTemplate(tmp_path / "a.j2", ("title",)).render({"title": "A title"})


def test_configs_and_templates_have_a_size(tmp_path: Path) -> None:
    (tmp_path / "a.j2").write_text("x" * 1_000_001, encoding="utf-8")
    with pytest.raises(UserError, match="a template of 1,000,001 bytes"):
        PromptTemplate(tmp_path / "a.j2", ())
    (tmp_path / "a.yaml").write_text("#" * 5_000_000, encoding="utf-8")
    with pytest.raises(UserError, match="5,000,000 bytes"):
        load_config(tmp_path / "a.yaml")


def test_templates_still_say_what_they_said(tmp_path: Path) -> None:
    """Loops, filters, `~`, macros and lists within bounds are Jinja's own."""
    text = (
        "{% macro one(n) %}<{{ n }}>{% endmacro %}{% for h in history %}{{ loop.index }}/{{ loop.length }} {{ h.title|upper }} "
        "{% endfor %}{{ title ~ '!' ~ 1 }} {{ title + '?' }} {{ [title, 'b']|join(', ') }} "
        "{{ history|map(attribute='title')|join('+') }} {{ title.split(' ')|last }} {{ title|replace('A', 'The') }} "
        "{{ 3 * 4 + 7 % 4 }} {{ one(2) }} {{ 'abc'[1:] }} {{ (1, 2)|sum }} {{ title|truncate(5, true, '.', 0) }} {{ nothing }} "
        "{{ title is string }} {{ {'a': 1}.get('a') }}"
    )
    (tmp_path / "a.j2").write_text(text, encoding="utf-8")
    values = {"title": "A title", "history": [{"title": "x"}, {"title": "y"}], "nothing": None}
    template = PromptTemplate(tmp_path / "a.j2", tuple(values))
    expected = "1/2 X 2/2 Y A title!1 A title? A title, b x+y title The title 15 <2> bc 3 A ti.  True 1"
    for _ in range(200):  # each rendering has a budget of its own
        assert template.render(values) == [expected]


@pytest.mark.slow
def test_command_reports_crashes() -> None:
    command = [sys.executable, str(ROOT / "tests" / "hostile.py"), "safetensors", "--count", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.search(r"safetensors +20 inputs +\d+ refused +\d+ accepted +0 crashes", done.stdout), (
        done.stdout
    )
