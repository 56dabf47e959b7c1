// The curve: axes, band, sampled functions and points in one SVG, and what mouse, finger and keys do to it.

import { named, show, tickText, ticks } from "./format.js";

const NS = "http://www.w3.org/2000/svg";
const DOUBLE = 400, TAB_STOPS = 60;

export class Plot {
  // `on`: add(x, y), move(index, x, y, gesture, done), remove(index), choose(index), say(words), focus values in the units of the data.
  constructor(svg, on) {
    this.svg = svg;
    this.on = on;
    this.view = null;
    this.domain = null;
    this.points = [];
    this.targets = [];
    this.chosen = -1;
    this.drag = null;
    this.tapped = { index: -1, at: 0 };
    this.cursor = null;
    this.size = { w: 600, h: 380 };
    this.margin = 60;
    this.edge = 14;
    this.layers = {};
    for (const name of ["grid", "shapes", "targets", "points", "cursor", "axes"]) this.layers[name] = make("g", { class: name }, svg);
    new ResizeObserver(() => this.resize()).observe(svg.parentElement);
    svg.addEventListener("pointerdown", (e) => this.down(e));
    svg.addEventListener("pointermove", (e) => this.moved(e));
    svg.addEventListener("pointerup", (e) => this.up(e));
    svg.addEventListener("pointercancel", () => this.cancel());
    svg.addEventListener("keydown", (e) => this.key(e));
    svg.addEventListener("focus", () => this.focused());
    svg.addEventListener("blur", () => this.drawCursor(false));
    this.resize();
  }

  resize() {
    const w = Math.max(260, Math.round(this.svg.parentElement.clientWidth));
    const h = Math.round(Math.max(280, Math.min(560, 0.6 * w, 0.72 * window.innerHeight)));
    this.size = { w, h };
    this.svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
    this.svg.setAttribute("width", w);
    this.svg.setAttribute("height", h);
    this.draw();
  }

  get box() {
    const { w, h } = this.size;
    return { left: this.margin, right: w - this.edge, top: 14, bottom: h - 48 };
  }

  px(x) {
    const { left, right } = this.box, { low, high } = this.view;
    return left + ((x - low) / (high - low)) * (right - left);
  }

  py(y) {
    const { top, bottom } = this.box, [a, b] = this.domain;
    return bottom - ((y - a) / (b - a)) * (bottom - top);
  }

  at(px, py) {
    const { left, right, top, bottom } = this.box, { low, high } = this.view, [a, b] = this.domain;
    const part = (v, from, to) => Math.min(1, Math.max(0, (v - from) / (to - from)));
    return [low + part(px, left, right) * (high - low), this.legal(b + part(py, top, bottom) * (a - b))];
  }

  legal(y) {
    const { discrete, support } = this.view;
    const inside = Math.max(support[0] ?? -Infinity, Math.min(support[1] ?? Infinity, y));
    return discrete ? Math.round(inside) : inside;
  }

  // `view`: low, high, xColumn, yColumn, discrete, support, fixed (a domain or null), answer, ySpread, yMiddle, yName.
  show(view, points, targets) {
    this.view = view;
    this.points = points;
    this.targets = targets;
    if (this.chosen >= points.length) this.choose(-1);
    this.fit();
    this.draw();
  }

  showPoints(points) {
    this.points = points;
    this.drawPoints();
  }

  // The vertical range: it stays while something is dragged, grows when it must, and shrinks only when half of it is empty.
  fit() {
    const { answer, fixed, ySpread, yMiddle, support } = this.view;
    if (fixed) {
      this.domain = fixed;
      return;
    }
    if (this.drag && this.domain) return;
    let low = yMiddle - ySpread, high = yMiddle + ySpread;
    const take = (values) => {
      for (const v of values) if (Number.isFinite(v)) [low, high] = [Math.min(low, v), Math.max(high, v)];
    };
    if (answer.bands) take([...answer.bands[0], ...answer.bands[3]]);
    take(this.points.map((p) => p.y));
    take(this.targets.map((p) => p.y));
    const pad = 0.07 * (high - low);
    let want = [low - pad, high + pad];
    if (support[0] !== null && low >= support[0]) want[0] = Math.max(want[0], support[0] - pad);
    const now = this.domain;
    const outside = !now || low < now[0] || high > now[1];
    if (outside || want[1] - want[0] < 0.55 * (now[1] - now[0])) this.domain = want;
  }

