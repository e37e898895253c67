"""The command line: options leave overrides alone, mistakes get a suggestion, failures say where the log is."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.support.pocket_run import make_run
from toolkit import __main__ as cli
from toolkit.files import ROOT, outputs, read_json, write_json

PROBE = """
import signal, sys, time
from toolkit import __main__ as cli
@cli.verb("probe", cli.arg("run", nargs="?", default=""))
def probe(run):
    "probe"
    print("started", flush=True)
    {body}
sys.exit(cli.main(["probe", *sys.argv[1:]]))
"""


def parsed(line: str):
    words, overrides = cli.take_overrides(line.split())
    args = cli.parser().parse_args(words)
    return args, overrides


def start(body: str, run: str = "") -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TOOLKIT_DEBUG"}
    return subprocess.Popen([sys.executable, "-c", PROBE.format(body=body), run], env=environment, cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.parametrize(
    ("line", "options", "overrides"),
    [
        ("sweep R --reasoning 0 1 data.budget=8000", {"recipe": "R", "shares": [0, 1]}, ["data.budget=8000"]),
        ("sweep R --of chat --shares 0.5 data.budget=8 --seeds 2", {"of": "chat", "seeds": 2}, ["data.budget=8"]),
        ("train --fresh train.max_steps=2", {"recipe": None, "fresh": True}, ["train.max_steps=2"]),
        ("train train.max_steps=2 pocket", {"recipe": "pocket"}, ["train.max_steps=2"]),
        ("mix pocket --show 2 data.budget=8", {"recipe": "pocket", "show": 2}, ["data.budget=8"]),
        ("replay pocket --prompts=a=b.jsonl data.seed=1", {"prompts": "a=b.jsonl"}, ["data.seed=1"]),
        ("fit --vram 8 lora.r=8", {"recipe": "hybrid", "vram": 8}, ["lora.r=8"]),
    ],
)
def test_options_never_swallow_overrides(line, options, overrides):
    args, found = parsed(line)
    assert found == overrides
    assert {key: getattr(args, key) for key in options} == options


def test_every_verb_says_what_it_does():
    assert {"train", "mix", "evaluate", "export"} <= set(cli.VERBS)
    for function, _ in cli.VERBS.values():
        assert function.__doc__.splitlines()[0].endswith(".")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian", "trian: no such verb. Did you mean 'train'?"),
        ("train hybird", "Did you mean 'hybrid'?"),
        ("train pocket max_steps", "override 'max_steps': expected key=value"),
        ("evaluate no-such-run-at-all", "no such run"),
        ("compare tuend tuned", "tuend: no such run in {outputs}. Did you mean 'tuned'?"),
        ("compare nowhere", "nowhere: no such run in {outputs}. Known: tuned"),
    ],
)
def test_a_mistyped_name_is_an_error_with_a_suggestion(line, said, capsys):
    make_run(outputs() / "tuned")
    assert cli.main(line.split()) == 2
    assert said.format(outputs=outputs()) in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "mix --show -1", "sweep --seeds 0", "replay --count -3", "chat R --max-new-tokens 0", "chat R --context 0",
        "generate R P F --max-new-tokens 0", "generate R P F --max-new-tokens many", "generate R P F --seed -1",
    ],
)  # fmt: skip
def test_a_number_that_cannot_work_is_refused_before_anything_is_done(line, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(line.split())
    *_, option, value = line.split()
    least = 0 if option == "--seed" else 1
    assert f"{option}: expected a whole number >= {least}, found '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("export tuned --to merged --quant q4_k_m", "--quant is for GGUF files, which --to leaves out"),
    ],
)
def test_an_option_without_an_effect_is_refused(line, said, capsys):
    assert cli.main(line.split()) == 2
    assert said in capsys.readouterr().err


def test_the_command_that_mix_names_next_can_be_pasted_into_a_shell(capsys):
    words = ["pocket", "data.budget=3000", "evaluate.prompts=[What's new]"]
    assert cli.main(["mix", *words]) == 0
    found = capsys.readouterr().out.split("next:")[1].splitlines()[0]
    assert shlex.split(found) == ["python", "-m", "toolkit", "train", *words]


def test_a_model_of_fit_s_advice_replaces_the_one_of_its_option(capsys):
    assert cli.main("fit pocket --model Qwen3-8B --vram 8".split()) == 0
    advice = capsys.readouterr().out.rpartition("it fits with ")[2].split(":")[0]
    assert "model.model_name=" in advice
    assert cli.main(["fit", "pocket", "--model", "Qwen3-8B", "--vram", "8", *advice.split()]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{advice.rpartition('=')[2]} fits:")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_a_verb_in_order_and_say_how_to_resume(name):
    process = start("try: time.sleep(60)\n    finally: print('closed', flush=True)")
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=20)
    assert out == "closed\n"
    assert err == "interrupted: run the same command again; it resumes from what is finished\n"
    assert process.returncode == 128 + getattr(signal, name)


def test_an_unexpected_exception_ends_with_one_line_and_its_traceback_is_in_the_log():
    process = start("1 / 0")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert err.splitlines()[0] == "error: ZeroDivisionError: division by zero"
    assert f"the traceback is in {outputs() / 'toolkit.log'}. Run the same command again to resume." in err
    assert (
        "1 / 0" in (outputs() / "toolkit.log").read_text()
        or "ZeroDivisionError" in (outputs() / "toolkit.log").read_text()
    )


def test_the_log_of_a_run_is_in_its_folder():
    (outputs() / "mine").mkdir(parents=True)
    (outputs() / "mine" / "recipe.yaml").touch()
    process = start("1 / 0", "mine")
    assert str(outputs() / "mine" / "run.log") in process.communicate(timeout=20)[1]
    assert "ZeroDivisionError" in (outputs() / "mine" / "run.log").read_text()


def test_a_closed_pipe_is_no_error():
    process = start("for _ in range(100000): print('x' * 100)")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=20) == 0
    assert process.stderr.read() == ""


def test_an_override_after_export_s_quantizations_is_no_quantization(tmp_path, capsys):
    run = make_run(tmp_path / "tuned")
    assert cli.main(["export", str(run), "--quant", "q8_0", "train.max_steps=3"]) == 2
    assert "train.max_steps=3: a finished run takes no overrides" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [
        "try: time.sleep(60)\n    finally: time.sleep(60)",
        "import atexit; atexit.register(time.sleep, 60); time.sleep(60)",
        "import threading; threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)",
    ],
)
def test_a_second_interrupt_ends_at_once_without_a_traceback(body):
    process = start(body)
    assert process.stdout.readline() == "started\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert "Traceback" not in err
    assert process.returncode == 130


def test_an_interrupt_that_a_library_turns_into_its_own_error_is_no_bug():
    process = start("try: time.sleep(60)\n    except BaseException: raise ImportError('partially initialized module')")
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert err.startswith("interrupted: ")
    assert process.returncode == 130


WITHOUT_PACKAGES = [sys.executable, "-S", "-m", "toolkit"]
"""Python that finds no installed package at all."""


def test_doctor_works_without_any_package_and_names_setup():
    done = subprocess.run([*WITHOUT_PACKAGES, "doctor"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "missing" in done.stdout
    assert "python -m toolkit setup" in done.stdout
    assert "bug" not in done.stdout + done.stderr


@pytest.mark.parametrize("package", ["yaml", "numpy", "requests", "torch", "rich"])
def test_doctor_works_where_one_package_is_missing(package):
    code = f"import sys; sys.modules[{package!r}] = None; from toolkit.__main__ import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"{package} missing" in done.stdout
    assert "python -m toolkit setup" in done.stdout


@pytest.mark.parametrize(
    "line",
    ["train pocket", "mix pocket", "fit", "evaluate x", "compare", "export x", "verify x", "chat x", "serve x", "sweep",
     "generate x a b", "replay", "list", "doctor --gpu", "init x.jsonl"],
)  # fmt: skip
def test_every_verb_names_setup_where_packages_are_missing(line):
    done = subprocess.run([*WITHOUT_PACKAGES, *line.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not installed: run `python -m toolkit setup`" in done.stderr
    assert "bug" not in done.stderr


FAILS = """
import sys
from toolkit import __main__ as cli
@cli.verb("probe", cli.arg("run"), cli.arg("--api-key", dest="key"))
def probe(run, key):
    "probe"
    open(run)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_the_log_holds_neither_keys_nor_the_home_folder(tmp_path):
    home = tmp_path / "home"
    environment = os.environ | {"HOME": str(home)}
    words = [sys.executable, "-c", FAILS, "probe", str(home / "mine"), "--api-key", "sesame"]
    subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    log = (outputs() / "toolkit.log").read_text()
    assert "FileNotFoundError" in log
    assert "~/mine --api-key …" in log
    assert str(home) not in log


