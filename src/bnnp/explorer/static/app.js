// The page: it holds what the server last said, turns what a person does into changes, and shows the answers.

import { measured, named, show } from "./format.js";
import { Link, Lost } from "./link.js";
import { MapView } from "./map.js";
import { Plot, make } from "./plot.js";
import { saveData, savePredictions, saveRaster, saveVector } from "./save.js";

const SAMPLES = [16, 32, 64, 128, 256];
const SHARES = [["0.025", "2.5 %"], ["0.05", "5 %"], ["0.1", "10 %"], ["0.25", "25 %"], ["0.5", "50 %"], ["1", "all"]];
const MOST_ROWS = 200, PAUSE = 350;
const $ = (id) => document.getElementById(id);

const it = {
  subject: null,
  settings: null,
  points: { x: [], y: [] },
  targets: { x: [], y: [] },
  task: "",
  answer: null,
  seed: 0,
  pause: null,
  trusted: 0,
};

// --- the page's name: in the address, so that a reload finds the same state ---

function pageName() {
  const address = new URL(location.href);
  let name = address.searchParams.get("page");
  if (!/^[A-Za-z0-9_-]{8,64}$/.test(name ?? "")) {
    const bytes = crypto.getRandomValues(new Uint8Array(12));
    name = Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
    address.searchParams.set("page", name);
    history.replaceState(null, "", address);
  }
  return name;
}

const link = new Link(pageName(), {
  answer: (answer, change) => received(answer, change),
  refused: (message) => {
    complain(message);
    open();
  },
  lost: (message, final) => {
    $("gone-words").textContent = message;
    $("retry").hidden = final;
    $("gone").hidden = false;
  },
  back: () => {
    $("gone").hidden = true;
  },
});

async function open() {
  try {
    const found = await link.post("open", {});
    link.shown = Math.max(link.shown, found.seq);
    $("gone").hidden = true;
    it.subject = found.subject;
    takeState(found.state);
    it.answer = found.answer;
    prepare();
    render();
    diagnoseSoon();
    if (it.subject.tasks && !$("names").options.length) search();
  } catch (error) {
    if (error instanceof Lost) {
      link.on.lost(error.message, error.final);
      if (!error.final) setTimeout(open, 2000);
    } else complain(error.message);
  }
}

function takeState(state) {
  it.points = state.points;
  it.task = state.task;
  it.settings = state.settings;
  if (state.targets) it.targets = state.targets;
}

function received(answer, change) {
  it.answer = answer;
  if (["load", "clear", "undo", "redo"].includes(change.do)) plot.choose(-1);
  if (answer.state) {
    // What waits has been drawn already, and is not in this state.
    const waiting = link.queue.length > 0;
    const { points, settings } = it;
    takeState(answer.state);
    if (waiting) Object.assign(it, { points, settings });
    if (change.do === "load") widen();
  } else if (change.do === "add" && link.queue.length === 0 && answer.count !== it.points.x.length) open();
  render();
  diagnoseSoon();
}

function complain(message) {
  $("refused-words").textContent = message;
  $("refused").hidden = false;
}

function say(words) {
  $("says").textContent = words;
}

// --- changes ---

function change(what) {
  $("refused").hidden = true;
  stale();
  link.change({ mark: Math.random().toString(36).slice(2, 12), ...what });
}

function rowAt(x, y) {
  const { axis, output, held, others } = it.settings;
  const row = [...held], values = [...others];
  row[axis] = x;
  values[output] = y;
  return [row, values];
}

function add(x, y) {
  const [row, values] = rowAt(x, y);
  it.points.x.push(row);
  it.points.y.push(values);
  showPoints();
  change({ do: "add", x: row, y: values });
  say(`Point added: ${named(input())} ${show(x)}, ${named(output())} ${show(y)}. ${it.points.x.length} points.`);
}

function moveTo(index, x, y, gesture, done) {
  const row = [...it.points.x[index]], values = [...it.points.y[index]];
  row[it.settings.axis] = x;
  values[it.settings.output] = y;
  it.points.x[index] = row;
  it.points.y[index] = values;
  change({ do: "move", index, x: row, y: values, gesture, preview: !done });
  if (done) {
    showPoints();
    say(`Point ${index + 1}: ${input().name} ${show(x)}, ${output().name} ${show(y)}`);
  }
}

