"use strict";
// The explorer: two runs side by side, layer by layer and step by step, and the group's profiles.
(() => {
  const $ = (id) => document.getElementById(id);
  const state = { group: null, quantity: null, family: null, axis: "index", step: 0, facet: "depth" };
  const sides = { a: { run: null, view: null }, b: { run: null, view: null } };
  let steps = []; // at which either run has the quantity
  let zooming = false;
  let timer = null;

  const NAMES = { weights: "convolutions and linear layers", norm: "normalisation layers",
    aside: "layers of one arm alone", block: "blocks" };
  const PLAIN = "plain";

  const seedWord = (run) => (run.seed === null ? "" : `seed ${run.seed}`);
  const depthWord = (run) => (run.depth === null ? "" : `depth ${run.depth}`);
  const shortName = (run) =>
    [run.arm, depthWord(run), seedWord(run)].filter(Boolean).join(", ");
  const longName = (run) => (run.depth === null && run.seed === null
    ? `${run.name}` : `${shortName(run)}${run.status === "done" ? "" : ` (${run.status})`}`);

  function option(value, words, chosen) {
    const element = new Option(words, value, false, value === chosen);
    return element;
  }

  const members = () => gradflow.index.runs.filter((run) => String(run.group) === state.group
    && gradflow.hasView(run.id));

  // --- which runs --------------------------------------------------------------------------------

  function fillGroups() {
    const groups = gradflow.index.groups.filter((group) =>
      gradflow.index.runs.some((run) => run.group === group.number && gradflow.hasView(run.id)));
    if (!groups.some((group) => String(group.number) === state.group)) {
      state.group = groups.length ? String(groups[0].number) : null;
    }
    $("x-group").replaceChildren(...groups.map((group) =>
      option(String(group.number), `${group.title || "all runs"} (${group.runs})`, state.group)));
    $("x-group-label").hidden = groups.length < 2;
  }

  // Those that differ from a run in the skip alone.
  const partners = (run) => members().filter((one) => run.depth !== null && run.seed !== null
    && one.depth === run.depth && one.seed === run.seed && one.arm !== run.arm);

  // Beside a run: of a plain one its first arm, else the plain one; any other where it has no partner.
  function partner(run) {
    const others = partners(run);
    return others.find((one) => one.arm === PLAIN) ?? others.find((one) => one.arm === "residual")
      ?? others[0] ?? members().find((one) => one !== run) ?? null;
  }

  function firstRun() {
    const ranked = members().filter((run) => run.status === "done");
    const found = ranked.length ? ranked : members();
    const deepest = Math.max(...found.map((run) => run.depth ?? 0));
    return found.find((run) => run.arm === PLAIN && (run.depth ?? 0) === deepest) ?? found[0];
  }

  function chooseRuns() {
    const known = (id) => members().find((run) => run.id === id);
    sides.a.run = known(sides.a.run?.id) ?? firstRun() ?? null;
    const b = known(sides.b.run?.id);
    sides.b.run = $("linked").checked || !b ? (sides.a.run ? partner(sides.a.run) : null) : b;
    fillPickers();
  }

  function fillPickers() {
    for (const side of ["a", "b"]) fillPicker(side);
    const paired = Boolean(sides.a.run && partners(sides.a.run).length);
    $("b-picker").hidden = $("b-heat").hidden = !sides.b.run;
    $("linked-label").hidden = !paired;
    $("unpaired").hidden = paired;
  }

  // A number is a word of the run's, as a whole: ids are full of digits. Others begin one.
  function fits(word, run) {
    const text = `${longName(run)} ${run.diagnosis}`.toLowerCase();
    const own = [...text.split(/[\s,;()]+/), run.name.toLowerCase(), run.id];
    return own.some((one) => (/^\d+$/.test(word) ? one === word : one.startsWith(word)));
  }

  function fillPicker(side) {
    const words = $(`${side}-filter`).value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = members().filter((run) => words.every((word) => fits(word, run)));
    const count = found.length;
    const chosen = sides[side].run;
    if (chosen && !found.includes(chosen)) found.unshift(chosen);
    $(`${side}-run`).replaceChildren(...found.map((run) =>
      option(run.id, longName(run), chosen?.id)));
    $(`${side}-found`).textContent = words.length
      ? `${count || "none"} of ${members().length}` : "";
    $(`${side}-about`).textContent = chosen ? about(chosen) : "";
  }

  const about = (run) => [
    run.diagnosis && `gradient: ${run.diagnosis}`,
    run.train_error !== null && `training error ${run.train_error.toFixed(3)}`,
    run.test_error !== null && `test error ${run.test_error.toFixed(3)}`,
    run.status !== "done" && run.outcome,
  ].filter(Boolean).join("; ");

  // --- what of them ------------------------------------------------------------------------------

  const key = () => state.quantity.split("/");

  function fillQuantities() {
    const found = [];
    for (const { view } of Object.values(sides)) {
      for (const [table, { quantities }] of Object.entries(view?.tables ?? {})) {
        for (const quantity of Object.keys(quantities)) found.push(`${table}/${quantity}`);
      }
    }
    const every = [...new Set(found)];
    if (!every.includes(state.quantity)) state.quantity = every[0] ?? null;
    $("x-quantity").replaceChildren(...every.map((name) => {
      const quantity = name.split("/")[1];
      return option(name, gradflow.index.labels[quantity] ?? quantity.replaceAll("_", " "),
        state.quantity);
    }));
    if (!state.quantity) return;
    const [table] = key();
    const families = new Set(Object.values(sides).flatMap(({ view }) =>
      view?.tables[table]?.family ?? []));
    if (!families.has(state.family)) {
      state.family = families.has("weights") ? "weights" : [...families][0];
    }
    $("x-family").replaceChildren(...[...families].map((name) =>
      option(name, NAMES[name] ?? name, state.family)));
  }

  const label = () => {
    const quantity = key()[1];
    return gradflow.index.labels[quantity] ?? quantity.replaceAll("_", " ");
  };

  const shows = ({ view }) => Boolean(view && state.quantity && view.has(...key()));

  function fillSteps() {
    const before = steps[state.step];
    steps = [...new Set(Object.values(sides).filter(shows)
      .flatMap(({ view }) => view.steps(...key())))].sort((one, two) => one - two);
    const nearest = before === undefined ? 0 : closest(steps, before);
    state.step = Math.max(0, nearest);
    const slider = $("step");
    slider.max = String(Math.max(0, steps.length - 1));
    slider.value = String(state.step);
    slider.disabled = steps.length < 2;
    $("play").disabled = steps.length < 2;
    tellStep();
  }

  function closest(sorted, wanted) {
    let best = 0;
    sorted.forEach((value, i) => {
      if (Math.abs(value - wanted) < Math.abs(sorted[best] - wanted)) best = i;
    });
    return best;
  }

  function tellStep() {
    const step = steps[state.step] ?? 0;
    const words = step === 0 ? "0 (start)" : step.toLocaleString("en");
    $("step-out").textContent = words;
    $("step").setAttribute("aria-valuetext", `step ${words}`);
  }

  // The index of the step at which a view was recorded nearest to the slider's.
  const at = (view) => closest(view.steps(...key()), steps[state.step]);

  function profile(view, step = at(view)) {
    const [table, quantity] = key();
    const layers = view.layers(table, state.family);
    const count = layers.length;
    return {
      layers,
      x: layers.map((_, i) => (state.axis === "index" ? i + 1 : count > 1 ? i / (count - 1) : 0)),
      y: layers.map(({ column }) => view.value(table, quantity, step, column)),
    };
  }

  // The colours' range over both runs, and whether a logarithm fits: what may be negative has none.
  function measure() {
    const [table, quantity] = key();
    const seen = { zero: false, bad: false, missing: false };
    let [low, high, negative] = [Infinity, -Infinity, false];
    for (const { view } of Object.values(sides).filter(shows)) {
      const layers = view.layers(table, state.family);
      view.steps(table, quantity).forEach((_, step) => layers.forEach(({ column }) => {
        const value = view.value(table, quantity, step, column);
        if (value === undefined) seen.missing = true;
        else if (!Number.isFinite(value)) seen.bad = true;
        else if (value < 0) negative = true;
        else if (value === 0) seen.zero = true;
        if (Number.isFinite(value)) {
          low = value === 0 ? low : Math.min(low, value);
          high = value === 0 ? high : Math.max(high, value);
        }
      }));
    }
    const log = !negative;
    if (!Number.isFinite(low)) [low, high] = log ? [1, 10] : [0, 1];
    seen.zero &&= log;
    const range = log ? [Math.log10(low), Math.log10(high)] : [low, high];
    return { log, range, seen };
  }

  // --- drawing -----------------------------------------------------------------------------------

  let shown = { log: true, range: [0, 1], seen: {} };

  function drawHeat(side) {
    const { run, view } = sides[side];
    const figure = $(`heat-${side}`);
    $(`heat-${side}-title`).textContent = run ? longName(run) : "";
    if (!shows(sides[side])) {
      gradflow.clear(figure);
      return;
    }
    const [table, quantity] = key();
    const layers = view.layers(table, state.family);
    const found = view.steps(table, quantity);
    gradflow.heat(figure, {
      rows: layers.length, steps: found, range: shown.range, log: shown.log,
      value: (row, column) => view.value(table, quantity, column, layers[row].column),
      yLabel: table === "blocks" ? "block, from the input" : "layer, from the input",
      current: () => at(view),
      onStep: (column) => setStep(closest(steps, found[column])),
      onHover: (place) => hover(side, place, layers, found),
      onZoom: (u, ranges) => follow(side, u, ranges),
    });
    describe(figure, `Heatmap of ${label()}, ${layers.length} layers by ${found.length} steps, ${
      longName(run)}. Arrow keys move the step and the layer that is read out.`);
  }

  function describe(figure, words) {
    const box = figure.querySelector(".uplot");
    if (!box) return;
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", words);
  }

  // A zoom in one heatmap is one in the other, as shares of its layers and steps.
  function follow(side, u, ranges) {
    const other = $(`heat-${side === "a" ? "b" : "a"}`).chart;
    if (zooming || !other || !u.whole) return;
    zooming = true;
    for (const scale of ["x", "y"]) {
      const [low, high] = u.whole[scale];
      const [first, last] = other.whole[scale];
      const moved = ranges[scale].map((v) =>
        first + ((v - low) / (high - low)) * (last - first));
      other.setScale(scale, { min: moved[0], max: moved[1] });
    }
    zooming = false;
  }

  function hover(side, place, layers, found) {
    const tip = $("tip");
    if (!place || !layers[place.row] || found[place.column] === undefined) {
      tip.hidden = true;
      return;
    }
    const [table, quantity] = key();
    const lines = [`${layers[place.row].name}, step ${found[place.column].toLocaleString("en")}`];
    for (const name of ["a", "b"]) {
      const { run, view } = sides[name];
      if (!shows(sides[name])) continue;
      const own = view.layers(table, state.family);
      const same = own[Math.round((place.row / Math.max(1, layers.length - 1)) * (own.length - 1))];
      const step = closest(view.steps(table, quantity), found[place.column]);
      lines.push(`${shortName(run)}: ${gradflow.number(view.value(table, quantity, step, same.column))}${
        same.name === layers[place.row].name ? "" : ` (${same.name})`}`);
    }
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const box = place.u.over.getBoundingClientRect();
    const left = box.left + place.u.cursor.left + 14;
    tip.style.left = `${Math.min(left, window.innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${box.top + place.u.cursor.top + 14}px`;
  }

  const xLabel = () => (state.axis === "relative" ? "relative depth, from input (0) to output (1)"
    : key()[0] === "blocks" ? "block, counted from the input" : "layer, counted from the input");
  const xWord = (value) => (state.axis === "relative"
    ? String(Number(value.toFixed(3))) : Number.isInteger(value) ? String(value) : "");

  const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();

  // An arm's own; B in ink where A has the same arm.
  function lineStyle(side) {
    const [own, other] = [sides[side].run, sides.a.run].map((run) => run?.arm);
    const twin = side === "b" && own === other;
    return { ...gradflow.armStyle(own), ...(twin ? { color: ink(), dash: [2, 3] } : {}) };
  }

  function both() {
    return ["a", "b"].filter((side) => shows(sides[side])).map((side) => {
      const { run, view } = sides[side];
      const found = profile(view);
      const step = view.steps(...key())[at(view)];
      return { ...found, run, view, step, ...lineStyle(side), label: `${side.toUpperCase()}: ${shortName(run)}${
          step === steps[state.step] ? "" : ` (step ${step.toLocaleString("en")})`}` };
    });
  }

  function drawProfile() {
    const lines = both();
    $("profile-title").textContent = `${label()}, step ${(steps[state.step] ?? 0).toLocaleString("en")}`;
    gradflow.lines($("profile"), { series: lines, xLabel: xLabel(), yLabel: "",
      log: shown.log, xWord, height: 280, sync: "layers",
      range: $("same-axis").checked ? pad(shown.range) : null });
    describe($("profile"), `Profile of ${label()} over the layers at step ${steps[state.step]}.`);
    drawDifference(lines);
    tabulate(lines);
    readOut(lines);
  }

  const pad = ([low, high]) => {
    const space = Math.max(0.05 * (high - low), 0.05);
    return [low - space, high + space];
  };

  // B over A, layer by layer, or B − A of what may be negative; of runs of other depths at A's
  // relative depths, between B's layers by interpolation (of the logarithm).
  function drawDifference([a, b]) {
    const place = $("difference");
    $("difference-title").textContent = "";
    $("static").hidden = !a || !b || a.run === b.run;
    if ($("static").hidden) {
      gradflow.clear(place);
      return;
    }
    const y = compare(a, b);
    const words = shown.log ? "B / A" : "B − A";
    $("difference-title").textContent = `${words} at equal relative depth: ${
      shortName(b.run)} against ${shortName(a.run)}`;
    gradflow.lines(place, { series: [{ label: words, x: a.x, y, color: ink() }],
    xLabel: xLabel(), yLabel: "", log: shown.log, xWord, height: 190, sync: "layers", zero: true });
    describe(place, `${words} over the layers, at step ${steps[state.step]}.`);
    $("static-command").textContent = command(a.run, b.run);
  }

  // What draws this pair for a paper, without the options that are at their default.
  function command(a, b) {
    const options = [["step", steps[state.step], 0], ["quantity", key()[1], "weight_grad_norm"],
      ["family", state.family, key()[0] === "blocks" ? "block" : "weights"],
      ["axis", state.axis === "index" ? "layers" : state.axis, "layers"]];
    return ["python -m analysis.compare", a.path, b.path, ...options
      .filter(([, value, usual]) => value !== usual).map(([name, value]) => `--${name} ${value}`)].join(" ");
  }

  function compare(a, b) {
    const share = (i, n) => (n > 1 ? i / (n - 1) : 0);
    return a.y.map((value, i) => {
      const exact = share(i, a.y.length) * (b.y.length - 1);
      const [low, high] = [Math.floor(exact + 1e-9), Math.ceil(exact - 1e-9)];
      const [one, two] = [b.y[low], b.y[high]].map((v) => gradflow.drawable(v, shown.log));
      const own = gradflow.drawable(value, shown.log);
      if (one === null || two === null || own === null) return undefined;
      const gap = one + (two - one) * (exact - low) - own;
      return shown.log ? 10 ** gap : gap;
    });
  }

  function drawLoss() {
    const lines = ["a", "b"].map((side) => {
      const { run, view } = sides[side];
      const curve = view?.curve("loss");
      return curve && curve.steps.length > 1 && { x: curve.steps, y: curve.values,
        ...lineStyle(side), label: `${side.toUpperCase()}: ${shortName(run)}` };
    }).filter(Boolean);
    $("loss-box").hidden = !lines.length;
    if (!lines.length) return;
    gradflow.lines($("loss"), { series: lines, xLabel: "step", yLabel: "",
      height: 190, xWord: (v) => (Number.isInteger(v) ? v.toLocaleString("en") : ""),
      at: () => steps[state.step] });
    describe($("loss"), "Training loss by step; the dashed line is the slider's step.");
  }

  function tabulate([a, b]) {
    const body = $("values").querySelector("tbody");
    const head = $("values").querySelector("thead tr");
    head.replaceChildren(...["layer", ...(a ? [a.label] : []), ...(b ? [b.label] : [])].map((t, i) => {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = t;
      cell.className = i ? "number" : "";
      return cell;
    }));
    if (!$("values-box").open || !a) {
      body.replaceChildren();
      return;
    }
    const other = new Map(b ? b.layers.map(({ name }, i) => [name, b.y[i]]) : []);
    const names = [...a.layers.map(({ name }) => name),
      ...(b ? b.layers.map(({ name }) => name) : [])];
    const own = new Map(a.layers.map(({ name }, i) => [name, a.y[i]]));
    body.replaceChildren(...[...new Set(names)].map((name) => {
      const row = document.createElement("tr");
      const cells = [name, own.has(name) ? gradflow.number(own.get(name)) : "–"];
      if (b) cells.push(other.has(name) ? gradflow.number(other.get(name)) : "–");
      row.replaceChildren(...cells.map((text, i) => {
        const cell = document.createElement(i ? "td" : "th");
        cell.textContent = text;
        if (i) cell.className = "number";
        else cell.scope = "row";
        return cell;
      }));
      return row;
    }));
  }

  // The values of the first and the last layer that is shown, and their ratio where it says anything.
  function readOut(lines) {
    $("readout").textContent = lines.map(({ label: name, layers, y }) => {
      const ends = layers.length > 1 ? [0, layers.length - 1] : [0];
      const told = ends.map((i) => `${gradflow.number(y[i])} at ${layers[i].name}`);
      const [first, last] = ends.map((i) => y[i]);
      if (shown.log && [first, last].every((v) => Number.isFinite(v) && v > 0)) {
        told.push(`${layers[0].name} over ${layers.at(-1).name} ${gradflow.number(first / last)}`);
      }
      const counts = [
        ["NaN or Inf", y.filter((v) => v !== undefined && !Number.isFinite(v)).length],
        ["exactly zero", shown.log ? y.filter((v) => v === 0).length : 0],
      ].filter(([, count]) => count);
      told.push(...counts.map(([words, count]) => `${words} in ${count} of ${layers.length}`));
      return `${name}: ${told.join(", ")}`;
    }).join("\n");
  }

  // --- facets ------------------------------------------------------------------------------------

  const MOST_PANELS = 24;
  let facetTurn = 0;

  async function drawFacets() {
    const turn = ++facetTurn;
    const runs = members();
    const found = await Promise.all(runs.map(async (run) => ({ run, view: await gradflow.view(run.id) })));
    if (turn !== facetTurn || !state.quantity) return;
    const there = found.filter(shows);
    const panels = new Map();
    for (const one of there) {
      const name = state.facet === "depth" ? one.run.depth : one.run.seed;
      panels.set(name, [...(panels.get(name) ?? []), one]);
    }
    const names = [...panels.keys()].sort((one, two) =>
      (one === null) - (two === null) || one - two || String(one).localeCompare(String(two)));
    const profiles = new Map(there.map((one) => [one, profile(one.view)]));
    let [low, high] = [Infinity, -Infinity];
    for (const { y } of profiles.values()) {
      for (const value of y) {
        const place = gradflow.drawable(value, shown.log);
        if (place !== null) [low, high] = [Math.min(low, place), Math.max(high, place)];
      }
    }
    const box = $("facet-panels");
    for (const figure of box.children) gradflow.clear(figure);
    box.replaceChildren();
    for (const name of names.slice(0, MOST_PANELS)) {
      box.append(panel(name, panels.get(name), profiles, pad([low, high])));
    }
    for (const figure of box.children) figure.draw();
    $("facet-note").textContent = names.length > MOST_PANELS
      ? `The first ${MOST_PANELS} of ${names.length} are shown.` : "";
    legend(there);
  }

  function panel(name, found, profiles, range) {
    const figure = document.createElement("figure");
    const title = document.createElement("figcaption");
    const words = name === null ? "not given" : name;
    title.textContent = `${state.facet} ${words}`;
    figure.append(title);
    figure.draw = () => {
      gradflow.lines(figure, {
        series: found.map((one) => {
          const { x, y } = profiles.get(one);
          const style = gradflow.armStyle(one.run.arm);
          return { x, y, label: shortName(one.run), color: style.color, dash: style.dash, width: 1.2 };
        }),
        xLabel: state.axis === "relative" ? "relative depth" : "layer", yLabel: "", log: shown.log,
        height: 190, legend: false, range, xWord,
        onFocus: (one) => {
          title.textContent = `${state.facet} ${words}${one ? `: ${one.label}` : ""}`;
        },
      });
      describe(figure, `${label()} over the layers of ${found.length} runs, ${title.textContent}.`);
    };
    return figure;
  }

  function legend(found) {
    const arms = gradflow.index.groups.find((g) => String(g.number) === state.group)?.arms ?? [];
    const present = new Set(found.map(({ run }) => run.arm));
    $("facet-legend").replaceChildren(...arms.filter((arm) => present.has(arm)).map((arm) => {
      const item = document.createElement("span");
      const line = document.createElement("span");
      const style = gradflow.armStyle(arm);
      line.className = "line";
      line.style.borderTopColor = style.color;
      line.style.borderTopStyle = style.dash.length ? "dashed" : "solid";
      item.append(line, arm);
      return item;
    }));
  }

  // --- what the user does ------------------------------------------------------------------------

  function setStep(index) {
    state.step = Math.max(0, Math.min(steps.length - 1, index));
    $("step").value = String(state.step);
    tellStep();
    drawProfile();
    for (const side of ["a", "b"]) $(`heat-${side}`).chart?.redraw(false);
    $("loss").chart?.redraw(false);
    scheduleFacets();
  }

  let facetTimer = null;
  function scheduleFacets() {
    clearTimeout(facetTimer);
    facetTimer = setTimeout(drawFacets, 120);
  }

  let turn = 0;
  async function redraw() {
    const own = ++turn;
    const views = await Promise.all(["a", "b"].map((side) =>
      sides[side].run ? gradflow.view(sides[side].run.id) : null));
    if (own !== turn) return;
    ["a", "b"].forEach((side, i) => { sides[side].view = views[i]; });
    fillQuantities();
    $("explorer").hidden = !state.quantity;
    if (!state.quantity) return;
    shown = measure();
    fillSteps();
    for (const side of ["a", "b"]) drawHeat(side);
    gradflow.colorBar($("scale"), shown.range, shown.log, shown.seen, label());
    drawProfile();
    drawLoss();
    await drawFacets();
    document.documentElement.dataset.ready = String(own);
  }

  gradflow.refresh = () => {
    fillGroups();
    chooseRuns();
    return redraw();
  };

  function stop() {
    clearInterval(timer);
    timer = null;
    $("play").setAttribute("aria-pressed", "false");
    $("play").textContent = "Play";
  }

  function play() {
    if (timer) {
      stop();
      return;
    }
    if (state.step === steps.length - 1) setStep(0);
    $("play").setAttribute("aria-pressed", "true");
    $("play").textContent = "Pause";
    timer = setInterval(() => {
      if (state.step >= steps.length - 1) stop();
      else setStep(state.step + 1);
    }, 120);
  }

  function pick(side, id) {
    sides[side].run = gradflow.runs.get(id);
    if (side === "a" && $("linked").checked) sides.b.run = partner(sides.a.run);
    if (side === "b") $("linked").checked = sides.b.run === partner(sides.a.run) && $("linked").checked;
    fillPickers();
    redraw();
  }

  function readCell(side, event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    if (!shows(sides[side]) || !(event.key in moves)) return;
    event.preventDefault();
    const { view, run } = sides[side];
    const layers = view.layers(key()[0], state.family);
    const [column, row] = moves[event.key];
    sides[side].row = Math.max(0, Math.min(layers.length - 1, (sides[side].row ?? 0) + row));
    if (column) setStep(state.step + column);
    const layer = layers[sides[side].row];
    const value = view.value(...key(), at(view), layer.column);
    $("readout").textContent = `${shortName(run)}, step ${
      view.steps(...key())[at(view)].toLocaleString("en")}, ${layer.name}: ${gradflow.number(value)}`;
  }

  function listen() {
    $("x-group").addEventListener("change", (e) => {
      state.group = e.target.value;
      sides.a.run = sides.b.run = null;
      $("linked").checked = true;
      gradflow.refresh();
    });
    const settings = { "x-quantity": "quantity", "x-family": "family", "x-axis": "axis" };
    for (const [id, name] of Object.entries(settings)) {
      $(id).addEventListener("change", (e) => {
        state[name] = e.target.value;
        redraw();
      });
    }
    $("x-facet").addEventListener("change", (e) => {
      state.facet = e.target.value;
      drawFacets();
    });
    for (const side of ["a", "b"]) {
      $(`${side}-run`).addEventListener("change", (e) => pick(side, e.target.value));
      $(`${side}-filter`).addEventListener("input", () => fillPicker(side));
      $(`${side}-filter`).addEventListener("keydown", (e) => {
        if (e.key !== "Enter" || !$(`${side}-run`).options.length) return;
        const words = e.target.value.trim();
        const options = [...$(`${side}-run`).options];
        const first = options.find((one) => one.value !== sides[side].run?.id) ?? options[0];
        if (words) pick(side, first.value);
      });
      $(`heat-${side}`).addEventListener("keydown", (e) => readCell(side, e));
      $(`heat-${side}`).addEventListener("pointerleave", () => { $("tip").hidden = true; });
    }
    $("linked").addEventListener("change", () => {
      chooseRuns();
      redraw();
    });
    $("step").addEventListener("input", (e) => {
      stop();
      setStep(Number(e.target.value));
    });
    $("play").addEventListener("click", play);
    $("same-axis").addEventListener("change", () => drawProfile());
    $("values-box").addEventListener("toggle", () => state.quantity && drawProfile());
    document.addEventListener("click", (e) => {
      const pair = e.target.closest("[data-show-a]")?.dataset;
      if (pair) showPair(pair.showA, pair.showB);
    });
  }

  // From the overview: this pair of runs in the explorer.
  function showPair(a, b) {
    const run = gradflow.runs.get(a);
    if (!run) return;
    state.group = String(run.group);
    $("linked").checked = false;
    sides.a.run = run;
    sides.b.run = gradflow.runs.get(b) ?? partner(run);
    gradflow.refresh();
    $("explore").scrollIntoView();
  }

  gradflow.start = () => {
    gradflow.load();
    if (!gradflow.index.runs.some((run) => gradflow.hasView(run.id))) {
      $("explorer").hidden = true;
      return;
    }
    listen();
    gradflow.refresh();
  };
})();
