// Numbers for people, and where ticks stand.

export function show(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (size >= 1e6 || size < 1e-4) text = value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e").replace("e+", "e");
  else {
    text = Number(value.toPrecision(digits)).toString();
    if (size >= 10 ** digits) text = Math.round(value).toString();
  }
  return text.replace(/-/g, "\u2212");
}

export function named(column) {
  return column.unit ? `${column.name} [${column.unit}]` : column.name;
}

export function measured(value, column, digits = 4) {
  return column.unit ? `${show(value, digits)} ${column.unit}` : show(value, digits);
}

export function ticks(low, high, count) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  const found = [];
  for (let k = first; k <= last; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

// As many digits as tell neighbouring ticks apart.
export function tickText(value, step) {
  const size = Math.abs(value), fine = Math.floor(Math.log10(step) + 1e-9), half = step / 10 ** fine - Math.floor(step / 10 ** fine + 1e-6) > 1e-3 ? 1 : 0;
  let text;
  if (size < step / 1000) text = "0";
  else if (size >= 1e7 || step < 1e-4) text = value.toExponential(Math.max(0, Math.min(12, Math.floor(Math.log10(size) + 1e-9) - fine + half))).replace("e+", "e");
  else text = value.toFixed(Math.max(0, half - fine));
  return text.replace(/-/g, "\u2212");
}