function removeAt(index) {
  it.points.x.splice(index, 1);
  it.points.y.splice(index, 1);
  plot.choose(-1);
  showPoints();
  change({ do: "remove", indices: [index] });
  say(`Point removed. ${it.points.x.length} points.`);
}

function set(values) {
  Object.assign(it.settings, values);
  change({ do: "set", ...values });
}

// An axis that shows all of a task that was loaded.
function widen() {
  const { axis, low, high } = it.settings;
  const values = [...it.points.x, ...it.targets.x].map((row) => row[axis]);
  if (!values.length || it.settings.mode === "map") return;
  const least = values.reduce((a, b) => Math.min(a, b)), most = values.reduce((a, b) => Math.max(a, b));
  const room = 0.03 * (most - least) || 0.5;
  plot.forget();
  if (least < low || most > high || most - least < 0.3 * (high - low)) set({ low: least - room, high: most + room });
}

const input = () => it.subject.inputs[it.settings.axis];
const output = () => it.subject.outputs[it.settings.output];

// --- the plot and the map ---

const plot = new Plot($("plot"), { add, move: moveTo, remove: removeAt, choose: () => {}, say });
const map = new MapView($("panels"), {
  paint: (x, y, gesture) => {
    const at = new Map(it.points.x.map((row, i) => [row.join(), i]));
    for (const [i, row] of x.entries()) {
      const there = at.get(row.join());
      if (there === undefined) {
        at.set(row.join(), it.points.x.length);
        it.points.x.push(row);
        it.points.y.push(y[i]);
      } else it.points.y[there] = y[i];
    }
    $("count").textContent = it.points.x.length;
    change({ do: "paint", x, y, gesture });
  },
  erase: (indices, gesture) => {
    const gone = new Set(indices);
    it.points = { x: it.points.x.filter((_, i) => !gone.has(i)), y: it.points.y.filter((_, i) => !gone.has(i)) };
    $("count").textContent = it.points.x.length;
    change({ do: "remove", indices, gesture });
  },
  points: () => it.points,
  outputs: (value) => rowAt(0, value)[1],
  read: (words) => {
    $("readout").textContent = words;
  },
  say,
});

function flat(points, hollow = false) {
  const { axis, output: j, held } = it.settings, { inputs } = it.subject;
  return points.x.map((row, i) => ({
    x: row[axis],
    y: points.y[i][j],
    off: !hollow && row.some((v, k) => k !== axis && Math.abs(v - held[k]) > 0.05 * inputs[k].spread),
  }));
}

function showPoints() {
  if (it.settings.mode === "map") map.showPoints();
  else plot.showPoints(flat(it.points));
  $("count").textContent = it.points.x.length;
  if ($("table-box").open) fillTable();
}

function render() {
  const { subject, settings, answer } = it, { likelihood } = subject, column = output();
  for (const button of $("modes").querySelectorAll("button")) button.setAttribute("aria-pressed", button.dataset.mode === settings.mode);
  $("curve").hidden = settings.mode === "map";
  $("map").hidden = settings.mode !== "map";
  if (answer.mode === settings.mode) {
    if (settings.mode === "map") map.show(answer, it.targets, subject, settings);
    else {
      const many = Boolean(answer.probs), probability = likelihood.labels && !many;
      const rows = many ? answer.probs.map((_, k) => String(k)) : null;
      plot.show(
        {
          answer, low: settings.low, high: settings.high, xColumn: input(), yColumn: column, discrete: likelihood.discrete,
          support: likelihood.support, rows, fixed: many ? [-0.5, answer.probs.length - 0.5] : probability ? [-0.08, 1.08] : null,
          yMiddle: column.middle, ySpread: column.spread, yName: probability ? `${named(column)}, and probability of a 1` : named(column),
        },
        flat(it.points), flat(it.targets, true),
      );
      plot.svg.setAttribute("aria-label", summary());
    }
  }
  $("undo").disabled = !answer.undo;
  $("redo").disabled = !answer.redo;
  $("clear").disabled = !it.points.x.length && !it.targets.x.length;
  $("refresh").hidden = answer.updates === 0;
  $("count").textContent = it.points.x.length;
  fields();
  numbers();
  if ($("table-box").open && document.activeElement?.closest("#table") === null) fillTable();
}

