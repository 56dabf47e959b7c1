// The map: panels of cells for what is observed, the mean, its uncertainty and whole samples; the first one is painted on.

import { measured, named, show } from "./format.js";

const GREY = [[0, 0, 0], [255, 255, 255]];
// From dark blue over green to yellow, then from nearly white to dark red: both rise evenly in lightness, so they read without colour too.
const FIELD = [[38, 18, 84], [46, 60, 122], [35, 104, 132], [38, 146, 125], [96, 184, 94], [180, 208, 62], [252, 226, 70]];
const DOUBT = [[255, 247, 236], [253, 212, 158], [252, 141, 89], [215, 48, 31], [110, 0, 0]];

export class MapView {
  // `on`: paint(x, y, gesture), erase(indices, gesture), points(), outputs(value), read(words), say(words).
  constructor(box, on) {
    this.box = box;
    this.on = on;
    this.tool = "paint";
    this.brush = 1;
    this.faint = true;
    this.answer = null;
    this.stroke = null;
    this.cursor = null;
    this.panels = [];
  }

  prepare(subject, ink, inkValue) {
    if (!subject.lattice) return;
    this.subject = subject;
    this.ink = ink;
    this.inkValue = inkValue;
    const { columns, rows } = subject.lattice;
    this.w = columns.length;
    this.h = rows.length;
    this.grey = subject.kind === "images";
    if (!this.panels.length) this.build();
    this.setInk(0);
    ink.oninput = () => this.showInk();
  }

  setInk(output) {
    const { middle, spread } = this.subject.outputs[output], { discrete, support } = this.subject.likelihood;
    const low = Math.max(middle - 2.5 * spread, support[0] ?? -Infinity), high = Math.min(middle + 2.5 * spread, support[1] ?? Infinity);
    this.inkFor = output;
    this.ink.min = discrete ? Math.round(low) : low;
    this.ink.max = discrete ? Math.max(1, Math.round(high)) : high;
    this.ink.step = discrete ? 1 : (high - low) / 100;
    this.ink.value = discrete ? 1 : middle + spread;
    this.showInk();
  }

  showInk() {
    this.inkValue.textContent = measured(Number(this.ink.value), this.subject.outputs[this.inkFor], 3);
  }

  build() {
    const names = ["Observed", "Mean", "Standard deviation", "Sample 1", "Sample 2", "Sample 3"];
    this.panels = names.map((name, i) => {
      const figure = document.createElement("figure"), canvas = document.createElement("canvas"), words = document.createElement("figcaption");
      canvas.width = this.w;
      canvas.height = this.h;
      canvas.style.aspectRatio = `${this.w} / ${this.h}`;
      words.textContent = name;
      figure.append(words, canvas);
      this.box.append(figure);
      if (i > 0) canvas.setAttribute("role", "img");
      canvas.addEventListener("pointermove", (e) => this.read(this.cellAt(e, canvas)));
      return { name, canvas, figure, words };
    });
    this.scales = [this.scale(this.panels[1].figure), this.scale(this.panels[2].figure)];
    const live = this.panels[0].canvas;
    live.className = "live";
    live.tabIndex = 0;
    live.setAttribute("role", "application");
    live.setAttribute("aria-roledescription", "map");
    live.setAttribute("aria-describedby", "how-map");
    live.addEventListener("pointerdown", (e) => this.down(e));
    live.addEventListener("pointermove", (e) => this.moved(e));
    for (const name of ["pointerup", "pointercancel"]) live.addEventListener(name, () => this.up());
    live.addEventListener("keydown", (e) => this.key(e));
    live.addEventListener("focus", () => {
      if (live.matches(":focus-visible") && !this.cursor) this.cursor = [Math.floor(this.w / 2), Math.floor(this.h / 2)];
      this.showPoints();
    });
    live.addEventListener("blur", () => {
      this.cursor = null;
      this.showPoints();
    });
    new ResizeObserver(() => this.showPoints()).observe(live);
  }

