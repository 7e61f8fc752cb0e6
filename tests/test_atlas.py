"""The atlas: verdicts, numbers and commands of every finding, whatever became of it."""

import math
import re
import zlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import report_store
from html_page import Page

from gradflow import atlas, findings, plots, report
from gradflow.findings import (
    CHAPTERS,
    CONTRADICTED,
    INCONCLUSIVE,
    NOT_RUN,
    REPRODUCED,
    Comparison,
    Curve,
    Exhibit,
    Figure,
    Finding,
    about,
    exactly,
)
from gradflow.measures import along, growth, imagined_layers, single_reading
from gradflow.store import load_runs

SEEDS = 8
TEXT = """{claim}.

A paragraph that explains, with `some_code` in it.

Source: somebody.

Measured: the rate & its <sign>.

Deviations: none to speak of.

Cost: 20 runs, 3 s; more by name.
"""


def finding(name, chapter="vanishing", *, region=None, arms=("he", "xavier"), **options):
    """A finding about the growth per layer of each arm; all of one name have specs of their own."""
    spec = {"network": "mlp", "depth": 20, "norm": "none", "skip": False, "probe": "propagation",
            "width": 8 + zlib.crc32(name.encode()) % 999,
            "data": {"name": "gaussian", "channels": 4, "size": 1}}  # fmt: skip
    asked = tuple(
        Comparison(f"ρ, {arm}", (arm,), growth(), region or about(rate, 0.1), ratio=True, unit="ρ")
        for arm, rate in zip(arms, (1.0, 0.5), strict=False)
    )
    return Finding(
        source="Somebody 2015, arXiv 1502.01852",
        chapter=chapter,
        specs={arm: {**spec, "init": arm} for arm in arms},
        comparisons=options.pop("comparisons", asked),
        recorded=REPRODUCED,
        seeds=SEEDS,
        figure=Figure(
            tuple(
                Curve(arm, arm, along(), findings.exponential(rate), scaled=True)
                for arm, rate in zip(arms, (1.0, 0.5), strict=False)
            ),
            x="layer",
            y="squared norm",
        ),
        id=name,
        text=TEXT.format(claim=f"A claim of {name} & <others>"),
        **options,
    )


def profile(rate, level=1.0):
    """A record whose squared gradient norm grows by `rate` a layer toward the input."""
    layers = np.arange(18.0)
    return imagined_layers("output_grad_norm", level * rate ** (-layers / 2))


def write_runs(store, found, rates, seeds=SEEDS, noise=0.01):
    """Runs of a finding whose rates scatter around those given."""
    for arm, rate in zip(found.specs, rates, strict=True):
        for seed in range(100, 100 + seeds):
            shift = math.exp(noise * math.sin(seed))
            record = profile(rate * shift, level=1 + seed % 3)
            report_store.write_record(store, found.spec(arm, seed), record)


def shown_off(find):
    """What a finding may show beyond its verdict."""
    if find("he", 100) is None:
        return None
    figure = plots.overlay(pd.DataFrame({"x": [1, 2], "value": [1.0, 2.0]}))
    rows = [{"arm": "he <1>", "error": 0.25}]
    return Exhibit(figure, "A figure of its own.", {"All that was run": rows}, ("So it is.",))


KNOWN = [
    finding("yes", exhibit=shown_off, notes="Two papers & their `words` disagree."),
    finding("no", "exploding"),
    finding("perhaps", "exploding"),
    finding("hurried", "skips"),
    finding("absent", "after"),
    finding("damaged", "after"),
    finding(
        "identity",
        arms=("he",),
        comparisons=(
            Comparison("a factor", ("he",), growth(), exactly(1.0, 1e-9)),
        ),
    ),
]  # fmt: skip