  forget() {
    this.domain = null;
  }

  draw() {
    if (!this.view) return;
    this.makeRoom();
    this.drawAxes();
    this.drawShapes();
    this.drawPoints();
    this.drawCursor();
  }

  marks() {
    const { left, right, top, bottom } = this.box, { low, high, rows } = this.view, [a, b] = this.domain;
    const xs = ticks(low, high, Math.max(2, (right - left) / 95)), ys = rows ? rows.map((_, i) => i) : ticks(a, b, Math.max(2, (bottom - top) / 60));
    const text = (values) => values.map((v) => tickText(v, values.length > 1 ? values[1] - values[0] : 1));
    return { xs, ys, xTexts: text(xs), yTexts: rows ?? text(ys) };
  }

  // Numbers beside the axes may be long: they get the room that they need, and keep it while something is dragged.
  makeRoom() {
    const { xTexts, yTexts } = this.marks(), longest = (texts) => texts.reduce((n, t) => Math.max(n, t.length), 0);
    const margin = Math.max(this.size.w < 460 ? 52 : 60, 32 + 7.6 * longest(yTexts)), edge = Math.max(14, 4 * longest(xTexts));
    if (this.drag && margin < this.margin && edge < this.edge) return;
    this.margin = Math.round(margin);
    this.edge = Math.round(edge);
  }