  scale(figure) {
    const box = document.createElement("div"), low = document.createElement("span"), high = document.createElement("span");
    const canvas = document.createElement("canvas");
    box.className = "scale";
    canvas.width = 64;
    canvas.height = 1;
    canvas.setAttribute("aria-hidden", "true");
    box.append(low, canvas, high);
    figure.append(box);
    return { low, high, canvas };
  }

  show(answer, targets, subject, settings) {
    this.answer = answer;
    this.targets = targets;
    this.output = settings.output;
    if (this.inkFor !== this.output) this.setInk(this.output);
    this.hidden = this.located(targets);
    document.getElementById("faint-row").hidden = this.hidden.size === 0;
    document.getElementById("ink-row").hidden = this.hidden.size > 0;
    this.range();
    const { mean, std, samples } = answer;
    this.fill(this.panels[1].canvas, (k) => this.colour(mean[k]));
    const most = std.reduce((a, b) => Math.max(a, b ?? 0), 0) || 1;
    this.fill(this.panels[2].canvas, (k) => ramp(DOUBT, (std[k] ?? 0) / most));
    samples.forEach((sample, i) => this.fill(this.panels[3 + i].canvas, (k) => this.colour(sample[k])));
    this.drawScale(this.scales[0], this.low, this.high, (t) => ramp(this.grey ? GREY : FIELD, t));
    this.drawScale(this.scales[1], 0, most, (t) => ramp(DOUBT, t));
    this.showPoints();
    const column = subject.outputs[this.output], n = this.on.points().x.length;
    const span = (values) => `${show(values.reduce((a, b) => Math.min(a, b)), 3)} to ${show(values.reduce((a, b) => Math.max(a, b)), 3)}`;
    this.panels[0].canvas.setAttribute("aria-label", `Map of ${named(column)}, ${this.h} rows and ${this.w} columns, ${n} cells observed.`);
    this.panels[1].canvas.setAttribute("aria-label", `Mean of ${named(column)}, from ${span(mean)}.`);
    this.panels[2].canvas.setAttribute("aria-label", `Standard deviation of ${named(column)}, from ${span(std)}.`);
    samples.forEach((sample, i) => this.panels[3 + i].canvas.setAttribute("aria-label", `Sample ${i + 1}, from ${span(sample)}.`));
  }

  // One range of values for all panels that does not move with each stroke: that of the data, or of a task that was loaded.
  range() {
    const { middle, spread } = this.subject.outputs[this.output], { labels, classes, support } = this.subject.likelihood;
    if (labels) {
      [this.low, this.high] = [0, classes - 1];
      return;
    }
    let [low, high] = [Infinity, -Infinity];
    const take = (v) => {
      if (v !== null) [low, high] = [Math.min(low, v), Math.max(high, v)];
    };
    for (const row of this.targets.y) take(row[this.output]);
    const alone = this.targets.y.length > 0;
    for (const row of this.on.points().y) take(row[this.output]);
    if (!alone) [low, high] = [Math.min(low, middle - 2 * spread), Math.max(high, middle + 2 * spread)];
    this.low = Math.max(low, support[0] ?? -Infinity);
    this.high = high > this.low ? high : this.low + 1;
  }

  colour(value) {
    return ramp(this.grey ? GREY : FIELD, ((value ?? this.low) - this.low) / (this.high - this.low));
  }

  fill(canvas, colour) {
    const context = canvas.getContext("2d"), image = new ImageData(this.w, this.h);
    if (canvas.width !== this.w || canvas.height !== this.h) [canvas.width, canvas.height] = [this.w, this.h];
    for (let k = 0; k < this.w * this.h; k++) {
      const [r, g, b] = colour(k);
      image.data.set([r, g, b, 255], 4 * k);
    }
    context.putImageData(image, 0, 0);
  }

  drawScale({ low, high, canvas }, from, to, colour) {
    const column = this.subject.outputs[this.output], image = new ImageData(64, 1);
    for (let i = 0; i < 64; i++) image.data.set([...colour(i / 63), 255], 4 * i);
    canvas.getContext("2d").putImageData(image, 0, 0);
    low.textContent = show(from, 3);
    high.textContent = measured(to, column, 3);
  }