def test_help_names_every_verb_within_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in [["--help"], *([name, "--help"] for name in cli.VERBS)]:
        with pytest.raises(SystemExit):
            cli.main(words)
        shown = capsys.readouterr().out
        assert max(len(line) for line in shown.splitlines()) <= 80
        if words == ["--help"]:
            assert set(re.findall(r"(?m)^    (\w+)", shown)) == set(cli.VERBS)


def test_no_verb_s_function_is_named_like_a_module():
    from tests.test_package import NAMES

    modules = {name.split(".")[-1] for name in NAMES}
    assert {function.__name__ for function, _ in cli.VERBS.values()} & modules == set()


def as_json(line: str, capsys) -> tuple[int, dict]:
    """(exit code, the one object on stdout) of a command with --json."""
    import json

    code = cli.main(line.split())
    out = capsys.readouterr().out
    return code, json.loads(out)


def test_mix_and_fit_give_one_json_object(capsys):
    code, mixed = as_json("mix pocket data.budget=3000 --json", capsys)
    assert code == 0
    assert mixed["achieved"] == read_json(next((outputs() / ".mixes").glob("*/mix.json")))["achieved"]
    code, planned = as_json("mix pocket --dry-run --json", capsys)
    assert set(planned) == {"unit", "budget", "sources"}
    code, forecast = as_json("fit pocket --vram 8 --json", capsys)
    assert forecast["fits"] is True
    assert forecast["peak_bytes"] == max(sum(parts.values()) for parts in forecast["phases"].values())


