"use strict";
// Lines and heatmaps: uPlot with logarithmic axes, marks for what no axis shows, and colours.
(() => {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = () => css("--scheme") === "dark";
  const FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
  const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶",
    7: "⁷", 8: "⁸", 9: "⁹" };

  // --- numbers -----------------------------------------------------------------------------------

  gradflow.number = (value) => {
    if (value === undefined || value === null) return "not measured";
    if (Number.isNaN(value)) return "NaN";
    if (!Number.isFinite(value)) return value > 0 ? "Inf" : "−Inf";
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text = size >= 1e-3 && size < 1e5
      ? String(Number(value.toPrecision(3))) : value.toExponential(2);
    return text.replace("e+", "e").replace("-", "−").replace("e-", "e−");
  };

  const power = (exponent) => "10" + String(exponent).replace(/[-0-9]/g, (c) => SUPERSCRIPTS[c]);

  // Ticks of an axis that shows log10 of a value, and what they say.
  function logTicks(low, high) {
    const span = high - low;
    if (span >= 2) {
      const every = Math.max(1, Math.ceil(span / 7));
      const found = [];
      for (let k = Math.ceil(low / every) * every; k <= high; k += every) found.push(k);
      return found;
    }
    const steps = span < 0.15 ? [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2, 2.3, 2.6, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9]
      : span < 0.7 ? [1, 1.5, 2, 3, 4, 5, 7] : [1, 2, 5];
    const found = [];
    for (let k = Math.floor(low); k <= high; k++) {
      for (const step of steps) {
        const place = k + Math.log10(step);
        if (place >= low && place <= high) found.push(place);
      }
    }
    return found;
  }

  const logWord = (place) =>
    Number.isInteger(place) && (place < -2 || place > 3)
      ? power(place) : String(Number((10 ** place).toPrecision(2)));

  gradflow.drawable = (value, log) =>
    value === undefined || !Number.isFinite(value) || (log && value <= 0)
      ? null : log ? Math.log10(value) : value;

  // --- colours -----------------------------------------------------------------------------------

  gradflow.armStyle = (arm) => {
    const style = gradflow.index.arms[arm] ?? { light: "#555555", dark: "#bbbbbb", dash: [] };
    return { color: dark() ? style.dark : style.light, dash: style.dash };
  };

  gradflow.colorAt = (share) => {
    const colors = gradflow.viridis;
    const place = Math.max(0, Math.min(colors.length - 1, Math.round(share * (colors.length - 1))));
    return colors[place];
  };

  function rgb(hex) {
    const value = parseInt(hex.slice(1), 16);
    return [value >> 16, (value >> 8) & 255, value & 255];
  }

  // --- axes --------------------------------------------------------------------------------------

  const axis = (label, more = {}) => ({
    label: label || null, font: FONT, labelFont: FONT, labelSize: 18, labelGap: 2, gap: 4,
    stroke: css("--ink-soft"), grid: { stroke: css("--grid"), width: 1 },
    ticks: { stroke: css("--grid"), size: 4 }, ...more,
  });

  const valueAxis = (label, log) => axis(label, {
    size: 50,
    ...(log ? {
      splits: (_, __, low, high) => logTicks(low, high),
      values: (_, splits) => splits.map(logWord),
    } : {}),
  });

  function padded(low, high, share) {
    if (low === null || low === undefined || !Number.isFinite(low)) return [0, 1];
    const room = Math.max((high - low) * share, 0.04);
    return [low - room, high + room];
  }

  const plain = (extra) => ({
    cursor: { points: { size: 7 }, drag: { x: true, y: false, dist: 5 }, ...extra },
  });

  const charts = new Set();
  function kept(place, chart) {
    charts.add(chart);
    place.chart = chart;
    return chart;
  }

  gradflow.clear = (place) => {
    if (place.chart) {
      charts.delete(place.chart);
      place.chart.destroy();
      place.chart = null;
    }
    for (const child of [...place.children]) if (child.tagName !== "FIGCAPTION") child.remove();
  };

  const room = (place) => Math.max(220, Math.floor(place.clientWidth));
  const watch = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const chart = target.chart;
      if (chart && Math.abs(chart.width - room(target)) > 1) {
        chart.setSize({ width: room(target), height: chart.height });
      }
    }
  });

  const mounted = (place) => {
    const box = document.createElement("div");
    place.prepend(box);
    return box;
  };

  // --- lines -------------------------------------------------------------------------------------

  // What is zero stands as a triangle at the lower edge, what is NaN or infinite as a cross above.
  const edges = (series, log) => ({
    hooks: {
      draw: (u) => {
        const { ctx, bbox } = u;
        const unit = devicePixelRatio;
        ctx.save();
        ctx.font = `${11 * unit}px system-ui`;
        ctx.textAlign = "center";
        for (const one of series) {
          ctx.fillStyle = one.color;
          one.y.forEach((value, i) => {
            if (value === undefined || value === null) return;
            const bad = !Number.isFinite(value);
            if (!bad && !(log && value === 0)) return;
            const x = u.valToPos(one.x[i], "x", true);
            if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) return;
            ctx.fillText(bad ? "×" : "▾", x, bad ? bbox.top + 9 * unit : bbox.top + bbox.height - 2);
          });
        }
        ctx.restore();
      },
    },
  });

  // One chart of lines, each {label, x, y, color, dash, width}; y as measured, not its logarithm.
  gradflow.lines = (place, { series, xLabel, yLabel, log = true, height = 260, legend = true,
    xWord = String, yWord = gradflow.number, at = null, range = null, xRange = null,
    onFocus = null, sync = null, zero = false }) => {
    gradflow.clear(place);
    const tables = series.map((one) => [one.x, one.y.map((v) => gradflow.drawable(v, log))]);
    const joined = tables.length ? uPlot.join(tables) : [[0], [null]];
    const chart = new uPlot({
      width: room(place), height,
      ...plain({ ...(onFocus ? { focus: { prox: 24 } } : {}),
        ...(sync ? { sync: { key: sync, setSeries: false } } : {}) }),
      ...(onFocus ? { focus: { alpha: 0.25 } } : {}),
      legend: { show: legend },
      scales: {
        x: { time: false, ...(xRange ? { range: (u, low, high) =>
          low === joined[0][0] && high === joined[0].at(-1) ? xRange : [low, high] } : {}) },
        y: { range: range ? () => range : (_, low, high) => padded(low, high, 0.07) },
      },
      axes: [axis(xLabel, { size: 34, space: 60,
        values: (_, splits) => splits.map((v) => xWord(v)) }), valueAxis(yLabel, log)],
      series: [
        { label: xLabel, value: (_, v) => (v === null ? "–" : xWord(v)) },
        ...series.map((one) => ({
          label: one.label, stroke: one.color, dash: one.dash, width: one.width ?? 1.8,
          points: { show: one.x.length < 12, size: 5 },
          value: (_, v) => (v === null || v === undefined ? "–" : yWord(log ? 10 ** v : v)),
        })),
      ],
      plugins: [edges(series, log), {
        hooks: { draw: (u) => {
          if (zero) rule(u, "y", 0);
          if (at !== null) rule(u, "x", typeof at === "function" ? at() : at);
        } },
      }],
      hooks: onFocus ? { setSeries: [(_, i) => onFocus(i === null ? null : series[i - 1])] } : {},
    }, joined, mounted(place));
    watch.observe(place);
    return kept(place, chart);
  };

  function rule(u, scale, value) {
    const { ctx, bbox } = u;
    const place = u.valToPos(value, scale, true);
    ctx.save();
    ctx.strokeStyle = css("--ink-soft");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    if (scale === "x") {
      ctx.moveTo(place, bbox.top);
      ctx.lineTo(place, bbox.top + bbox.height);
    } else {
      ctx.moveTo(bbox.left, place);
      ctx.lineTo(bbox.left + bbox.width, place);
    }
    ctx.stroke();
    ctx.restore();
  }

  // --- heatmaps ----------------------------------------------------------------------------------

  function picture(rows, columns, value, [low, high], log) {
    const canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d");
    const image = context.createImageData(columns, rows);
    const colors = gradflow.viridis.map(rgb);
    const special = { missing: rgb(css("--missing")), zero: rgb(css("--zero")), bad: rgb(css("--bad")) };
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const v = value(row, column);
        let color;
        if (v === undefined) color = special.missing;
        else if (!Number.isFinite(v)) color = special.bad;
        else if (log && v === 0) color = special.zero;
        else {
          const share = ((log ? Math.log10(v) : v) - low) / (high - low || 1);
          color = colors[Math.max(0, Math.min(255, Math.round(share * 255)))];
        }
        image.data.set([...color, 255], 4 * ((rows - 1 - row) * columns + column));
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  // A heatmap of `rows` layers (the input at the bottom) by `steps`; each recorded step a column.
  gradflow.heat = (place, { rows, steps, value, range, log, height = 300, current, onStep, onHover,
    onZoom, yLabel }) => {
    gradflow.clear(place);
    const image = picture(rows, steps.length, value, range, log);
    const whole = { x: [-0.5, steps.length - 0.5], y: [0.5, rows + 0.5] };
    const chart = new uPlot({
      width: room(place), height,
      legend: { show: false },
      cursor: { drag: { x: true, y: true, uni: 30, dist: 5 }, points: { show: false } },
      scales: { x: { time: false, range: (u, a, b) => zoomed(a, b, whole.x) },
        y: { range: (u, a, b) => zoomed(a, b, whole.y) } },
      axes: [
        axis("step", { size: 34, grid: { show: false },
          splits: (u, _, low, high) => columnTicks(low, high, u.bbox.width / devicePixelRatio),
          values: (_, found) => found.map((i) => steps[i]?.toLocaleString("en") ?? "") }),
        axis(yLabel, { size: 42, grid: { show: false },
          splits: (_, __, low, high) => layerTicks(low, high) }),
      ],
      series: [{}, { paths: () => null, points: { show: false } }],
      hooks: {
        drawClear: [(u) => {
          const { ctx, bbox } = u;
          const [x0, x1] = [u.scales.x.min, u.scales.x.max];
          const [y0, y1] = [u.scales.y.min, u.scales.y.max];
          ctx.save();
          ctx.imageSmoothingEnabled = false;
          ctx.drawImage(image, x0 + 0.5, rows + 0.5 - y1, x1 - x0, y1 - y0,
            bbox.left, bbox.top, bbox.width, bbox.height);
          ctx.restore();
        }],
        draw: [(u) => { marker(u, current()); }],
        setCursor: [(u) => {
          const inside = u.cursor.left >= 0;
          onHover(inside ? { column: Math.round(u.posToVal(u.cursor.left, "x")),
            row: Math.round(u.posToVal(u.cursor.top, "y")) - 1, u } : null);
        }],
        setScale: [(u) => onZoom(u, { x: [u.scales.x.min, u.scales.x.max],
          y: [u.scales.y.min, u.scales.y.max] })],
        ready: [(u) => {
          let start = null;
          u.over.addEventListener("pointerdown", (e) => { start = [e.clientX, e.clientY]; });
          u.over.addEventListener("pointerup", (e) => {
            if (start && Math.hypot(e.clientX - start[0], e.clientY - start[1]) < 4) {
              const column = Math.round(u.posToVal(e.offsetX, "x"));
              onStep(Math.max(0, Math.min(steps.length - 1, column)));
            }
            start = null;
          });
        }],
      },
    }, [whole.x, whole.y], mounted(place));
    chart.whole = whole;
    watch.observe(place);
    return kept(place, chart);
  };

  const zoomed = (low, high, [first, last]) =>
    low === null || low === undefined ? [first, last] : [Math.max(low, first), Math.min(high, last)];

  function marker(u, column) {
    const { ctx, bbox } = u;
    const x = u.valToPos(column, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) return;
    ctx.save();
    for (const [color, width] of [["#000000", 3], ["#ffffff", 1.4]]) {
      ctx.strokeStyle = color;
      ctx.lineWidth = width * devicePixelRatio;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  function columnTicks(low, high, width) {
    const every = Math.max(1, Math.ceil((high - low) / Math.max(2, width / 60)));
    const found = [];
    for (let i = Math.max(0, Math.ceil(low)); i <= high; i += every) found.push(i);
    return found;
  }

  function layerTicks(low, high) {
    const first = Math.max(1, Math.ceil(low));
    const last = Math.floor(high);
    const raw = (last - first) / 5;
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((s) => s >= raw) ?? 1000;
    const found = [first];
    for (let k = Math.ceil((first + 0.5 * step) / step) * step; k <= last; k += step) found.push(k);
    return found;
  }

  // The colours' scale: from the least to the greatest value, and what the other colours say.
  gradflow.colorBar = (place, [low, high], log, seen, label) => {
    place.replaceChildren();
    const canvas = document.createElement("canvas");
    canvas.width = 256;
    canvas.height = 1;
    canvas.setAttribute("aria-hidden", "true");
    const context = canvas.getContext("2d");
    for (let i = 0; i < 256; i++) {
      context.fillStyle = gradflow.viridis[i];
      context.fillRect(i, 0, 1, 1);
    }
    const word = (v) => gradflow.number(log ? 10 ** v : v);
    const text = (words, kind = "") => {
      const span = document.createElement("span");
      span.textContent = words;
      span.className = kind;
      return span;
    };
    place.append(text(label), text(word(low), "low"), canvas, text(word(high), "high"));
    const special = { zero: "exactly zero", bad: "NaN or Inf", missing: "not measured" };
    for (const [name, words] of Object.entries(special)) {
      if (seen[name]) place.append(text(words, `swatch ${name}`));
    }
  };

  gradflow.redrawAll = () => charts.forEach((chart) => chart.redraw(false));
})();