  // Which cell each point lies in: cell -> number of the point; those between the cells of a thinned grid are left out.
  located(points) {
    const { across, columns, rows } = this.subject.lattice, found = new Map();
    points.x.forEach((row, i) => {
      const column = nearest(columns, row[across]), line = nearest(rows, row[1 - across]);
      if (column >= 0 && line >= 0) found.set(line * this.w + column, i);
    });
    return found;
  }

  // The first panel has as many pixels as the screen shows, for the frame of the cursor.
  showPoints() {
    if (!this.answer) return;
    const { canvas, words } = this.panels[0], points = this.on.points();
    const side = Math.max(1, Math.min(24, Math.round((canvas.clientWidth * (window.devicePixelRatio || 1)) / this.w)));
    canvas.width = this.w * side;
    canvas.height = this.h * side;
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const unseen = style.getPropertyValue("--unseen"), ink = style.getPropertyValue("--point");
    context.fillStyle = unseen;
    context.fillRect(0, 0, canvas.width, canvas.height);
    this.seen = this.located(points);
    if (this.faint) {
      context.globalAlpha = 0.3;
      for (const [k, i] of this.hidden) this.cell(context, k, side, this.targets.y[i][this.output]);
      context.globalAlpha = 1;
    }
    for (const [k, i] of this.seen) this.cell(context, k, side, points.y[i][this.output]);
    if ((!this.grey || (this.faint && this.hidden.size)) && side >= 12) {
      context.lineWidth = this.grey ? 2 : 1;
      context.strokeStyle = ink;
      for (const k of this.seen.keys()) context.strokeRect((k % this.w) * side + 0.5, Math.floor(k / this.w) * side + 0.5, side - 1, side - 1);
      context.lineWidth = 1;
    }
    if (this.cursor) {
      context.lineWidth = 3;
      context.strokeStyle = ink;
      context.strokeRect(this.cursor[0] * side + 1, this.cursor[1] * side + 1, side - 2, side - 2);
      context.lineWidth = 1;
    }
    words.textContent = `Observed: ${points.x.length} of ${this.w * this.h}`;
  }

  cell(context, k, side, value) {
    if (value === null) return;
    const [r, g, b] = this.colour(value);
    context.fillStyle = `rgb(${r} ${g} ${b})`;
    context.fillRect((k % this.w) * side, Math.floor(k / this.w) * side, side, side);
  }

  cellAt(event, canvas) {
    const box = canvas.getBoundingClientRect();
    const i = Math.floor(((event.clientX - box.left) / box.width) * this.w), j = Math.floor(((event.clientY - box.top) / box.height) * this.h);
    return i >= 0 && i < this.w && j >= 0 && j < this.h ? [i, j] : null;
  }

  read(cell) {
    if (!cell || !this.answer) return;
    const words = this.words(cell);
    this.on.read(words);
  }

  words([i, j]) {
    const { across, columns, rows } = this.subject.lattice, { inputs, outputs } = this.subject, k = j * this.w + i;
    const place = across === 0 ? [columns[i], rows[j]] : [rows[j], columns[i]], column = outputs[this.output], points = this.on.points();
    const where = inputs.map((c, m) => `${c.name} ${measured(place[m], c)}`).join(", ");
    const at = this.seen.get(k), seen = at === undefined ? "not observed" : `observed ${measured(points.y[at]?.[this.output], column)}`;
    return `${where}: ${seen}; mean ${show(this.answer.mean[k])} ± ${measured(this.answer.std[k], column, 2)}`;
  }

  // --- painting ---

  down(event) {
    if (event.button !== 0 || !event.isPrimary || !this.answer) return;
    this.panels[0].canvas.setPointerCapture(event.pointerId);
    this.cursor = null;
    this.stroke = { gesture: `p${Date.now()}${Math.random().toString(36).slice(2, 8)}`, last: null };
    this.touch(this.cellAt(event, this.panels[0].canvas));
  }

