// Files that the browser makes by itself: nothing is sent anywhere.

import { make } from "./plot.js";

const KEPT = ["fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-dasharray", "font-family", "font-size"];

function offer(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// The plot with its styles written into it, for readers that do not know the page's.
function standalone(svg) {
  const copy = svg.cloneNode(true);
  const from = [svg, ...svg.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
  from.forEach((element, i) => {
    const style = getComputedStyle(element);
    if (!["g", "clipPath", "svg"].includes(element.tagName)) for (const name of KEPT) to[i].setAttribute(name, style.getPropertyValue(name));
    for (const name of ["class", "tabindex", "role", "data-index", "aria-roledescription", "aria-describedby", "id"]) {
      if (name !== "id" || element.tagName !== "clipPath") to[i].removeAttribute(name);
    }
  });
  for (const dead of copy.querySelectorAll("circle[fill='rgba(0, 0, 0, 0)'], circle[fill='transparent'], circle[fill='none'][stroke='none']")) dead.remove();
  const { width, height } = svg.viewBox.baseVal;
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  const paper = make("rect", { width, height, fill: getComputedStyle(document.body).backgroundColor });
  copy.prepend(paper);
  return { text: new XMLSerializer().serializeToString(copy), width, height };
}

// All panels of the map side by side on one canvas.
function sheet(map) {
  const cell = Math.max(1, Math.round(300 / map.w)), w = map.w * cell, h = map.h * cell, gap = 16, head = 26;
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d"), style = getComputedStyle(document.body);
  canvas.width = 3 * w + 4 * gap;
  canvas.height = 2 * (h + head) + 3 * gap;
  context.fillStyle = style.backgroundColor;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = false;
  map.panels.forEach((panel, i) => {
    const x = gap + (i % 3) * (w + gap), y = gap + Math.floor(i / 3) * (h + head + gap);
    context.fillStyle = style.color;
    context.font = "15px sans-serif";
    context.fillText(panel.words.textContent, x, y + 16, w);
    context.drawImage(panel.canvas, x, y + head, w, h);
  });
  return canvas;
}

const png = (canvas) => new Promise((done, failed) => canvas.toBlob((blob) => (blob ? done(blob) : failed(new Error("the browser made no picture"))), "image/png"));

export async function saveVector(svg, map) {
  if (svg) {
    offer("posterior.svg", new Blob([standalone(svg).text], { type: "image/svg+xml" }));
    return;
  }
  const canvas = sheet(map), copy = make("svg", { xmlns: "http://www.w3.org/2000/svg", width: canvas.width, height: canvas.height });
  make("image", { href: canvas.toDataURL("image/png"), width: canvas.width, height: canvas.height }, copy);
  offer("map.svg", new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }));
}

export async function saveRaster(svg, map) {
  if (!svg) {
    offer("map.png", await png(sheet(map)));
    return;
  }
  const { text, width, height } = standalone(svg), image = new Image(), canvas = document.createElement("canvas");
  const address = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  try {
    image.src = address;
    await image.decode();
    canvas.width = 2 * width;
    canvas.height = 2 * height;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    offer("posterior.png", await png(canvas));
  } finally {
    URL.revokeObjectURL(address);
  }
}

function csv(rows) {
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    const text = String(value);
    return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

export function dataRows({ subject, points, targets }) {
  const names = [...subject.inputs, ...subject.outputs].map((column) => column.name);
  const of = (part, role) => part.x.map((row, i) => [role, ...row, ...part.y[i]]);
  return [["role", ...names], ...of(points, "seen"), ...of(targets, "not seen")];
}

export function predictionRows({ subject, settings, answer }) {
  const inputs = subject.inputs.map((column) => column.name), output = subject.outputs[settings.output].name;
  if (answer.mode === "map") {
    const { across, columns, rows } = subject.lattice, found = [];
    rows.forEach((r, j) => columns.forEach((c, i) => {
      const k = j * columns.length + i;
      found.push([...(across === 0 ? [c, r] : [r, c]), answer.mean[k], answer.std[k], ...answer.samples.map((s) => s[k])]);
    }));
    return [[...inputs, `${output} mean`, `${output} sd`, ...answer.samples.map((_, i) => `sample ${i + 1}`)], ...found];
  }
  const place = (x) => settings.held.map((v, k) => (k === settings.axis ? x : v));
  if (answer.probs) {
    return [[...inputs, ...answer.probs.map((_, k) => `probability of ${k}`)], ...answer.x.map((x, i) => [...place(x), ...answer.probs.map((p) => p[i])])];
  }
  const names = ["mean", "2.5 %", "25 %", "75 %", "97.5 %"].map((name) => `${output} ${name}`);
  const rows = answer.x.map((x, i) => [...place(x), answer.mean[i], ...answer.bands.map((b) => b[i]), ...answer.curves.map((c) => c[i])]);
  return [[...inputs, ...names, ...answer.curves.map((_, i) => `sample ${i + 1}`)], ...rows];
}

export function saveData(it) {
  offer("data.csv", new Blob([csv(dataRows(it))], { type: "text/csv" }));
}

export function savePredictions(it) {
  offer("predictions.csv", new Blob([csv(predictionRows(it))], { type: "text/csv" }));
}