def draw(figure, stem):
    """The SVG alone is drawn: that takes a third of the time."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in plots.FORMATS]
    with plots.mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(files[0])
    for path in files[1:]:
        path.write_bytes(b"")
    return files


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(plots, "save", draw)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with findings that came out in every way, and its report with the atlas."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", draw)
        return make_whole(tmp_path_factory)


def make_whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    store = place / "runs"
    known = {found.id: found for found in KNOWN}
    write_runs(store, known["yes"], (1.0, 0.5))
    write_runs(store, known["no"], (1.3, 0.5))
    write_runs(store, known["perhaps"], (1.0, 0.547))
    write_runs(store, known["hurried"], (1.0, 0.5), seeds=6)
    write_runs(store, known["identity"], (1.0,), noise=0)
    write_runs(store, known["damaged"], (1.0, 0.5))
    table = store / known["damaged"].spec("xavier", 100).name / "outputs.parquet"
    table.write_bytes(table.read_bytes()[:-3] + b"cut")
    report_store.write_run(store, 0.25, depth=8, skip="none")
    path = report.write_report(load_runs(store), place / "report", findings=KNOWN)
    page = path.with_name("atlas.html")
    text = page.read_text(encoding="utf-8")
    return place, text, Page(text)


def section(text, name):
    """What the page says of one finding."""
    start = text.index(f'<h3 id="{name}">')
    ends = [text.find(mark, start + 4) for mark in ("<h3 ", "<h2 ", "</main>")]
    return text[start : min(end for end in ends if end > 0)]


def test_the_page_needs_nothing_but_itself(whole):
    place, text, page = whole
    assert "<script src" not in text
    assert "default-src 'none'" in text
    assert "https://" not in text
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.resources)
    for link in page.links:
        assert link[1:] in page.ids if link.startswith("#") else (place / "report" / link).is_file()
    assert len(page.ids) == len(set(page.ids))
    assert "A claim of yes &amp; &lt;others&gt;" in text
    assert "<others>" not in text


def test_both_pages_link_to_each_other(whole):
    place, text, page = whole
    index = (place / "report" / "index.html").read_text(encoding="utf-8")
    assert "index.html" in page.links
    assert index.count('href="atlas.html"') == 1
    told = "7 findings: 3 reproduced (1 quick), 1 contradicted, 1 inconclusive, 2 not run"
    assert told in index
    assert told in text
    assert "probe tasks: see the atlas" in index
    assert "damaged, ρ, xavier" in index[index.index('<h2 id="problems"') :]


def test_all_findings_are_listed_in_the_order_of_the_course(whole):
    _, text, page = whole
    rows = {row[0]: row for row in page.rows if len(row) == 8}
    assert {name: row[1] for name, row in rows.items()} == {
        "finding": "verdict", "yes": "reproduced", "identity": "reproduced", "no": "contradicted",
        "perhaps": "inconclusive", "hurried": "reproduced, quick", "absent": "not run",
        "damaged": "not run",
    }  # fmt: skip
    assert list(rows)[1:4] == ["yes", "identity", "no"]
    verdict = findings.verdict(KNOWN[1], findings.lookup(KNOWN[1], [whole[0] / "runs"]))
    first = verdict.results[0]
    assert rows["no"][2] == "1 of 2"
    assert rows["no"][3] == f"ρ, he: {first.mean:.4g}"
    assert rows["no"][4] == f"[{first.low:.4g}, {first.high:.4g}]"
    assert rows["no"][5] == "8"
    assert rows["no"][6:] == ["20 runs, 3 s", "Somebody 2015, arXiv 1502.01852"]
    assert rows["identity"][4] == "exact"
    heads = re.findall(r'<h2 id="chapter-(\w+)"', text)
    assert heads == ["vanishing", "exploding", "skips", "after"]
    places = [text.index(f'<h3 id="{name}"') for name in ("yes", "identity", "no", "hurried")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("name", "word", "words"),
    [
        ("yes", REPRODUCED, "reproduced"),
        ("no", CONTRADICTED, "contradicted"),
        ("perhaps", INCONCLUSIVE, "inconclusive (about"),
        ("hurried", REPRODUCED, "reproduced, quick"),
        ("absent", NOT_RUN, "not run"),
    ],
)
def test_each_section_has_verdict_evidence_and_command(whole, name, word, words):
    _, text, _ = whole
    here = section(text, name)
    assert f'<span class="verdict {word.replace(" ", "-")}">{words}' in here
    assert f"<pre><code>python -m experiments {name}</code></pre>" in here
    for part in ("Measured: the rate &amp; its &lt;sign&gt;.", "Deviations: none to speak of.",
                 "Cost: 20 runs, 3 s; more by name.",
                 "with <code>some_code</code> in it"):  # fmt: skip
        assert part in here
    assert here.count("<figure") == (0 if word == NOT_RUN else 3 if name == "yes" else 2)
    assert "<td>0.9 to 1.1</td>" in here
    assert ("the verdict was: reproduced" in here) == (word in (CONTRADICTED, INCONCLUSIVE))


def test_figures_are_files_and_captions_say_what_is_seen(whole):
    place, text, _ = whole
    names = {path.name for path in (place / "report" / "figures").glob("atlas-*")}
    for name in ("yes", "no", "hurried"):
        for part in ("", "-curves"):
            assert {f"atlas-{name}{part}.{kind}" for kind in plots.FORMATS} <= names
    assert not any("absent" in name for name in names)
    here = section(text, "yes")
    assert "seeds 100 to 107" in here
    assert "97.5 % t interval" in here  # two comparisons share 5 %
    assert "moved onto the measured mean at the last place" in here
    assert "seeds 100 to 105" in section(text, "hurried")
    assert "Two papers &amp; their <code>words</code> disagree." in here
    svg = (place / "report" / "figures" / "atlas-yes-curves.svg").read_text()
    assert "slope 0.69" in svg
    assert ", theory 0.693, gap " in svg


def test_an_identity_has_no_figure_of_intervals(whole):
    _, text, _ = whole
    here = section(text, "identity")
    assert 'id="figure-atlas-identity-curves"' in here
    assert 'id="figure-atlas-identity"' not in here


def test_what_is_shown_beyond_the_verdict(whole):
    _, text, page = whole
    here = section(text, "yes")
    assert 'id="figure-atlas-yes-more"' in here
    assert "A figure of its own." in here
    assert ["he <1>", "0.25"] in page.rows
    assert "<li>So it is.</li>" in here


def test_a_damaged_record_costs_its_finding_the_verdict_alone(whole):
    _, text, _ = whole
    here = section(text, "damaged")
    assert "cannot be judged: " in here
    assert "outputs unreadable" in here
    assert "python -m experiments damaged" in here


def test_every_comparison_is_a_row_of_the_table(whole):
    place, _, _ = whole
    frame = pd.read_csv(place / "report" / "tables" / "atlas.csv")
    assert list(frame) == ["finding", "comparison", "unit", "low", "mean", "high", "region",
                           "theory", "seeds", "verdict", "quick"]  # fmt: skip
    for name, quick in (("no", False), ("hurried", True)):
        found = next(f for f in KNOWN if f.id == name)
        verdict = findings.verdict(found, findings.lookup(found, [place / "runs"]), quick=quick)
        here = frame[frame["finding"] == name]
        for row, result in zip(here.to_dict("records"), verdict.results, strict=True):
            assert (row["low"], row["mean"], row["high"]) == (result.low, result.mean, result.high)
            assert row["verdict"] == result.word
            assert row["seeds"] == (6 if quick else 8)
            assert row["theory"] == result.comparison.region.theory
            assert row["quick"] == quick
    assert frame.set_index("finding").loc["absent", "verdict"].tolist() == ["not run"] * 2


# --- the parts of it ------------------------------------------------------------------------------


def test_curves_are_read_for_the_seeds_that_are_there():
    found = finding("made up")
    records = {("he", seed): profile(1.1, level=seed) for seed in (100, 107)}
    frame = atlas.curves(found, lambda arm, seed: records.get((arm, seed)))
    assert set(frame["curve"]) == {"he"}
    assert sorted(set(frame["seed"])) == [100, 107]
    one = frame[frame["seed"] == 107]
    np.testing.assert_allclose(one["value"], (107 * 1.1 ** (-np.arange(18) / 2)) ** 2)
    np.testing.assert_allclose(one["theory"], 1.0)
    assert one["scaled"].all()
    quick = atlas.curves(found, lambda arm, seed: records.get((arm, seed)), quick=True)
    assert sorted(set(quick["seed"])) == [100]
    assert atlas.curves(replace(found, figure=None), records.get).empty


def test_a_curve_of_several_arms_needs_them_all():
    def read(*records):
        values = [along()(record)[1][0] for record in records]
        return np.arange(1.0, len(values) + 1), np.array(values)

    found = replace(finding("made up"), figure=Figure((Curve("both", ("he", "xavier"), read),),
                    x="depth", y="square"))  # fmt: skip
    records = {("he", 100): profile(1.0, 2.0), ("xavier", 100): profile(1.0, 3.0),
               ("he", 101): profile(1.0)}  # fmt: skip
    frame = atlas.curves(found, lambda arm, seed: records.get((arm, seed)))
    assert frame["value"].tolist() == pytest.approx([4.0, 9.0])
    assert frame["theory"].isna().all()
    assert frame["seed"].tolist() == [100, 100]


def test_a_figure_that_cannot_be_drawn_costs_no_verdict(tmp_path):
    found = finding("odd", comparisons=(
        Comparison("ρ", ("he",), growth(), about(1.0, 0.1), ratio=True),
        Comparison("ρ too", ("xavier",), growth(), about(0.5, 0.1), ratio=True),
    ))  # fmt: skip
    read = single_reading("nothing").effect
    found = replace(found, figure=Figure((Curve("odd", "he", read),), x="x", y="y"))
    write_runs(tmp_path, found, (1.0, 0.5))
    (entry,) = atlas.read([found], [tmp_path])
    assert entry.verdict.word == REPRODUCED
    assert entry.curves.empty
    assert entry.problems == (
        "odd: its figure cannot be drawn: probes: no nothing was recorded",
    )  # fmt: skip


def test_without_a_run_of_any_finding_there_is_no_atlas(tmp_path, fast):
    report_store.write_run(tmp_path / "runs", 0.25, depth=8, skip="none")
    out = tmp_path / "report"
    path = report.write_report(load_runs(tmp_path / "runs"), out, findings=KNOWN)
    assert not (out / "atlas.html").exists()
    assert "atlas" not in path.read_text(encoding="utf-8")


def test_a_report_without_findings_takes_the_older_ones_atlas_away(tmp_path, fast):
    write_runs(tmp_path / "runs", KNOWN[0], (1.0, 0.5), seeds=1)
    out, runs = tmp_path / "report", load_runs(tmp_path / "runs")
    report.write_report(runs, out, findings=KNOWN[:1])
    here = section((out / "atlas.html").read_text(encoding="utf-8"), "yes")
    assert "not run (2 of 16 runs are there)" in here
    assert (out / "figures" / "atlas-yes-curves.svg").exists()
    report.write_report(runs, out)
    left = sorted(path.name for path in out.rglob("*") if path.is_file())
    assert left == ["index.html"]


def test_the_command_line_tells_the_counts(tmp_path, capsys, fast):
    write_runs(tmp_path / "runs", KNOWN[0], (1.0, 0.5), seeds=1)
    out = tmp_path / "out"
    known = {found.id: found for found in KNOWN[:1]}
    arguments = [str(tmp_path / "runs"), "--out", str(out)]
    assert report.main(arguments, findings=lambda: known) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "1 finding: 1 not run", str(out / "atlas.html"), str(out / "index.html")
    ]  # fmt: skip


def test_every_chapter_is_introduced_in_a_few_sentences():
    assert list(atlas.INTRODUCTIONS) == list(CHAPTERS)
    for text in atlas.INTRODUCTIONS.values():
        assert 2 <= len(re.findall(r"[.:?](?= [A-Z]|$)", text)) <= 4
        assert len(text) < 500
