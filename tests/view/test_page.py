"""A run's page: one file without a network, with the numbers of the run folder, safe against what people's data holds."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from tests.support.pocket_run import trained
from toolkit.files import ToolkitError
from toolkit.view import page

MARKUP = "<script>alert('你好 & you')</script>"


class Page(HTMLParser):
    """Tags that are open at the end, addresses that would be loaded, and the text."""

    def __init__(self, file):
        super().__init__()
        self.open, self.addresses, self.tags, self.words = [], [], set(), []
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on rows that hold markup, trained and scored."""
    folder = tmp_path_factory.mktemp("page")
    rows = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} {MARKUP}"}]}
            for n in range(60)]  # fmt: skip
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_OUTPUTS", str(folder / "outputs"))
        changes = [f"data.sources.1.path={data}", "data.sources.1.format=messages",
                   "data.sources.1.max_repeats=9", "evaluate.level=fast"]  # fmt: skip
        yield trained("paged", *changes, score=True)[0]


def test_an_evaluation_leaves_a_page_that_loads_nothing(run):
    read = Page(run / "report.html")
    assert read.open == []
    assert [address for address in read.addresses if not address.startswith("data:image/png;base64,")] == []
    assert "script" not in read.tags  # the markup of the rows is text here
    assert MARKUP in read.text


def test_the_page_says_what_the_files_of_the_run_say(run):
    read = Page(run / "report.html")
    result = json.loads((run / "eval.json").read_text())
    mix = json.loads((run / "mix.json").read_text())
    for line in result["verdict"]:
        assert " ".join(line.split()) in read.text
    for name, source in mix["sources"].items():
        assert f"{name} {100 * mix['planned'][name]:.1f}% {source['rows_kept']:,} {source['tokens']:,}" in read.text
    shown = re.findall(r"row (\d+) · (thinking|non-thinking) · (\d+) tokens, (\d+) supervised", read.text)
    assert len(shown) == page.ROWS


def test_a_page_leaves_out_what_the_run_does_not_have_yet(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "manifest.json", bare)
    read = Page(page.write(bare))
    assert "Not scored yet" in read.text
    assert "Not exported yet" in read.text
    assert "Gained and kept" not in read.text


def test_the_dial_and_a_certificate_are_on_the_page(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    result = json.loads((run / "eval.json").read_text())
    kl = result["tuned"]["forgetting"]["kl"]["value"]
    rows = [{"settings": f"scale {scale}", "KL": f"{kl:.3f} [0.000, 9.000]"} for scale in (0.5, 1)]
    left = {"verdict": ["No scale is recommended."], "table": rows, "notes": [], "left_out": {}}
    (copy / "copy-dial").mkdir()
    (copy / "copy-dial" / "comparison.json").write_text(json.dumps(left))
    check = {"name": "kl", "passed": False, "value": 0.5, "limit": 0.1, "rule": "at most"}
    certificate = {
        "passed": False,
        "checks": [check],
        "files": {"gguf/a.gguf": {"sha256": "f" * 64, "bytes": 2_000_000}},
    }
    (copy / "certificate.json").write_text(json.dumps(certificate))
    read = Page(page.write(copy))
    assert f"0.5 {kl:.3f} [" in read.text
    assert "Certificate FAILED" in read.text
    assert "ollama create copy" in read.text
    assert "0 of 1 checks" in read.text


def test_the_page_of_a_dialled_run_opens_with_the_dials_picture_and_says_what_it_recommends(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    folder = copy / "copy-dial"
    folder.mkdir()
    (folder / "comparison.png").write_bytes(b"a picture")
    rows = [{"settings": "scale 0 (base)", "KL": "0.000"}, {"settings": "★ scale 0.5", "KL": "0.100 [0.050, 0.150]"}]
    verdict = ["Recommended: scale 0.5: sums 10% → 70%.", "next: python -m toolkit export copy --scale 0.5"]
    found = {"verdict": verdict, "table": rows, "notes": ["One training."], "left_out": {}}
    (folder / "comparison.json").write_text(json.dumps(found))
    read = Page(page.write(copy))
    assert read.open == []
    assert next(a for a in read.addresses if a.startswith("data:")) == page.address(b"a picture")
    assert read.text.index("Recommended: scale 0.5") < read.text.index("What it was trained on")
    assert "★ scale 0.5 0.100 [0.050, 0.150]" in read.text
    assert "python -m toolkit export copy --scale 0.5" in read.text
    (folder / "comparison.png").unlink()  # people tidy up
    assert "★ scale 0.5" in Page(page.write(copy)).text


def test_the_page_says_how_to_use_the_run(run):
    read = Page(page.write(run))
    for verb in ("chat", "serve", "generate", "dial", "export"):
        assert f"python -m toolkit {verb} paged" in read.text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ToolkitError, match=r"manifest\.json"):
        page.write(tmp_path)