function summary() {
  const { answer } = it, n = it.points.x.length;
  const words = `Plot of ${named(output())} against ${named(input())}, ${n} point${n === 1 ? "" : "s"}.`;
  if (!answer.mean) return words;
  const middle = Math.floor(answer.x.length / 2);
  const at = (i) => `at ${show(answer.x[i], 3)}: ${show(answer.mean[i], 3)}, 95 % between ${show(answer.bands[0][i], 3)} and ${show(answer.bands[3][i], 3)}`;
  return `${words} Predicted ${[0, middle, answer.x.length - 1].map(at).join("; ")}.`;
}

// --- numbers and trust ---

let told = null;

function numbers() {
  const { answer } = it, rows = [];
  const half = answer.updates ? `${Math.round(answer.effective)} of ${answer.particles}` : `all ${answer.particles}`;
  rows.push(["Samples that count", half]);
  rows.push(["How it was found", answer.count === 0 ? "prior" : answer.updates ? `${answer.updates} by update` : "conditioned afresh"]);
  rows.push(["ELBO", show(answer.elbo, 4)]);
  if (told) {
    rows.push(["Log evidence", `${show(told.log_evidence, 4)} ± ${show(told.log_evidence_se, 2)}`]);
    rows.push(["Importance: effective", `${Math.round(told.effective)} of ${told.particles}`]);
    if (told.pareto_k !== null) rows.push(["Pareto k", show(told.pareto_k, 2)]);
  }
  rows.push(["Time of this change", `${show(1000 * (answer.seconds[0] + answer.seconds[1]), 2)} ms${answer.particles < it.settings.samples ? " (preview)" : ""}`]);
  $("numbers").replaceChildren(...rows.flatMap(([name, value]) => [tag("dt", name), tag("dd", value)]));
}

function stale() {
  told = null;
  $("trust").classList.add("stale");
  clearTimeout(it.pause);
  it.trusted++;
}

// The trust sentence takes longer than a change may: it is asked for when nothing has moved for a moment.
function diagnoseSoon() {
  clearTimeout(it.pause);
  const mine = ++it.trusted;
  it.pause = setTimeout(async () => {
    if (!link.idle || link.gone) return;
    try {
      const found = await link.post("diagnose", {});
      if (mine !== it.trusted) return;
      told = found;
      $("trust").textContent = found.sentence;
      $("trust").classList.remove("stale");
      $("trust").dataset.kind = found.sentence.startsWith("Nothing speaks") ? "good" : found.sentence.startsWith("Do not") ? "bad" : found.sentence.startsWith("Take care") ? "care" : "";
      $("score").textContent = scored(found.score);
      numbers();
    } catch (error) {
      if (!(error instanceof Lost) && mine === it.trusted) $("trust").textContent = error.message;
    }
  }, PAUSE);
}

function scored(score) {
  if (!score || !score.targets) return "";
  const words = [`${score.targets} points that the model does not see: log density ${show(score.log_prob, 3)} per point`];
  if (score.rmse !== undefined) words.push(`root mean square error ${measured(score.rmse, output(), 3)}`, `${show(100 * score.inside, 3)} % inside the 95 % band`);
  if (score.accuracy !== undefined) words.push(`${show(100 * score.accuracy, 3)} % of the labels right`);
  return `${words.join(", ")}.`;
}

// --- settings ---

