"""The types in records.py say what a run's files hold: every declared key is there, and no other."""

import ast
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest

from toolkit import records
from toolkit.files import PACKAGE

FILES = {
    "mix.json": records.MixReport, "eval.json": records.Evaluation, "manifest.json": records.Manifest,
    "certificate.json": records.Certificate, "export.json": records.ExportRecord,
}  # fmt: skip
LINES = {
    "samples.jsonl": records.SampleLine,
    "quarantine.jsonl": records.DroppedRow,
    "metrics.jsonl": records.MetricLine,
}


def mismatches(value: Any, kind: Any, where: str) -> list[str]:
    """Where a JSON value is not what a type says; a metrics line may hold more keys than it names."""
    origin = get_origin(kind)
    if kind is Any:
        return []
    if is_typeddict(kind):
        return typed_dict_mismatches(value, kind, where)
    if origin is Literal:
        return [] if value in get_args(kind) else [f"{where}: {value!r}"]
    if origin in (Union, UnionType):
        return [] if any(not mismatches(value, option, where) for option in get_args(kind)) else [f"{where}: {value!r}"]
    if origin is list:
        if type(value) is not list:
            return [f"{where}: {value!r}"]
        return [problem for item in value for problem in mismatches(item, get_args(kind)[0], f"{where}[]")]
    if origin is dict:
        key_type, value_type = get_args(kind)
        wrong = [] if type(value) is dict else [f"{where}: {value!r}"]
        for key, item in value.items():
            wrong += mismatches(key, key_type, f"{where} key") + mismatches(item, value_type, f"{where}.{key}")
        return wrong
    if kind is float:
        return [] if type(value) in (int, float) else [f"{where}: {value!r}"]
    return [] if type(value) is kind else [f"{where}: {value!r}"]


def typed_dict_mismatches(value: Any, kind: Any, where: str) -> list[str]:
    if type(value) is not dict:
        return [f"{where}: {value!r}"]
    hints = get_type_hints(kind)
    wrong = [f"{where}.{key} is missing" for key in kind.__required_keys__ - value.keys()]
    if kind is not records.MetricLine:
        wrong += [f"{where}.{key} is not declared" for key in value.keys() - hints.keys()]
    for key in value.keys() & hints.keys():
        wrong += mismatches(value[key], hints[key], f"{where}.{key}")
    return wrong


def test_every_key_has_a_line_of_documentation():
    text = (PACKAGE / "records.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    keys = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.AnnAssign)]
    undocumented = [lines[key.lineno - 1] for key in keys if "  # " not in lines[key.end_lineno - 1]]
    assert undocumented == []
    assert len(keys) > 100


def check_run(folder: Path) -> list[str]:
    """What in a run's files is not as declared."""
    wrong = []
    for name, kind in FILES.items():
        if (folder / name).is_file():
            wrong += mismatches(json.loads((folder / name).read_text(encoding="utf-8")), kind, name)
    for name, kind in LINES.items():
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        wrong += [problem for line in lines for problem in mismatches(json.loads(line), kind, name)]
    return wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with everything in its folder: trained, evaluated, exported as a GGUF and certified."""
    from tests.support.pocket_run import trained
    from toolkit import export

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_OUTPUTS", str(tmp_path_factory.mktemp("records")))
        done, _ = trained("whole", score=True)
        export.export(done, ["q8_0"])
        yield done


def test_a_run_holds_the_declared_keys_and_no_other(folder):
    assert check_run(folder) == []
    assert {name for name in FILES if not (folder / name).is_file()} == set()


def printed(line: str, capsys) -> dict:
    """The one object on stdout of a command with --json."""
    from toolkit import __main__ as cli

    assert cli.main(line.split()) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_and_verify_print_as_json_what_they_write(folder, capsys):
    result = printed(f"evaluate {folder} --level fast --json", capsys)
    assert mismatches(result, records.Evaluation, "evaluate") == []
    assert result == json.loads((folder / "eval-fast.json").read_text(encoding="utf-8"))
    certificate = printed(f"verify {folder} --json", capsys)
    assert mismatches(certificate, records.Certificate, "verify") == []
    assert certificate["passed"]


def test_compare_prints_its_runs_as_json(folder, capsys):
    comparison = printed(f"compare {folder} --json", capsys)
    assert {"axis", "recommended", "verdict", "points"} <= comparison.keys()
    assert "whole" in json.dumps(comparison["points"])


def test_a_key_too_many_and_one_too_few_are_noticed():
    check = {"name": "x", "passed": True, "value": None, "limit": 0, "rule": "at most"}
    assert mismatches(check, records.Check, "check") == []
    assert mismatches({**check, "more": 1}, records.Check, "check") == ["check.more is not declared"]
    assert mismatches({**check, "rule": "about"}, records.Check, "check") == ["check.rule: 'about'"]
    del check["limit"]
    assert mismatches(check, records.Check, "check") == ["check.limit is missing"]