def test_an_error_keeps_stdout_empty_under_json(capsys):
    assert cli.main(["mix", "nowhere", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_list_names_sweeps_with_what_is_done_of_them(capsys):
    run = make_run(outputs() / "ratio-r0.5-s1")
    write_json(run / "manifest.json", read_json(run / "manifest.json") | {"state": "finished"})
    write_json(outputs() / "ratio-sweep" / "sweep.json", {"runs": [{"name": run.name}, {"name": "ratio-r1-s1"}]})
    assert cli.main(["list"]) == 0
    assert "  ratio-sweep: 1 of 2 runs finished\n" in capsys.readouterr().out
    write_json(outputs() / "ratio-sweep" / "comparison.json", {})
    _, listed = as_json("list --json", capsys)
    assert listed["sweeps"] == [{"name": "ratio-sweep", "state": "1 of 2 runs finished, compared"}]
    (outputs() / "ratio-sweep" / "sweep.json").write_text("{")
    assert cli.main(["list"]) == 0
    assert "ratio-sweep: sweep.json is damaged" in capsys.readouterr().out


def test_list_names_runs_with_their_state_and_recipes_with_their_purpose(capsys):
    make_run(outputs() / "tuned")
    (outputs() / "broken").mkdir()
    (outputs() / "broken" / "recipe.yaml").write_text("name: broken")
    (outputs() / "broken" / "manifest.json").write_text("{")
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "tuned" in out
    assert "manifest.json is damaged" in out
    assert "hybrid" in out
    _, listed = as_json("list --json", capsys)
    assert {run["name"] for run in listed["runs"]} == {"tuned", "broken"}
    assert {"pocket", "hybrid"} <= {recipe["name"] for recipe in listed["recipes"]}


def test_a_parquet_file_is_read_without_the_librarys_own_bar(tmp_path):
    import pandas

    pandas.DataFrame({"question": ["a", "b"] * 20, "answer": ["c", "d"] * 20}).to_parquet(tmp_path / "data.parquet")
    words = [sys.executable, "-m", "toolkit", "init", "data.parquet", "--model", "pocket"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "written: data.yaml" in done.stdout
    assert done.stderr == ""
