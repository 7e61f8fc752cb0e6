"""The page in a real browser: what is chosen is shown, and what is shown is what was recorded."""

import itertools
import math
import re

import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex
from playwright.sync_api import expect

from gradflow import tables
from gradflow.store import load_runs

pytestmark = pytest.mark.browser
QUANTITY = "weight_grad_norm"


def number(text):
    text = text.replace("−", "-")
    return {"NaN": float("nan"), "Inf": float("inf")}.get(text) or float(text)


def chosen(page, side):
    return page.locator(f"#{side}-run option:checked").inner_text()


def run_of(place, name):
    """The run that a picker calls `plain, depth 56, seed 0`."""
    arm, depth, seed = re.match(r"(.+), depth (\d+), seed (\w+)", name).groups()
    overview = tables.overview(load_runs(place / "runs"))
    rows = overview[(overview["group"] == 0) & (overview["arm"] == arm)]
    rows = rows[(rows["depth"] == int(depth)) & (rows["seed"].map(str) == seed)]
    (run_id,) = rows["run_id"]
    return next(run for run in load_runs(place / "runs") if run.run_id == run_id)


def open_values(page):
    page.locator("#values-box summary").click()
    page.locator("#values tbody tr").first.wait_for()  # filled once the browser tells it is open


def values_on(page):
    """The open table's rows: layer -> (A's number, B's)."""
    rows = page.locator("#values tbody tr").all()
    cells = [row.locator("th, td").all_inner_texts() for row in rows]
    return {layer: tuple(numbers) for layer, *numbers in cells}


def set_step(page, index):
    page.evaluate(
        "i => { const s = document.getElementById('step'); s.value = i;"
        " s.dispatchEvent(new Event('input')); }",
        index,
    )


def test_the_first_view_is_the_deepest_pair(visit, place):
    page = visit().page
    assert chosen(page, "a") == "plain, depth 56, seed 0"
    assert chosen(page, "b") == "residual, depth 56, seed 0"
    assert page.locator("#linked").is_checked()
    assert page.locator("#heat-a .uplot, #heat-b .uplot, #profile .uplot").count() == 3
    assert "exploding" in page.locator("#a-about").inner_text()
    assert "healthy" in page.locator("#b-about").inner_text()


def test_numbers_equal_the_stores_at_every_step(visit, place):
    page = visit().page
    open_values(page)
    runs = [run_of(place, chosen(page, side)) for side in "ab"]
    frames = [run.frame("weights").set_index(["step", "layer"])[QUANTITY] for run in runs]
    steps = runs[0].steps_of("weights").tolist()
    assert int(page.locator("#step").get_attribute("max")) == len(steps) - 1
    compared = 0
    for index, step in enumerate(steps):
        set_step(page, index)
        assert page.locator("#step-out").inner_text().split(" ")[0] == str(step)
        shown = values_on(page)
        assert len(shown) == 56  # convolutions and the linear layer
        for layer, cells in shown.items():
            for cell, frame in zip(cells, frames, strict=True):
                assert number(cell) == pytest.approx(frame[step, layer], rel=6e-3)  # three digits
                compared += 1
    assert compared == 2 * 56 * len(steps)


