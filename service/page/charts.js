/* Drawings: each takes numbers and gives an SVG that a screen reader hears one sentence of. */

import { number, percent, shape, wilson } from "./dom.js";

const WIDTH = 340;

function canvas(height, sentence) {
  return shape("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": sentence });
}

const text = (x, y, words, anchor = "middle", more = {}) =>
  shape("text", { x, y, "text-anchor": anchor, ...more }, words);

const line = (kind, x1, y1, x2, y2) => shape("line", { class: kind, x1, y1, x2, y2 });

const rect = (kind, x, y, width, height) =>
  shape("rect", { class: kind, x, y, width: Math.max(0, width), height: Math.max(0, height) });

/* Accuracy by confidence against the diagonal, and below it how many rows and labels that is. */
export function reliability(bins) {
  const [left, right, top, size] = [40, 14, 8, 210];
  const [bottom, wide] = [top + size, WIDTH - left - right];
  const [strip, gap] = [30, 22];
  const [rows, share] = [bottom + gap, bottom + 2 * gap + strip];
  const labelled = bins.filter((b) => b.labelled).length;
  const svg = canvas(share + strip + 40, `Accuracy in ${labelled} bins of confidence with labels; the numbers are in the table below`);
  const width = wide / bins.length;
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    const y = bottom - tick * size;
    svg.append(line("grid", left, y, left + wide, y), text(left - 6, y + 4, `${100 * tick}`, "end"));
    svg.append(text(left + tick * wide, share + strip + 16, `${100 * tick}`));
  }
  svg.append(text(left + 4, top + 12, "accuracy, %", "start", { class: "name" }));
  const most = Math.log1p(Math.max(1, ...bins.map((b) => b.served)));
  bins.forEach((b, k) => {
    const x = left + k * width + 1;
    const middle = x + width / 2 - 1;
    if (b.labelled) {
      const [low, high] = wilson(b.correct, b.labelled);
      svg.append(
        rect("bar accuracy", x, bottom - b.accuracy * size, width - 2, b.accuracy * size),
        line("range", middle, bottom - low * size, middle, bottom - high * size),
      );
    }
    if (b.served) {
      const height = Math.max(2, (Math.log1p(b.served) / most) * strip);
      svg.append(
        rect("soft", x, rows + strip - height, width - 2, height),
        rect("empty", x, share, width - 2, strip),
        rect("bar", x, share + strip * (1 - b.label_coverage), width - 2, strip * b.label_coverage),
      );
    }
  });
  svg.append(
    line("ideal", left, bottom, left + wide, top),
    text(left, rows - 6, "predictions (log scale)", "start", { class: "name" }),
    line("grid", left, rows + strip, left + wide, rows + strip),
    text(left, share - 6, "of them labelled", "start", { class: "name" }),
    line("grid", left, share + strip, left + wide, share + strip),
    text(left - 6, share + 8, "100", "end"),
    text(left - 6, share + strip, "0", "end"),
    text(left + wide / 2, share + strip + 34, "confidence, %", "middle", { class: "name" }),
  );
  return svg;
}

/* A row per level: what was promised, what labels found, and how sure so many labels are. */
export function coverage(levels) {
  const [left, right, row, top] = [46, 14, 54, 20];
  const wide = WIDTH - left - right;
  const found = levels.map((l) => ({ ...l, range: wilson(l.covered, l.labelled) }));
  const lowest = Math.min(...found.map((l) => Math.min(l.level, l.labelled ? l.range[0] : 1)));
  const step = 1 - lowest > 0.4 ? 0.2 : 1 - lowest > 0.2 ? 0.1 : 0.05;
  const start = Math.max(0, Math.floor((lowest - step / 5) / step + 1e-9) * step);
  const at = (v) => left + ((v - start) / (1 - start)) * wide;
  const bottom = top + levels.length * row;
  const words = found.map((l) => `${percent(l.coverage)} of truths covered where ${percent(l.level, 0)} was promised`);
  const svg = canvas(bottom + 40, words.join("; "));
  for (let tick = start; tick < 1 + 1e-9; tick += step) {
    svg.append(line("grid", at(tick), top - 8, at(tick), bottom), text(at(tick), bottom + 16, (100 * tick).toFixed(0)));
  }
  found.forEach((l, k) => {
    const y = top + (k + 0.5) * row;
    svg.append(
      line("grid", left, y, left + wide, y),
      text(left - 8, y + 4, percent(l.level, l.level * 100 === Math.round(l.level * 100) ? 0 : 1), "end"),
      line("level", at(l.level), y - 13, at(l.level), y + 13),
    );
    if (!l.labelled) {
      svg.append(text(at(start) + 4, y - 6, "no labelled rows yet", "start"));
      return;
    }
    svg.append(
      line("range", at(l.range[0]), y, at(l.range[1]), y),
      shape("circle", { class: "dot", cx: at(l.coverage), cy: y, r: 5 }),
    );
  });
  svg.append(text(left + wide / 2, bottom + 34, "truths covered, %", "middle", { class: "name" }));
  return svg;
}