function tag(name, text, attributes = {}) {
  const element = document.createElement(name);
  element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function prepare() {
  const { subject, settings } = it;
  const words = `${subject.outputs.map((c) => c.name).join(", ")} from ${subject.inputs.map((c) => c.name).join(", ")}`;
  $("title").textContent = words;
  document.title = `${words} – explorer`;
  $("modes").hidden = !subject.lattice;
  $("tasks").hidden = !subject.tasks;
  $("noise-row").hidden = subject.likelihood.noise === null;
  $("output-row").hidden = subject.outputs.length < 2;
  $("axis-row").hidden = subject.inputs.length < 2;
  $("output").replaceChildren(...subject.outputs.map((c, j) => tag("option", named(c), { value: j })));
  $("axis").replaceChildren(...subject.inputs.map((c, j) => tag("option", named(c), { value: j })));
  $("curves").value = settings.curves;
  if (!$("share").options.length) {
    $("share").replaceChildren(...SHARES.map(([value, text]) => tag("option", text, { value })));
    $("share").value = subject.map_first ? "0.1" : "0.25";
  }
  map.prepare(subject, $("ink"), $("ink-value"));
  const notes = [];
  const { kind, labels, classes, discrete } = subject.likelihood;
  if (!subject.trained) notes.push("This model was not trained: what it says is that of its first prior.");
  if (subject.likelihood.noise === null) notes.push(`The noise of ${kind} cannot be changed here.`);
  if (labels && classes > 2) notes.push("The darker a row, the more probable its class. Sampled curves and bands mean nothing for classes without an order, so there are none; a map shows the mean of the class's number.");
  if (labels && classes === 2) notes.push("Line and band are of the probability of a 1; points are zeros and ones.");
  if (discrete && !labels) notes.push("Points are whole numbers; sampled curves are mean counts.");
  if (subject.outputs.length > 1 && !subject.gaps) notes.push("This model needs all outputs of a point: a new one takes those not shown from the fields above.");
  if (subject.inputs.length > 1) notes.push("In the curve view, points at other values of the inputs not shown are pale.");
  if (subject.lattice?.thinned > 1) notes.push(`The map shows every ${subject.lattice.thinned}th row and column of the data.`);
  $("notes").replaceChildren(...notes.map((note) => tag("li", note)));
  legend();
}

function legend() {
  const many = it.subject.likelihood.classes > 2;
  const swatch = (draw) => {
    const svg = make("svg", { width: 26, height: 14, viewBox: "0 0 26 14", "aria-hidden": "true" });
    draw(svg);
    return svg;
  };
  const entry = (text, draw) => {
    const span = document.createElement("span");
    span.append(swatch(draw), text);
    return span;
  };
  const rect = (name) => (s) => make("rect", { class: name, width: 26, height: 14 }, s);
  const entries = many
    ? [entry("probability", rect("cell"))]
    : [
        entry("95 %", rect("band95")),
        entry("50 %", (s) => ["band95", "band50"].forEach((name) => rect(name)(s))),
        entry("mean", (s) => make("path", { class: "mean", d: "M0 7H26" }, s)),
        entry("samples", (s) => make("path", { class: "sample", d: "M0 9C8 1 16 13 26 5" }, s)),
      ];
  entries.push(entry("data", (s) => make("circle", { class: "dot", cx: 13, cy: 7, r: 5 }, make("g", { class: "point" }, s))));
  if (it.subject.tasks) entries.push(entry("not seen by the model", (s) => make("circle", { class: "target", cx: 13, cy: 7, r: 4 }, s)));
  $("legend").replaceChildren(...entries);
}

// Fields that a person is writing in are left alone.
function put(element, value) {
  if (document.activeElement !== element) element.value = value;
}

function fields() {
  const { subject, settings } = it;
  const place = SAMPLES.reduce((best, s, i) => (Math.abs(s - settings.samples) < Math.abs(SAMPLES[best] - settings.samples) ? i : best), 0);
  put($("samples"), place);
  $("samples").setAttribute("aria-valuetext", `${settings.samples}`);
  $("samples-value").textContent = settings.samples;
  put($("noise"), Math.log2(settings.noise));
  if (subject.likelihood.noise) {
    const value = measured(settings.noise * subject.likelihood.noise[settings.output], output(), 3);
    $("noise-value").textContent = `${show(settings.noise, 3)} × learned = ${value}`;
    $("noise").setAttribute("aria-valuetext", `${show(settings.noise, 3)} times the learned noise, ${value}`);
  }
  put($("curves"), settings.curves);
  $("curves-value").textContent = settings.curves;
  $("curves-row").hidden = settings.mode === "map" || subject.likelihood.classes > 2;
  $("range-row").hidden = settings.mode === "map";
  $("axis-row").hidden = settings.mode === "map" || subject.inputs.length < 2;
  $("range-name").textContent = `${named(input())}, shown`;
  put($("output"), settings.output);
  put($("axis"), settings.axis);
  const places = Math.max(0, Math.min(20, 3 - Math.floor(Math.log10(settings.high - settings.low))));
  put($("low"), Number(settings.low.toFixed(places)));
  put($("high"), Number(settings.high.toFixed(places)));
  const numbersOf = (box, columns, values, skip, title, done) => {
    const wanted = columns.map((c, j) => [c, j]).filter(([, j]) => j !== skip);
    const names = `${title}${wanted.map(([c, j]) => j + c.name).join()}`;
    if (box.dataset.names !== names) {
      box.dataset.names = names;
      box.replaceChildren(...wanted.map(([c, j]) => {
        const row = tag("div", "", { class: "row" }), label = tag("label", `${named(c)}${title}`, { for: `${box.id}-${j}` });
        const field = tag("input", "", { id: `${box.id}-${j}`, type: "number", step: "any", inputmode: "decimal", "data-j": j });
        field.addEventListener("change", () => done(j, field.value === "" ? null : Number(field.value)));
        row.append(label, field);
        return row;
      }));
    }
    for (const field of box.querySelectorAll("input")) put(field, values[field.dataset.j] === null ? "" : Number(values[field.dataset.j].toPrecision(6)));
  };
  const heldInputs = settings.mode === "map" ? [] : subject.inputs;
  numbersOf($("held"), heldInputs, settings.held, settings.axis, " held at", (j, v) => {
    if (v === null) return fields();
    const held = [...settings.held];
    held[j] = v;
    set({ held });
  });
  numbersOf($("others"), subject.outputs, settings.others, settings.output, " of a new point", (j, v) => {
    if (v === null && !subject.gaps) return fields();
    const others = [...settings.others];
    others[j] = v;
    set({ others });
  });
}

function axisFrom(field, name) {
  const value = Number(field.value), other = name === "low" ? it.settings.high : it.settings.low;
  if (field.value === "" || !Number.isFinite(value) || (name === "low" ? value >= other : value <= other)) {
    complain("The axis has to go from a smaller to a larger number.");
    field.value = it.settings[name];
    return;
  }
  plot.forget();
  set({ low: it.settings.low, high: it.settings.high, [name]: value });
}

$("samples").addEventListener("input", (e) => set({ samples: SAMPLES[e.target.value] }));
$("noise").addEventListener("input", (e) => set({ noise: 2 ** Number(e.target.value) }));
$("curves").addEventListener("input", (e) => set({ curves: Number(e.target.value) }));
for (const name of ["samples", "noise", "curves"]) $(name).addEventListener("input", () => fields());
$("output").addEventListener("change", (e) => {
  plot.forget();
  const j = Number(e.target.value), others = [...it.settings.others];
  set({ output: j, others });
});
$("axis").addEventListener("change", (e) => {
  const axis = Number(e.target.value), { low, high } = it.subject.inputs[axis];
  set({ axis, low, high });
});
$("low").addEventListener("change", (e) => axisFrom(e.target, "low"));
$("high").addEventListener("change", (e) => axisFrom(e.target, "high"));
for (const button of $("modes").querySelectorAll("button")) button.addEventListener("click", () => set({ mode: button.dataset.mode }));

// --- buttons ---

$("undo").addEventListener("click", () => change({ do: "undo" }));
$("redo").addEventListener("click", () => change({ do: "redo" }));
$("clear").addEventListener("click", () => change({ do: "clear" }));
$("refresh").addEventListener("click", () => change({ do: "refresh" }));
$("retry").addEventListener("click", () => (it.subject ? link.again() : open()));
$("refused-close").addEventListener("click", () => {
  $("refused").hidden = true;
});
document.addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || event.altKey || event.target.matches("input, select, textarea")) return;
  const key = event.key.toLowerCase();
  if (key !== "z" && key !== "y") return;
  event.preventDefault();
  change({ do: key === "y" || event.shiftKey ? "redo" : "undo" });
});