def test_pointing_at_a_cell_tells_both_runs_values(visit, place):
    page = visit().page
    runs = [run_of(place, chosen(page, side)) for side in "ab"]
    over = page.locator("#heat-a .u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.25)
    layer, step, a, b = re.match(
        r"(\S+), step (\d+)\nplain, depth 56, seed 0: (\S+)\nresidual, depth 56, seed 0: (\S+)$",
        page.locator("#tip").inner_text(),
    ).groups()
    for run, told in zip(runs, (a, b), strict=True):
        stored = run.frame("weights").set_index(["step", "layer"])[QUANTITY][int(step), layer]
        assert number(told) == pytest.approx(stored, rel=6e-3)


def test_a_cells_colour_is_its_values(visit, place):
    """One pixel of the heatmap against the colour scale's ends, which the page names."""
    page = visit().page
    low, high = (number(page.locator(f"#scale .{end}").inner_text()) for end in ("low", "high"))
    stored = [run_of(place, chosen(page, side)).frame("weights") for side in "ab"]
    layers = set(values_of_first(page))
    values = [v for f in stored for v in f[f["layer"].isin(layers)][QUANTITY].to_numpy(float)]
    assert low == pytest.approx(min(values), rel=6e-3)
    assert high == pytest.approx(max(values), rel=6e-3)
    colours = page.evaluate("gradflow.viridis")
    assert colours == [to_hex(color) for color in colormaps["viridis"].colors]
    corner = page.evaluate(
        """() => { const u = document.getElementById('heat-a').chart, b = u.bbox;
        const p = u.ctx.getImageData(b.left + b.width - 3, b.top + b.height - 3, 1, 1).data;
        return '#' + [...p].slice(0, 3).map(v => v.toString(16).padStart(2, '0')).join(''); }"""
    )
    first = stored[0].set_index(["step", "layer"])[QUANTITY]
    share = math.log(first[stored[0]["step"].max(), "conv1"] / min(values)) / math.log(
        max(values) / min(values)
    )
    assert abs(colours.index(corner) - share * 255) <= 1


def values_of_first(page):
    open_values(page)
    return values_on(page)


def test_the_picker_finds_and_its_partner_follows(visit):
    page = visit().page
    every = page.locator("#a-run option").count()
    page.locator("#a-filter").fill("20 plain")
    names = page.locator("#a-run option").all_inner_texts()
    assert 1 < len(names) < every
    assert all("plain, depth 20" in name for name in names[1:])  # the chosen one stays on top
    page.locator("#a-filter").press("Enter")
    assert chosen(page, "a") == "plain, depth 20, seed 0"
    assert chosen(page, "b") == "residual, depth 20, seed 0"
    assert page.locator("#heat-a-title").inner_text() == "plain, depth 20, seed 0"
    page.locator("#b-run").select_option(label="residual, depth 56, seed 1")
    assert not page.locator("#linked").is_checked()
    assert chosen(page, "a") == "plain, depth 20, seed 0"
    page.locator("#linked").check()
    assert chosen(page, "b") == "residual, depth 20, seed 0"


@pytest.mark.parametrize(
    ("words", "count", "every"),
    [
        ("3 plain", 1, "plain, depth 56, seed 3 (diverged)"),  # no digit of an id
        ("56 res 1", 1, "residual, depth 56, seed 1"),
        ("cifar-20-identity", 3, "residual, depth 20, seed"),
        ("zzz", 0, "plain, depth 56, seed 0"),  # the chosen one is kept, and not counted
    ],
)
def test_numbers_are_whole_words_and_others_begin_one(visit, words, count, every):
    page = visit().page
    total = page.locator("#a-run option").count()
    page.locator("#a-filter").fill(words)
    assert page.locator("#a-found").inner_text() == f"{count or 'none'} of {total}"
    assert every in page.locator("#a-run option").all_inner_texts()[-1]


def test_the_ends_of_a_profile_are_its_first_and_last_layer(visit):
    page = visit().page
    first = page.locator("#readout").inner_text().splitlines()[0]
    ends = "35700 at conv1, 1 at fc, conv1 over fc 35700"  # 1.21^55
    assert first == f"A: plain, depth 56, seed 0: {ends}"
    page.locator("#a-run").select_option(label="plain, depth 56, seed 3 (diverged)")
    expect(page.locator("#heat-a-title")).to_have_text("plain, depth 56, seed 3 (diverged)")
    set_step(page, 5)
    lost = page.locator("#readout").inner_text().splitlines()[0]
    ends = "NaN at conv1, NaN at fc"
    assert lost == f"A: plain, depth 56, seed 3: {ends}, NaN or Inf in 56 of 56"
    groups = page.locator("#x-group option").all_inner_texts()
    page.locator("#x-group").select_option(next(n for n in groups if n.startswith("mlp")))
    expect(page.locator("#readout")).to_have_text(
        "A: plain, depth 30, seed 0: 0 at layers.0, 1 at layers.29, exactly zero in 5 of 30"
    )


def test_steps_are_whole_numbers_on_every_axis(visit):
    words = """id => { const { chart } = document.getElementById(id);
        return chart.axes[0].values(chart, [0, 0.5, 1, 1000]); }"""
    assert visit().page.evaluate(words, "loss") == ["0", "", "1", "1,000"]


def test_runs_of_other_depths_are_compared_at_relative_depth(visit, place):
    """A: plain, 20; B: residual, 56; both gradients are closed forms of the layer."""
    page = visit().page
    page.locator("#a-run").select_option(label="plain, depth 20, seed 0")
    page.locator("#b-run").select_option(label="residual, depth 56, seed 0")
    page.locator("#x-axis").select_option("relative")
    x, y = page.evaluate(
        "() => document.getElementById('difference').chart.data.map(d => Array.from(d))"
    )
    assert len(x) == 20
    assert (x[0], x[-1]) == (0, 1)
    for i in range(20):
        exact = i / 19 * 55
        low, high = math.floor(exact), math.ceil(exact)
        # residual: ordinal^-0.7; plain: 1.21^(depth - ordinal); of the logarithm between layers
        logs = [-0.7 * math.log10(k + 1) for k in (low, high)]
        b = logs[0] + (logs[1] - logs[0]) * (exact - low)
        assert y[i] == pytest.approx(b - (20 - (i + 1)) * math.log10(1.21), abs=2e-4)


def test_a_zoom_in_one_heatmap_is_one_in_the_other(visit):
    page = visit().page
    over = page.locator("#heat-a .u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    scale = """n => { const { x, y } = document.getElementById(n).chart.scales;
        return [x.min, x.max, y.min, y.max]; }"""
    whole = page.evaluate(scale, "heat-a")
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.75 * box["height"], steps=5)
    page.mouse.up()
    zoomed = page.evaluate(scale, "heat-a")
    assert zoomed == pytest.approx(page.evaluate(scale, "heat-b"))
    for low, high, first, last in ((*zoomed[:2], *whole[:2]), (*zoomed[2:], *whole[2:])):
        assert (high - low) / (last - first) == pytest.approx(0.5, abs=0.02)
    page.mouse.dblclick(box["x"] + 10, box["y"] + 10)
    assert page.evaluate(scale, "heat-b") == pytest.approx(whole)


def test_a_click_in_a_heatmap_moves_the_slider(visit):
    page = visit().page
    over = page.locator("#heat-b .u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    page.mouse.click(box["x"] + box["width"] - 2, box["y"] + 20)
    assert page.locator("#step").input_value() == page.locator("#step").get_attribute("max")


def test_quantities_and_families(visit):
    page = visit().page
    names = page.locator("#x-quantity option").all_inner_texts()
    assert len(names) == len(set(names)) >= 5
    for name in names:
        page.locator("#x-quantity").select_option(label=name)
        expect(page.locator("#profile-title")).to_have_text(f"{name}, step 0")
        assert page.locator("#heat-b .uplot").count() == 1
    page.locator("#x-quantity").select_option("weights/weight_grad_norm")
    page.locator("#x-family").select_option("norm")
    open_values(page)
    assert all(".bn" in f".{layer}" for layer in values_on(page))


def test_facets_by_depth_and_by_seed(visit):
    page = visit().page
    titles = page.locator("#facet-panels figcaption")
    assert titles.all_inner_texts() == ["depth 20", "depth 56"]
    assert page.locator("#facet-legend > span").all_inner_texts() == ["plain", "residual"]
    page.locator("#x-facet").select_option("seed")
    page.locator("#facet-panels figcaption", has_text="seed 0").wait_for()
    assert titles.all_inner_texts()[:3] == ["seed 0", "seed 1", "seed 2"]


def test_a_verdict_opens_its_pair(visit):
    page = visit().page
    page.locator("#a-run").select_option(label="plain, depth 20, seed 1")
    page.get_by_role("button", name="Look at this pair").first.click()
    page.locator("#heat-a-title", has_text="depth 56").wait_for()
    assert (chosen(page, "a"), chosen(page, "b")) == (
        "plain, depth 56, seed 0", "residual, depth 56, seed 0")  # fmt: skip


def test_playing_moves_the_slider_to_the_end(visit):
    page = visit().page
    page.get_by_role("button", name="Play").click()
    last = page.locator("#step").get_attribute("max")
    expect(page.locator("#step")).to_have_value(last, timeout=20_000)
    page.get_by_role("button", name="Play").wait_for()


def test_the_keyboard_alone_is_enough(visit, place):
    page = visit().page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "leap"
    page.locator("#step").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#step-out").inner_text() == "1"
    assert page.locator("#step").get_attribute("aria-valuetext") == "step 1"
    page.locator("#heat-a").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    told = page.locator("#readout").inner_text()
    step, layer, value = re.match(
        r"plain, depth 56, seed 0, step (\d+), (\S+): (\S+)$", told
    ).groups()
    stored = run_of(place, chosen(page, "a")).frame("weights").set_index(["step", "layer"])
    assert (step, layer) == ("2", "layer1.0.conv1")
    assert number(value) == pytest.approx(stored[QUANTITY][2, layer], rel=6e-3)
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    assert page.locator("html").get_attribute("data-theme") == "light"


def test_everything_has_a_name_for_those_who_do_not_see_it(visit):
    page = visit().page
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll(
          'button, select, input, [role=img], img, [tabindex]')]
        .filter(e => !e.hidden && !(e.getAttribute('aria-label') || e.getAttribute('alt')
          || e.textContent.trim() && e.tagName === 'BUTTON' || e.labels?.length))
        .map(e => e.outerHTML.slice(0, 100))"""
    )
    assert unnamed == []
    assert page.locator("main").count() == page.locator("h1").count() == 1
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def contrast(one, two):
    """WCAG 2.2's contrast ratio of two `rgb(…)` colours."""

    def light(colour):
        parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((light(one), light(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desk", "phone"])
def test_it_reads_in_either_theme_and_fits_a_phone(visit, size, theme):
    page = visit(size=size, theme=theme).page
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for selector in ("h1", ".note", ".card .word", ".card .asked", "nav a", "#a-about", "td"):
        pair = page.evaluate(
            """s => { const e = document.querySelector(s); let b = e, back;
            while (b && (back = getComputedStyle(b).backgroundColor) === 'rgba(0, 0, 0, 0)')
              b = b.parentElement;
            return [getComputedStyle(e).color, back]; }""",
            selector,
        )
        assert contrast(*pair) >= 4.5, selector
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (contrast(dark, "rgb(0,0,0)") < 2) == (theme == "dark")


def test_a_theme_that_was_chosen_stays(visit):
    page = visit(theme="dark").page
    page.locator("#theme").click()  # from the system's to light
    assert (
        contrast(page.evaluate("getComputedStyle(document.body).backgroundColor"), "rgb(0,0,0)")
        > 10
    )
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.locator("html").get_attribute("data-theme") == "light"
