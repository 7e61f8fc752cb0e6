"use strict";
// What the page carries: an index of the runs, and of each run a view, packed by gradflow/views.py.
(() => {
  const NULL = 0x7ff801; // not measured
  let unpacked = new Map();

  class View {
    constructor(header, values, missing) {
      this.tables = header.tables;
      this.curves = header.curves;
      this.values = values;
      this.missing = missing;
    }

    has(table, quantity) {
      return Boolean(this.tables[table]?.quantities[quantity]);
    }

    steps(table, quantity) {
      return this.tables[table].quantities[quantity].steps;
    }

    // The layers of one family, from the input on: name, kind, ordinal, column in the matrix.
    layers(table, family) {
      const { layer, kind, ordinal, family: families } = this.tables[table];
      return layer
        .map((name, column) => ({ name, kind: kind[column], ordinal: ordinal[column], column }))
        .filter(({ column }) => families[column] === family);
    }

    // One value: undefined where nothing was measured.
    value(table, quantity, step, column) {
      const found = this.tables[table].quantities[quantity];
      const place = found.at + step * this.tables[table].layer.length + column;
      return this.missing[place] ? undefined : this.values[place];
    }

    curve(name) {
      const found = this.curves[name];
      if (!found) return null;
      const values = this.values.subarray(found.at, found.at + found.steps.length);
      return { steps: found.steps, values: Array.from(values) };
    }
  }

  async function decode(text) {
    const packed = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream();
    const whole = await new Response(
      stream.pipeThrough(new DecompressionStream("deflate-raw")),
    ).arrayBuffer();
    const length = new DataView(whole).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(whole, 4, length)));
    const planes = new Uint8Array(whole, 4 + length);
    const count = header.count;
    const values = new Float64Array(count);
    const words = new Uint32Array(values.buffer); // little-endian, as every browser's machine is
    const missing = new Uint8Array(count);
    for (let i = 0; i < count; i++) {
      const code = (planes[i] << 16) | (planes[count + i] << 8) | planes[2 * count + i];
      missing[i] = code === NULL ? 1 : 0;
      words[2 * i + 1] = code << 8;
    }
    return new View(header, values, missing);
  }

  gradflow.load = () => {
    gradflow.index = JSON.parse(document.getElementById("gradflow-index").textContent);
    gradflow.runs = new Map(gradflow.index.runs.map((run) => [run.id, run]));
    const texts = new Map();
    for (const element of document.querySelectorAll("script[data-run]")) {
      texts.set(element.dataset.run, element.textContent);
    }
    const before = unpacked;
    unpacked = new Map();
    for (const [id, text] of texts) {
      const known = before.get(id);
      unpacked.set(id, known?.text === text ? known : { text, view: null });
    }
  };

  // The view of a run, unpacked when it is first looked at; null for a run without one.
  gradflow.view = (id) => {
    const found = unpacked.get(id);
    if (!found) return Promise.resolve(null);
    found.view ??= decode(found.text);
    return found.view;
  };

  gradflow.hasView = (id) => unpacked.has(id);
})();