/* Shares of equally wide bins over 0…1; were all alike, each would reach the dashed line. */
export function flatness(shares, name, sentence) {
  const [left, right, top, size] = [40, 14, 20, 150];
  const [bottom, wide] = [top + size, WIDTH - left - right];
  const most = Math.max(2 / shares.length, ...shares);
  const svg = canvas(bottom + 40, sentence);
  for (const tick of [0, most / 2, most]) {
    const y = bottom - (tick / most) * size;
    svg.append(line("grid", left, y, left + wide, y), text(left - 6, y + 4, (100 * tick).toFixed(0), "end"));
  }
  shares.forEach((v, k) => {
    const [x, height] = [left + (k / shares.length) * wide + 1, (v / most) * size];
    svg.append(rect("bar", x, bottom - height, wide / shares.length - 2, height));
  });
  const even = bottom - size / shares.length / most;
  svg.append(line("ideal", left, even, left + wide, even));
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) svg.append(text(left + tick * wide, bottom + 16, String(tick)));
  svg.append(
    text(left + 4, top - 6, "predictions, %", "start", { class: "name" }),
    text(left + wide / 2, bottom + 34, name, "middle", { class: "name" }),
  );
  return svg;
}

/* Requests per second over the last minutes, newest at the right; `width` in pixels. */
export function rates(list, width, span = 300) {
  const [left, right, top, size] = [40, 14, 20, 70];
  const wide = width - left - right;
  const bottom = top + size;
  const most = Math.max(1e-9, ...list.map((r) => r.rate));
  const svg = canvas(bottom + 22, `Requests per second, at most ${number(most)} in the last five minutes`);
  svg.setAttribute("viewBox", `0 0 ${width} ${bottom + 22}`);
  const at = (ago) => left + wide * (1 - Math.min(ago, span) / span);
  svg.append(
    line("grid", left, top, left + wide, top),
    line("grid", left, bottom, left + wide, bottom),
    text(left - 6, top + 4, most > 1e-9 ? number(Number(most.toPrecision(2))) : "", "end"),
    text(left - 6, bottom + 4, "0", "end"),
    text(left, top - 7, "requests per second", "start", { class: "name" }),
    text(left, bottom + 16, "5 minutes ago", "start"),
    text(left + wide, bottom + 16, "now", "end"),
  );
  for (const r of list) {
    const height = (r.rate / most) * size;
    svg.append(rect("bar", at(r.from), bottom - height, Math.max(2, at(r.to) - at(r.from) - 1), height));
  }
  return svg;
}

/* A share of the whole as one bar. */
export function share(v, sentence) {
  const svg = canvas(10, sentence);
  svg.append(rect("empty", 0, 0, WIDTH, 10), rect("bar", 0, 0, WIDTH * v, 10));
  return svg;
}

/* An interval around its mean; an end that is null is unbounded. */
export function interval(lower, mean, upper) {
  const svg = canvas(44, `From ${ends(lower, "−∞")} to ${ends(upper, "∞")} around ${number(mean)}`);
  const reach = Math.max(mean - (lower ?? mean), (upper ?? mean) - mean) || Math.abs(mean) || 1;
  const at = (v) => WIDTH / 2 + ((v - mean) / reach) * (WIDTH / 2 - 40);
  const [from, to] = [lower === null ? 0 : at(lower), upper === null ? WIDTH : at(upper)];
  svg.append(line("grid", 0, 14, WIDTH, 14), rect("soft", from, 7, to - from, 14));
  if (lower !== null) svg.append(line("range", from, 4, from, 24));
  if (upper !== null) svg.append(line("range", to, 4, to, 24));
  svg.append(
    shape("circle", { class: "dot", cx: at(mean), cy: 14, r: 5 }),
    text(from, 40, ends(lower, "−∞"), lower === null ? "start" : "middle"),
    text(to, 40, ends(upper, "∞"), upper === null ? "end" : "middle"),
  );
  return svg;
}

export const ends = (v, unbounded) => (v === null ? unbounded : number(v));
