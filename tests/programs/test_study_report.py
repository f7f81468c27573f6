"""The page of a study: its parts, its figures, text of users in it, and that it needs nothing from elsewhere."""

import json
import re
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from support.image_evaluations import record, write
from support.small_studies import compared, finished, recipe, rows

from megapromoe.cli import main
from megapromoe.studies import report
from megapromoe.studies.attempts import record_end, record_start
from megapromoe.studies.causes import HUNG
from megapromoe.studies.report_figures import literal, thinned
from megapromoe.studies.status import job_state
from megapromoe.studies.study import open_study

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def plotly():
    return pytest.importorskip("plotly", reason="plotly is not installed: pip install megapromoe[report]")


class Page(HTMLParser):
    """The elements and the texts of a page; scripts apart."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.texts, self._script = [], [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
            self._script = True

    def handle_endtag(self, tag):
        self._script = self._script and tag != "script"

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data
        else:
            self.texts.append(data)


def figures(page):
    """Name of each figure -> its traces, as plotly will read them."""
    made = {}
    for script in page.scripts:
        if match := re.search(r'Plotly\.newPlot\(\s*"([\w-]+)",\s*', script):
            made[match[1]], _ = json.JSONDecoder().raw_decode(script[match.end() :])
    return made


def written(study, out, against=("dense",), of=None):
    states = [job_state(study, job, time.time()) for job in study.jobs()]
    report.write_report(study, rows(study) if of is None else of, states, against, out)
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_of_a_study_has_every_part(plotly, tmp_path):
    study = finished(tmp_path / "s", compared(), lambda task: 0.5 + 0.1 * task.seed + 0.01 * task.index)
    first = study.tasks[0]
    for task in study.tasks:
        write(study.run(task), [record(step, 1.5, 5.0 + step) for step in (2, 3)])
    record_start(study, first)
    record_end(study, first, 76, HUNG, 1)
    record_start(study, first)
    record_end(study, first, 0, None, 3)
    out = tmp_path / "pages" / "report.html"
    text, page = written(study, out)
    words = " ".join(page.texts)
    assert "10 done" in words and "30 of 30" in words and "process hours" in words
    assert "promoe num_experts=2" in words and "2 of 2" in words
    assert "2 attempts: a rank hung" in words
    assert words.index("By chance alone, two single runs differ in loss by more than") < words.index("2 of 2")
    assert "Of 4 intervals, those that exclude zero: 4." in words, "seeds differ, pairs do not"
    drawn = figures(page)
    assert set(drawn) == {"losses", "differences-0", "evaluation-0"}
    assert len(drawn["losses"]) == len(drawn["evaluation-0"]) == 10
    seeds = [trace for trace in drawn["losses"] if trace["name"] == "promoe num_experts=2"]
    assert [trace["y"] for trace in seeds] == [[2.0, 3.0, 4.0]] * 2, "of the logged steps"
    assert [trace["showlegend"] for trace in seeds] == [True, False]
    assert seeds[1]["hovertemplate"].startswith("promoe-e2-seed1<br>step %{x:,}: %{y:.5g}")
    points, mean = drawn["differences-0"][:2]
    assert points["x"] == pytest.approx([-0.02, -0.02]) and points["y"] == ["promoe num_experts=2"] * 2
    assert mean["x"] == pytest.approx([-0.02]) and mean["error_x"]["array"] == pytest.approx([0.0])
    links = [unquote(attributes["href"]) for tag, attributes in page.elements if tag == "a"]
    assert len(links) == 10 and (out.parent / links[0]).resolve() == study.run(first).resolve()
    # Nothing is loaded, and plotly's program is in the page once.
    assert not [a for tag, a in page.elements if "src" in a or (tag == "link")]
    assert [len(script) > 1_000_000 for script in page.scripts].count(True) == 1 and len(page.scripts) == 4
    assert len(text) < 6_000_000
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_text_of_users_is_not_read_as_html(plotly, tmp_path):
    """Names of variants have letters and digits alone; this test does not rely on it."""
    study = finished(tmp_path / "s", recipe(axes={}), lambda task: 0.5 + task.index)
    hostile = replace(study.recipe, variants=tuple(replace(v, name=HOSTILE) for v in study.recipe.variants))
    tasks = tuple(replace(task, variant=HOSTILE) for task in study.tasks)
    known = [row | {"variant": HOSTILE, "task": HOSTILE} for row in rows(study)]
    study = replace(study, recipe=hostile, tasks=tasks)
    states = [job_state(study, job, time.time()) for job in study.jobs()]
    states = [replace(state, state="failed", remark=f'"><img src=x onerror=alert(1)>{HOSTILE}') for state in states]
    for task in study.tasks:
        values = {f"distance ({HOSTILE})": 5.0}
        write(study.run(task), [record(step, 1.0, figures=values) for step in (2, 3)])
    out = tmp_path / "report.html"
    report.write_report(study, known, states, [HOSTILE], out)
    page = Page(out.read_text(encoding="utf-8"))
    assert len(page.scripts) == 3, "plotly's program and two figures"
    assert HOSTILE in "".join(page.texts), "it is shown as it is written"
    assert {tag for tag, _ in page.elements} <= {
        *("html", "head", "meta", "title", "style", "script", "body", "h1", "h2", "h3", "p", "div", "span", "a"),
        *("table", "tr", "th", "td"),
    }
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    drawn = json.dumps(figures(page))
    assert literal(HOSTILE) in drawn and HOSTILE not in drawn, "plotly reads tags in names"


def test_a_report_of_a_study_that_has_not_begun_or_lacks_losses(plotly, tmp_path, capsys):
    study = finished(tmp_path / "s", recipe(axes={}, seeds=[0]))
    study.loss_file(study.tasks[0]).unlink()
    assert main(["study", "report", str(study.folder)]) == 0
    assert capsys.readouterr().out.strip() == str(study.folder / "report.html")
    page = Page((study.folder / "report.html").read_text())
    assert "Without those that `collect` has not computed yet: promoe-seed0." in " ".join(page.texts)
    assert set(figures(page)) == {"losses"}
    (study.run(study.tasks[0]) / "metrics.jsonl").unlink()
    assert main(["study", "report", str(study.folder), "--out", str(tmp_path / "x.html")]) == 0
    assert "No run has logged a step yet." in (tmp_path / "x.html").read_text()
    assert main(["study", "report", str(study.folder), "--against", "none"]) == 2
    assert "--against none: the variants are promoe" in capsys.readouterr().err


def test_without_plotly_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    study = finished(tmp_path / "s", recipe(axes={}, seeds=[0]))
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    assert main(["study", "report", str(study.folder)]) == 2
    assert "report: needs plotly: pip install 'megapromoe[report]'" in capsys.readouterr().err
    assert not (study.folder / "report.html").exists()
    assert open_study(study.folder).tasks == study.tasks


def test_long_curves_are_thinned_by_means():
    steps, values = list(range(1, 1002)), [float(step) for step in range(1, 1002)]
    few_steps, few = thinned(steps, values, 100)
    assert len(few) == len(few_steps) == 100 and few_steps[-1] == 1001 and few_steps == sorted(set(few_steps))
    assert few[0] == pytest.approx(5.5) and thinned(steps, values, 1001) == (steps, values)
