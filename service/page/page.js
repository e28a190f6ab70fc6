"use strict";

const REFRESH_MS = 5000;
const SVG = "http://www.w3.org/2000/svg";

/* Numbers as people read them; null is "no rows yet". */
const count = (n) => Number(n).toLocaleString("en");
const number = (v, digits = 3) => (v === null || v === undefined ? "–" : v.toFixed(digits));
const percent = (v, digits = 1) =>
  v === null || v === undefined ? "–" : `${(100 * v).toFixed(digits)} %`;
const seconds = (v) =>
  v === null ? "–" : v < 0.0995 ? `${(1000 * v).toFixed(1)} ms` : `${v.toFixed(2)} s`;

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function shape(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

async function get(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${path} answered ${answer.status}`);
  return answer;
}

/* Samples of the exposition text: [{name, labels, value}]. */
function samples(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const parts = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!parts) continue;
    const labels = {};
    for (const [, key, value] of (parts[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[key] = value;
    }
    found.push({ name: parts[1], labels, value: Number(parts[3]) });
  }
  return found;
}

function total(all, name, labels) {
  const wanted = Object.entries(labels);
  return all
    .filter((s) => s.name === name && wanted.every(([key, value]) => s.labels[key] === value))
    .reduce((sum, s) => sum + s.value, 0);
}

/* A quantile of prediction latency from histogram buckets, linear inside a bucket. */
function latency(all, q) {
  const buckets = new Map();
  for (const s of all) {
    const predicts = /\/(infer|predict)$/.test(s.labels.route || "");
    if (s.name !== "uq_request_duration_seconds_bucket" || !predicts) continue;
    buckets.set(s.labels.le, (buckets.get(s.labels.le) || 0) + s.value);
  }
  const edges = [...buckets].map(([le, n]) => [le === "+Inf" ? Infinity : Number(le), n]);
  edges.sort((a, b) => a[0] - b[0]);
  const all_rows = edges.length ? edges[edges.length - 1][1] : 0;
  let [low, below] = [0, 0];
  for (const [high, upto] of edges) {
    if (all_rows && upto >= q * all_rows) {
      if (high === Infinity) return low;
      return low + ((high - low) * (q * all_rows - below)) / (upto - below);
    }
    [low, below] = [high, upto];
  }
  return null;
}

function tiles(pairs) {
  const list = element("dl");
  for (const [term, value, note] of pairs) {
    const small = note ? element("small", {}, note) : null;
    list.append(element("div", {}, element("dt", {}, term), element("dd", {}, value, small)));
  }
  return list;
}

function table(head, rows) {
  const body = rows.map((row) => element("tr", {}, ...row.map((v) => element("td", {}, v))));
  return element(
    "table",
    {},
    element("thead", {}, element("tr", {}, ...head.map((v) => element("th", { scope: "col" }, v)))),
    element("tbody", {}, ...body),
  );
}

/* Bars of accuracy by confidence bin against the diagonal; below, how many labels each rests on. */
function reliability(bins) {
  const [left, top, size, strip] = [34, 8, 240, 34];
  const bottom = top + size;
  const svg = shape("svg", {
    viewBox: `0 0 ${left + size + 8} ${bottom + strip + 44}`,
    role: "img",
    "aria-label": "Accuracy by confidence; the table below holds the same numbers",
  });
  for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
    const y = bottom - tick * size;
    svg.append(shape("line", { class: "grid", x1: left, x2: left + size, y1: y, y2: y }));
    svg.append(shape("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, String(tick)));
    const x = left + tick * size;
    const label = { x, y: bottom + strip + 20, "text-anchor": "middle" };
    svg.append(shape("text", label, String(tick)));
  }
  const width = size / bins.length;
  const most = Math.max(1, ...bins.map((b) => b.served));
  bins.forEach((b, k) => {
    const x = left + k * width + 1;
    if (b.labelled) {
      const height = b.accuracy * size;
      svg.append(
        shape("rect", { class: "bar", x, y: bottom - height, width: width - 2, height }),
      );
    }
    for (const [kind, n] of [["empty", b.served], ["bar", b.labelled]]) {
      const height = (n / most) * (strip - 6);
      const y = bottom + strip - height;
      svg.append(shape("rect", { class: kind, x, y, width: width - 2, height }));
    }
  });
  svg.append(
    shape("line", { class: "ideal", x1: left, y1: bottom, x2: left + size, y2: top }),
    shape("text", { x: left + size / 2, y: bottom + strip + 38, "text-anchor": "middle" }, "confidence"),
  );
  const filled = bins.filter((b) => b.served);
  const rows = filled.map((b) => [
    `${(Number(b.bin) - 0.05).toFixed(2)}–${b.bin}`,
    percent(b.confidence),
    percent(b.accuracy),
    count(b.labelled),
    percent(b.label_coverage, 0),
  ]);
  return element(
    "figure",
    {},
    element("h3", {}, "Reliability"),
    svg,
    element("figcaption", { class: "note" }, "Accuracy by confidence; on the dashed line it is calibrated. Below: predictions, and in colour those with labels."),
    element(
      "details",
      {},
      element("summary", {}, "The numbers"),
      table(["bin", "confidence", "accuracy", "labels", "labelled"], rows),
    ),
  );
}

/* What the ledger keeps of images: means over them, of maps that no label can be joined with. */
function of_images(live) {
  const means = live.images;
  const pairs = [];
  if (live.expected_accuracy !== null) {
    pairs.push(["Expected accuracy", percent(live.expected_accuracy), "mean confidence of pixels"]);
  }
  if (means.set_size !== undefined) pairs.push(["Set size", number(means.set_size, 2), "mean of pixels"]);
  if (means.std !== undefined) pairs.push(["Deviation", number(means.std), "mean std of pixels"]);
  return pairs;
}

/* One bar per level: the share of labelled rows whose set or interval held the truth. */
function coverage(levels, sets) {
  const [left, row, size] = [44, 34, 200];
  const entries = Object.entries(levels).sort((a, b) => a[0] - b[0]);
  const svg = shape("svg", {
    viewBox: `0 0 ${left + size + 52} ${entries.length * row + 8}`,
    role: "img",
    "aria-label": "Coverage by level; the table below holds the same numbers",
  });
  entries.forEach(([level, c], k) => {
    const y = k * row + 8;
    const at = left + level * size;
    const share = c.coverage ?? 0;
    svg.append(
      shape("text", { x: left - 6, y: y + 14, "text-anchor": "end" }, percent(Number(level), 0)),
      shape("rect", { class: "empty", x: left, y, width: size, height: 18 }),
      shape("rect", { class: "bar", x: left, y, width: share * size, height: 18 }),
      shape("line", { class: "level", x1: at, x2: at, y1: y - 3, y2: y + 21 }),
      shape("text", { x: left + size + 6, y: y + 14 }, percent(c.coverage)),
    );
  });
  const rows = entries.map(([level, c]) => [
    percent(Number(level), 0),
    percent(c.coverage),
    count(c.labelled),
    number(c.mean_size, 2),
  ]);
  const what = sets ? "set" : "interval";
  return element(
    "figure",
    {},
    element("h3", {}, "Coverage"),
    entries.length ? svg : element("p", { class: "note" }, "No labelled predictions yet."),
    element("figcaption", { class: "note" }, `Share of truths inside the ${what}; the mark is the level that was promised.`),
    entries.length ? table(["level", "covered", "labels", `mean ${what} ${sets ? "size" : "width"}`], rows) : null,
  );
}

function card(name, version, meta, live, metrics) {
  const key = { model: name, version };
  const served = total(metrics, "uq_predictions_total", key);
  const flagged = total(metrics, "uq_ood_total", key);
  const abstained = total(metrics, "uq_predictions_total", { ...key, outcome: "abstained" });
  const p = meta.parameters;
  const inputs = meta.inputs.map((i) => `${i.name} ${i.datatype}[${i.shape.map((d) => (d < 0 ? "N" : d)).join(", ")}]`);
  const classes = p.classes ? ` · ${p.classes.length} classes` : "";
  const facts = `${p.task}${classes} · ${p.method} · ${p.conformal} at ${p.levels.join(", ")} · ${inputs.join(", ")} · ${p.identity.slice(0, 12)}`;
  const maps = Boolean(p.dense);
  const of_labels = maps ? "images" : live ? `${count(live.labelled)} labelled, ${percent(live.label_coverage)}` : "no labels yet";
  const pairs = [["Predictions", count(live ? live.served : served), of_labels]];
  if (maps) {
    pairs.push(...(live && live.images ? of_images(live) : []));
  } else if (live && live.task === "classification") {
    pairs.push(
      ["Accuracy", percent(live.accuracy), `expected ${percent(live.expected_accuracy)}`],
      ["Calibration error", number(live.ece), "ECE, biased upward at few labels"],
      ["Log loss", number(live.log_loss), `Brier ${number(live.brier)}`],
    );
  } else if (live) {
    pairs.push(
      ["RMSE", number(live.rmse), `MAE ${number(live.mae)}`],
      ["CRPS", number(live.crps), "in units of the target"],
    );
  }
  for (const [field, title, rows] of [
    ["ood", "Out of distribution", flagged],
    ["abstain", "Abstained", abstained],
  ]) {
    if (!meta.outputs.some((o) => o.name === field)) continue;
    pairs.push([title, percent(served ? rows / served : null), `of ${maps && field === "ood" ? "pixels" : maps ? "images" : "rows"} since the start`]);
  }
  pairs.push(
    ["Latency, median", seconds(latency(metrics, 0.5)), `p99 ${seconds(latency(metrics, 0.99))}`],
  );
  const charts = live && !maps
    ? element(
        "div",
        { class: "charts" },
        live.bins ? reliability(live.bins) : null,
        coverage(live.coverage || {}, live.task === "classification"),
      )
    : null;
  return element(
    "section",
    { "aria-label": `${name} ${version}` },
    element("h2", {}, `${name} · version ${version}`),
    element("p", { class: "facts" }, facts),
    tiles(pairs),
    charts,
  );
}

/* Redrawing must not close what a reader has opened, nor move the keyboard's focus. */
function replace(main, cards) {
  const open = [...main.querySelectorAll("details")].map((d) => d.open);
  const focus = [...main.querySelectorAll("summary")].indexOf(document.activeElement);
  main.replaceChildren(...cards);
  main.querySelectorAll("details").forEach((d, k) => (d.open = Boolean(open[k])));
  if (focus >= 0) main.querySelectorAll("summary")[focus]?.focus();
}

async function refresh() {
  const status = document.getElementById("status");
  try {
    const [server, calibration, text] = await Promise.all([
      get("/v2").then((r) => r.json()),
      get("/v1/calibration").then((r) => r.json()),
      get("/metrics").then((r) => r.text()),
    ]);
    const metrics = samples(text);
    const cards = [];
    for (const name of server.models) {
      const meta = await get(`/v2/models/${encodeURIComponent(name)}`).then((r) => r.json());
      for (const version of meta.versions) {
        const live = calibration.models.find((m) => m.model === name && m.version === version);
        cards.push(card(name, version, meta, live || null, metrics));
      }
    }
    replace(document.getElementById("models"), cards);
    status.className = "";
    status.textContent = `Ready · updated ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    status.className = "down";
    status.textContent = `Not reachable: ${error.message}`;
  }
}

async function keep_fresh() {
  if (!document.hidden) await refresh();
  setTimeout(keep_fresh, REFRESH_MS);
}

document.addEventListener("visibilitychange", () => document.hidden || refresh());
keep_fresh();