// --- tasks ---

async function search() {
  try {
    const found = await link.post("tasks", { search: $("search").value });
    const chosen = $("names").value;
    $("names").replaceChildren(...found.tasks.map((t) => tag("option", `${t.name} (${t.size})`, { value: t.task })));
    $("names").value = found.tasks.some((t) => String(t.task) === chosen) ? chosen : String(found.tasks[0]?.task ?? "");
    const more = found.found > found.tasks.length ? `; the first ${found.tasks.length} are listed` : "";
    $("names-count").textContent = `${found.found} of ${found.count} tasks${more}.`;
  } catch (error) {
    if (!(error instanceof Lost)) complain(error.message);
  }
}

function load(fresh) {
  if ($("names").value === "") return;
  it.seed = fresh ? 0 : it.seed + 1;
  change({ do: "load", task: Number($("names").value), share: Number($("share").value), seed: it.seed });
  $("again").disabled = false;
}

let typing = null;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(search, 150);
});
$("load").addEventListener("click", () => load(true));
$("again").addEventListener("click", () => load(false));
$("names").addEventListener("dblclick", () => load(true));
$("names").addEventListener("keydown", (event) => {
  if (event.key === "Enter") load(true);
});

// --- the table ---

function fillTable() {
  const { inputs, outputs } = it.subject, head = document.createElement("tr");
  head.append(tag("th", "#"), ...[...inputs, ...outputs].map((c) => tag("th", named(c), { scope: "col" })), tag("th", ""));
  const rows = it.points.x.slice(0, MOST_ROWS).map((row, i) => {
    const tr = document.createElement("tr");
    tr.append(tag("td", i + 1));
    [...row, ...it.points.y[i]].forEach((value, j) => {
      const column = j < inputs.length ? inputs[j] : outputs[j - inputs.length];
      const field = tag("input", "", { type: "number", step: "any", inputmode: "decimal", "aria-label": `${column.name} of point ${i + 1}` });
      field.value = value === null ? "" : Number(value.toPrecision(6));
      field.addEventListener("change", () => edit(i, j, field));
      const td = document.createElement("td");
      td.append(field);
      tr.append(td);
    });
    const gone = tag("button", "×", { type: "button", "aria-label": `Remove point ${i + 1}` });
    gone.addEventListener("click", () => removeAt(i));
    const td = document.createElement("td");
    td.append(gone);
    tr.append(td);
    return tr;
  });
  $("table").replaceChildren(head, ...rows);
  const more = it.points.x.length - rows.length;
  $("table-note").textContent = more > 0 ? `${more} more points are not listed; save the data to see them all.` : "";
}