  moved(event) {
    if (!this.stroke || !event.isPrimary) return;
    for (const e of event.getCoalescedEvents?.() ?? []) this.touch(this.cellAt(e, this.panels[0].canvas));
    this.touch(this.cellAt(event, this.panels[0].canvas));
  }

  up() {
    this.stroke = null;
  }

  // Paint from the last cell of the stroke to this one.
  touch(cell) {
    if (!cell) return;
    const [i0, j0] = this.stroke.last ?? cell, steps = Math.max(Math.abs(cell[0] - i0), Math.abs(cell[1] - j0), 1), cells = new Set();
    if (this.stroke.last && i0 === cell[0] && j0 === cell[1]) return;
    for (let s = 0; s <= steps; s++) {
      const i = Math.round(i0 + ((cell[0] - i0) * s) / steps), j = Math.round(j0 + ((cell[1] - j0) * s) / steps), r = this.brush;
      for (let a = Math.max(0, i - r); a <= Math.min(this.w - 1, i + r); a++) {
        for (let b = Math.max(0, j - r); b <= Math.min(this.h - 1, j + r); b++) cells.add(b * this.w + a);
      }
    }
    this.stroke.last = cell;
    this.use(cells, this.stroke.gesture);
  }

  use(cells, gesture) {
    const points = this.on.points();
    this.seen = this.located(points);
    if (this.tool === "erase") {
      const gone = [...cells].filter((k) => this.seen.has(k)).map((k) => this.seen.get(k));
      if (gone.length) this.on.erase(gone, gesture);
    } else {
      const { across, columns, rows } = this.subject.lattice, x = [], y = [];
      for (const k of cells) {
        const hidden = this.hidden.get(k), i = k % this.w, j = Math.floor(k / this.w);
        if (this.hidden.size ? hidden === undefined || this.seen.has(k) : false) continue;
        if (this.hidden.size) {
          x.push(this.targets.x[hidden]);
          y.push(this.targets.y[hidden]);
        } else {
          const at = this.seen.get(k);
          x.push(at === undefined ? (across === 0 ? [columns[i], rows[j]] : [rows[j], columns[i]]) : points.x[at]);
          y.push(this.on.outputs(Number(this.ink.value)));
        }
      }
      if (x.length) this.on.paint(x, y, gesture);
    }
    this.showPoints();
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !this.answer) return;
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!this.cursor) this.cursor = [Math.floor(this.w / 2), Math.floor(this.h / 2)];
    if (by) {
      const far = event.shiftKey ? 5 : 1;
      this.cursor = [
        Math.max(0, Math.min(this.w - 1, this.cursor[0] + far * by[0])),
        Math.max(0, Math.min(this.h - 1, this.cursor[1] + far * by[1])),
      ];
      this.showPoints();
      this.read(this.cursor);
      this.on.say(this.words(this.cursor));
    } else if (["Enter", " ", "Delete", "Backspace"].includes(event.key)) {
      const tool = this.tool, k = this.cursor[1] * this.w + this.cursor[0];
      this.tool = event.key === "Enter" || event.key === " " ? "paint" : "erase";
      this.use(new Set([k]), "");
      this.tool = tool;
      this.on.say(this.words(this.cursor));
    } else return;
    event.preventDefault();
  }
}

function nearest(values, v) {
  const n = values.length, step = Math.abs(values[n - 1] - values[0]) / (n - 1);
  let low = 0, high = n - 1;
  const up = values[n - 1] > values[0];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= v === up) low = middle;
    else high = middle;
  }
  const best = Math.abs(values[low] - v) <= Math.abs(values[high] - v) ? low : high;
  return Math.abs(values[best] - v) <= 0.501 * step ? best : -1;
}

function ramp(stops, t) {
  const at = Math.min(1, Math.max(0, t)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(at)), f = at - i;
  return stops[i].map((v, c) => Math.round(v + f * (stops[i + 1][c] - v)));
}