  drawAxes() {
    const { left, right, top, bottom } = this.box, { xColumn, yName, rows } = this.view;
    const grid = this.layers.grid, axes = this.layers.axes;
    grid.replaceChildren();
    axes.replaceChildren();
    const { xs, ys, xTexts, yTexts } = this.marks();
    for (const [i, x] of xs.entries()) {
      make("line", { class: "gridline", x1: this.px(x), x2: this.px(x), y1: top, y2: bottom }, grid);
      make("text", { class: "tick", x: this.px(x), y: bottom + 18, "text-anchor": "middle" }, axes, xTexts[i]);
    }
    const every = rows ? Math.max(1, Math.ceil(rows.length / ((bottom - top) / 18))) : 1;
    for (const [i, y] of ys.entries()) {
      if (!rows) make("line", { class: "gridline", x1: left, x2: right, y1: this.py(y), y2: this.py(y) }, grid);
      if (i % every === 0) make("text", { class: "tick", x: left - 7, y: this.py(y) + 4, "text-anchor": "end" }, axes, yTexts[i]);
    }
    make("rect", { class: "frame", x: left, y: top, width: right - left, height: bottom - top }, axes);
    make("text", { x: (left + right) / 2, y: bottom + 40, "text-anchor": "middle" }, axes, named(xColumn));
    make("text", { transform: `translate(14 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, axes, yName);
  }

  drawShapes() {
    const shapes = this.layers.shapes, { answer } = this.view, { left, right, top, bottom } = this.box;
    shapes.replaceChildren();
    const clip = make("clipPath", { id: "inside" }, shapes);
    make("rect", { x: left, y: top, width: right - left, height: bottom - top }, clip);
    const g = make("g", { "clip-path": "url(#inside)" }, shapes);
    const xs = answer.x.map((x) => this.px(x));
    if (answer.probs) {
      this.drawProbabilities(g, xs, answer.probs);
      return;
    }
    const line = (ys) => "M" + ys.map((y, i) => `${xs[i].toFixed(1)} ${this.inked(y)}`).join("L");
    const band = (lower, upper) => line(upper) + "L" + lower.map((y, i) => `${xs[i].toFixed(1)} ${this.inked(y)}`).reverse().join("L") + "Z";
    make("path", { class: "band95", d: band(answer.bands[0], answer.bands[3]) }, g);
    make("path", { class: "band50", d: band(answer.bands[1], answer.bands[2]) }, g);
    for (const ys of answer.curves) make("path", { class: "sample", d: line(ys) }, g);
    make("path", { class: "mean", d: line(answer.mean) }, g);
  }

  // Paths far outside the picture make browsers slow and inexact.
  inked(y) {
    const { h } = this.size;
    return Math.max(-2 * h, Math.min(3 * h, y === null ? 3 * h : this.py(y))).toFixed(1);
  }

  drawProbabilities(g, xs, probs) {
    const step = Math.max(1, Math.floor(xs.length / 100));
    // On whole pixels: neighbours that overlap or leave a gap would show as stripes.
    for (const [k, row] of probs.entries()) {
      const y = this.py(k + 0.46), height = this.py(k - 0.46) - y;
      for (let i = 0; i + step < xs.length; i += step) {
        make("rect", { class: "cell", x: Math.round(xs[i]), y: y.toFixed(1), width: Math.round(xs[i + step]) - Math.round(xs[i]), height: height.toFixed(1), "fill-opacity": (row[i + (step >> 1)] ?? 0).toFixed(3) }, g);
      }
    }
  }

  drawPoints() {
    if (!this.view || !this.domain) return;
    const inside = ({ x }) => x >= this.view.low && x <= this.view.high;
    const { left, right, top, bottom } = this.box;
    const hollow = this.layers.targets;
    hollow.replaceChildren();
    for (const t of this.targets) {
      if (inside(t) && t.y !== null) make("circle", { class: "target", cx: this.px(t.x).toFixed(1), cy: this.py(t.y).toFixed(1), r: 3.5 }, hollow);
    }
    const layer = this.layers.points, many = this.points.length > 150, size = many ? 3 : 6;
    const reach = this.points.length > 40 ? size + 3 : 16;
    while (layer.childElementCount > this.points.length) layer.lastElementChild.remove();
    while (layer.childElementCount < this.points.length) this.newPoint(layer);
    let k = 0;
    for (const g of layer.children) {
      const p = this.points[k], i = k++, seen = inside(p) && p.y !== null && p.y >= this.domain[0] && p.y <= this.domain[1];
      const x = Math.max(left, Math.min(right, this.px(p.x))), y = p.y === null ? bottom : Math.max(top, Math.min(bottom, this.py(p.y)));
      g.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
      g.setAttribute("class", `point${many ? " many" : ""}${p.off || !seen ? " off" : ""}${i === this.chosen ? " chosen" : ""}${this.drag?.index === i ? " dragged" : ""}`);
      g.dataset.index = i;
      g.setAttribute("tabindex", this.points.length <= TAB_STOPS || i === this.chosen ? 0 : -1);
      g.setAttribute("aria-label", this.words(i));
      const [hit, ring, dot] = g.children;
      hit.setAttribute("r", reach);
      ring.setAttribute("r", size + 4);
      dot.setAttribute("r", size);
    }
  }

  newPoint(layer) {
    const g = make("g", { class: "point", role: "button" }, layer);
    for (const name of ["hit", "ring", "dot"]) make("circle", { class: name }, g);
    g.addEventListener("focus", () => this.choose(Number(g.dataset.index), false));
  }

  words(i) {
    const p = this.points[i], { xColumn, yColumn } = this.view;
    return `Point ${i + 1} of ${this.points.length}: ${xColumn.name} ${show(p.x)}, ${yColumn.name} ${show(p.y)}`;
  }

  choose(index, tell = true) {
    if (index === this.chosen) return;
    this.chosen = index;
    this.drawPoints();
    if (tell) this.on.choose(index);
  }

  // --- mouse and finger ---

  place(event) {
    const box = this.svg.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.size.w, ((event.clientY - box.top) / box.height) * this.size.h];
  }

  down(event) {
    if (event.button !== 0 || !event.isPrimary || !this.view) return;
    const g = event.target.closest?.(".point");
    const [px, py] = this.place(event);
    this.drag = { index: g ? Number(g.dataset.index) : -1, px, py, far: false, gesture: `g${Date.now()}${Math.random().toString(36).slice(2, 8)}` };
    if (g) {
      // Where in the point it was taken, so that it does not jump under the finger.
      const p = this.points[this.drag.index];
      this.drag.dx = this.px(p.x) - px;
      this.drag.dy = p.y === null ? 0 : this.py(p.y) - py;
      this.svg.setPointerCapture(event.pointerId);
      this.choose(this.drag.index);
      event.preventDefault();
      g.focus({ preventScroll: true, focusVisible: false });
    }
    this.drawCursor(false);
  }

  moved(event) {
    const drag = this.drag;
    if (!drag || !event.isPrimary) return;
    const [px, py] = this.place(event);
    if (!drag.far && Math.hypot(px - drag.px, py - drag.py) < (event.pointerType === "touch" ? 8 : 4)) return;
    drag.far = true;
    if (drag.index < 0) return;
    const [x, y] = this.at(px + drag.dx, py + drag.dy);
    this.points[drag.index] = { ...this.points[drag.index], x, y, off: false };
    this.drawPoints();
    this.on.move(drag.index, x, y, drag.gesture, false);
  }

  up(event) {
    const drag = this.drag;
    if (!drag || !event.isPrimary) return;
    this.drag = null;
    const now = performance.now();
    if (drag.index >= 0 && drag.far) {
      const p = this.points[drag.index];
      this.on.move(drag.index, p.x, p.y, drag.gesture, true);
    } else if (drag.index >= 0) {
      const twice = this.tapped.index === drag.index && now - this.tapped.at < DOUBLE;
      this.tapped = { index: drag.index, at: now };
      if (twice) {
        this.tapped = { index: -1, at: 0 };
        this.on.remove(drag.index);
      }
    } else if (!drag.far) {
      const [px, py] = this.place(event), { left, right, top, bottom } = this.box;
      if (px >= left - 4 && px <= right + 4 && py >= top - 4 && py <= bottom + 4) this.on.add(...this.at(px, py));
      this.choose(-1);
    }
    this.drawPoints();
  }

  cancel() {
    const drag = this.drag;
    this.drag = null;
    if (drag && drag.index >= 0 && drag.far) this.on.move(drag.index, this.points[drag.index].x, this.points[drag.index].y, drag.gesture, true);
    this.drawPoints();
  }

  // --- keys ---

  focused() {
    this.choose(-1);
    if (!this.cursor && this.view) this.cursor = [0.5, 0.5];
    this.drawCursor(this.svg.matches(":focus-visible"));
  }

  drawCursor(visible = this.layers.cursor.childElementCount > 0) {
    const layer = this.layers.cursor;
    layer.replaceChildren();
    if (!visible || !this.cursor || !this.view) return;
    const { left, right, top, bottom } = this.box;
    const x = left + this.cursor[0] * (right - left), y = bottom - this.cursor[1] * (bottom - top);
    make("path", { class: "cursor", d: `M${x} ${top}V${bottom}M${left} ${y}H${right}` }, layer);
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !this.view) return;
    const g = event.target.closest?.(".point"), index = g ? Number(g.dataset.index) : -1;
    const step = event.shiftKey ? 0.05 : 0.01;
    const by = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[event.key];
    if (by && index >= 0) this.nudge(index, by);
    else if (by) this.moveCursor(by);
    else if ((event.key === "Enter" || event.key === " ") && index < 0) this.addAtCursor();
    else if ((event.key === "Delete" || event.key === "Backspace") && index >= 0) {
      this.svg.focus();
      this.on.remove(index);
    } else if (event.key === "Escape" && index >= 0) this.svg.focus();
    else return;
    event.preventDefault();
  }

  moveCursor([dx, dy]) {
    if (!this.cursor) this.cursor = [0.5, 0.5];
    this.cursor = [this.cursor[0] + dx, this.cursor[1] + dy].map((v) => Math.max(0, Math.min(1, v)));
    this.drawCursor(true);
    const [x, y] = this.cursorValue();
    this.on.say(`${this.view.xColumn.name} ${show(x, 3)}, ${this.view.yColumn.name} ${show(y, 3)}`);
  }

  cursorValue() {
    const { left, right, top, bottom } = this.box;
    return this.at(left + this.cursor[0] * (right - left), bottom - this.cursor[1] * (bottom - top));
  }

  addAtCursor() {
    if (!this.cursor) this.cursor = [0.5, 0.5];
    this.drawCursor(true);
    this.on.add(...this.cursorValue());
  }

  nudge(index, [dx, dy]) {
    const p = this.points[index], { low, high, discrete, support } = this.view, [a, b] = this.domain;
    const x = Math.max(low, Math.min(high, p.x + dx * (high - low)));
    let y = p.y;
    if (dy && y !== null) {
      const far = discrete ? Math.sign(dy) * Math.max(1, Math.round(Math.abs(dy) * (b - a))) : dy * (b - a);
      y = this.legal(Math.max(a, Math.min(b, y + far)));
      if (discrete && support[1] !== null) y = Math.min(y, support[1]);
    }
    this.points[index] = { ...p, x, y, off: false };
    this.drawPoints();
    this.on.move(index, x, y, `k${index}`, true);
  }
}

export function make(name, attributes = {}, parent = null, text = null) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}