function edit(i, j, field) {
  const d = it.subject.inputs.length, row = [...it.points.x[i]], values = [...it.points.y[i]];
  const value = field.value === "" ? null : Number(field.value);
  if (j < d && value === null) return fillTable();
  if (j < d) row[j] = value;
  else values[j - d] = value;
  it.points.x[i] = row;
  it.points.y[i] = values;
  change({ do: "move", index: i, x: row, y: values });
  showPoints();
}

$("table-box").addEventListener("toggle", () => {
  if ($("table-box").open) fillTable();
});

// --- brushes ---

for (const [id, mode] of [["paint", "paint"], ["erase", "erase"]]) {
  $(id).addEventListener("click", () => {
    map.tool = mode;
    $("paint").setAttribute("aria-pressed", mode === "paint");
    $("erase").setAttribute("aria-pressed", mode === "erase");
  });
}
$("brush").addEventListener("change", (e) => {
  map.brush = Number(e.target.value);
});
$("faint").addEventListener("change", (e) => {
  map.faint = e.target.checked;
  map.showPoints();
});

// --- saving ---

function safely(work) {
  return async () => {
    try {
      await work();
    } catch (error) {
      complain(`Nothing was saved: ${error.message}`);
    }
  };
}

$("save-svg").addEventListener("click", safely(() => saveVector(it.settings.mode === "map" ? null : plot.svg, map)));
$("save-png").addEventListener("click", safely(() => saveRaster(it.settings.mode === "map" ? null : plot.svg, map)));
$("save-data").addEventListener("click", safely(() => saveData(it)));
$("save-predictions").addEventListener("click", safely(() => savePredictions(it)));

// --- colours ---

const THEMES = { auto: ["Colours: auto", "as the system has it"], light: ["Colours: light", "light"], dark: ["Colours: dark", "dark"] };

function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = THEMES[name][0];
  $("theme").dataset.theme = name;
  $("theme").setAttribute("aria-label", `Colours: ${THEMES[name][1]}. Change them`);
  try {
    localStorage.setItem("bnnp-theme", name);
  } catch {
    // A browser that keeps nothing: then it is for this page only.
  }
  if (it.subject && it.settings.mode === "map") render();
}

function rememberedTheme() {
  try {
    const name = localStorage.getItem("bnnp-theme");
    return name in THEMES ? name : "auto";
  } catch {
    return "auto";
  }
}

$("theme").addEventListener("click", () => {
  const order = Object.keys(THEMES);
  theme(order[(order.indexOf($("theme").dataset.theme) + 1) % order.length]);
});

theme(rememberedTheme());
open();
