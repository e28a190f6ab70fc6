/* One model: what it is, what labels said of it, and what needs no label. */

import { coverage, flatness, reliability } from "./charts.js";
import { count, element, empty, figure, fixed, number, percent, tiles, wilson } from "./dom.js";
import { answered, buckets, total } from "./metrics.js";

const OTHER_LEVELS = 6; // that clients asked for, shown beside the bundle's own
const ECE_TOLERATED = 0.02; // beyond chance, as the alert has it: the fit saw finitely many rows
const DEVICES = { CPUExecutionProvider: "CPU", CUDAExecutionProvider: "CUDA", TensorrtExecutionProvider: "TensorRT" };

const capital = (word) => word[0].toUpperCase() + word.slice(1);

/* The panel of a model by its metadata; `update` draws what the ledger and the metrics say now. */
export function panel(root, meta) {
  const p = meta.parameters;
  const key = { model: meta.name, version: meta.versions[0] };
  const sets = p.task === "classification";
  const maps = Boolean(p.dense);
  const about = element("p", { class: "note", role: "status" });
  const figures = element("dl", { class: "tiles" });
  const what = sets ? "set" : "interval";
  const charts = {
    bins:
      sets && !maps
        ? figure(
            "Reliability",
            "Each bar is how often rows of that confidence were right, with its 95 % range; a calibrated model's bars end on the dashed line.",
            ["confidence", "mean", "accuracy", "rows", "labels", "share"],
          )
        : null,
    levels: maps
      ? null
      : figure(
          "Coverage",
          `The dot is the share of labelled truths inside the ${what}, with its 95 % range; the upright mark is the level that was promised.`,
          ["promised", "covered", "labels", `mean ${sets ? "size" : "width"}`],
        ),
    pvalues: meta.outputs.some((o) => o.name === "ood_pvalue")
      ? figure(
          "Likeness",
          `${maps ? "One pixel of each image, ranked" : "Rows ranked"} by how usual they look among those of the fit; bars on the dashed line are alike, a tall left end is drift.`,
          ["p-value", "share", maps ? "images" : "rows"],
        )
      : null,
  };
  const earlier = element("div");
  root.replaceChildren(
    element("h2", { id: "panel-title" }, meta.name),
    element("dl", { class: "facts" }, facts(meta)),
    figures,
    about,
    element("div", { class: "charts" }, Object.values(charts).map((c) => c && c.node)),
    earlier,
  );
  root.hidden = false;

  return function update(models, all, refusal) {
    const live = models && models.find((m) => m.model === key.model && m.version === key.version);
    const known = live || null;
    figures.replaceChildren(
      ...tiles([
        predictions(known, all, key, maps, Boolean(models)),
        ...(known ? (maps ? of_images(known) : sets ? of_classes(known, p) : of_values(known, p)) : []),
        ...flags(meta, all, key, maps),
      ]),
    );
    set_text(about, story(meta, known, models, refusal, maps));
    if (charts.bins) draw_bins(charts.bins, known, models);
    if (charts.levels) draw_levels(charts.levels, known, models, p.levels, sets);
    if (charts.pvalues) draw_pvalues(charts.pvalues, all, key);
    earlier.replaceChildren(...of_earlier((models || []).filter((m) => m.model === key.model && m !== live)));
  };
}

function facts(meta) {
  const p = meta.parameters;
  const inputs = meta.inputs.map((i) => `${i.name} ${i.datatype} [${i.shape.map((d) => (d < 0 ? "N" : d)).join(", ")}]`);
  const pairs = [
    ["Version", meta.versions.join(", ")],
    ["Task", capital(p.task) + (p.classes ? `, ${p.classes.length} classes` : "") + (p.dense ? ", maps" : "")],
    ["Method", p.method],
    [p.task === "classification" ? "Sets" : "Intervals", `${p.conformal} at ${p.levels.map((l) => percent(Number(l), 0)).join(", ")}`],
    ["Runs on", DEVICES[p.provider] || p.provider],
    [meta.inputs.length > 1 ? "Inputs" : "Input", inputs.join("; ")],
    ["Identity", element("code", { title: `sha256 of the manifest: ${p.identity}` }, p.identity.slice(0, 12))],
  ];
  return pairs.map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value)));
}

function predictions(live, all, key, maps, known) {
  if (!known) return ["Predictions", all ? count(answered(all, key)) : "–", all ? "since the start" : "not to be had"];
  if (!live || !live.served) return ["Predictions", "0", "none yet"];
  return ["Predictions", count(live.served), maps ? "images" : `${count(live.labelled)} labelled, ${percent(live.label_coverage)}`];
}

function of_classes(live, p) {
  if (!live.labelled) return [["Expected accuracy", percent(live.expected_accuracy), "mean confidence; needs no label"]];
  const chance = live.ece <= live.ece_noise_floor;
  const far = live.ece > live.ece_noise_floor + ECE_TOLERATED;
  return [
    ["Accuracy", percent(live.accuracy), `expected ${percent(live.expected_accuracy)} by confidence; ${percent(live.stratified_accuracy)} as served, if labels are missing at random given confidence`],
    of_level(live, p),
    [
      "Calibration error (ECE)",
      fixed(live.ece),
      `${chance ? "within" : "above"} chance, which gives up to ${fixed(live.ece_noise_floor)}; without its bias ${fixed(live.debiased_ece)}`,
      chance ? "good" : far ? "bad" : null,
    ],
    ["Log loss", fixed(live.log_loss), `nats; Brier score ${fixed(live.brier)}`],
  ];
}

function of_values(live, p) {
  if (!live.labelled) return [];
  return [
    ["RMSE", number(live.rmse), `in the target's unit; MAE ${number(live.mae)}`],
    of_level(live, p),
    ["CRPS", number(live.crps), "in the target's unit; lower is better"],
    ["Log loss", fixed(live.log_loss), "nats"],
  ];
}

/* The level most of the labelled rows were given. */
function of_level(live) {
  const [level, c] = Object.entries(live.coverage).sort((a, b) => b[1].labelled - a[1].labelled)[0] || [];
  if (!c || !c.labelled) return ["Coverage", "–", "no labelled rows yet"];
  const [low, high] = wilson(c.covered, c.labelled);
  const promised = Number(level);
  const short = high < promised;
  const words = short ? "less than" : low > promised ? "more than" : "within chance of";
  return ["Coverage", percent(c.coverage), `${words} the promised ${percent(promised, 0)}`, short ? "bad" : "good"];
}

/* What the ledger keeps of images: means over them, of maps that no label can be joined with. */
function of_images(live) {
  const means = live.images || {};
  return [
    means.confidence === undefined ? null : ["Expected accuracy", percent(means.confidence), "mean confidence of pixels"],
    means.set_size === undefined ? null : ["Set size", number(means.set_size), "classes, mean of pixels"],
    means.std === undefined ? null : ["Deviation", number(means.std), "mean std of pixels, in the target's unit"],
  ].filter(Boolean);
}

/* Shares that need no label, from the counters. */
function flags(meta, all, key, maps) {
  if (!all) return [];
  const p = meta.parameters;
  const rows = answered(all, key);
  const has = (name) => meta.outputs.some((o) => o.name === name);
  const of = (name) => (rows ? total(all, name.metric, { ...key, ...name.labels }) : 0);
  const pairs = [];
  if (has("ood")) {
    const flagged = of({ metric: "uq_ood_total", labels: {} });
    const more = !maps && p.ood_alpha !== null && wilson(flagged, rows)[0] > p.ood_alpha;
    const usual = p.ood_alpha === null ? "" : `; up to ${percent(p.ood_alpha, 0)} is usual`;
    pairs.push(["Out of distribution", percent(rows ? flagged / rows : null), `of ${maps ? "pixels" : "rows"} since the start${usual}`, more ? "bad" : null]);
  }
  if (has("abstain")) {
    const abstained = of({ metric: "uq_predictions_total", labels: { outcome: "abstained" } });
    const why = p.max_error === null ? "" : `; at most ${percent(p.max_error, 0)} of the others may be wrong`;
    pairs.push(["Abstained", percent(rows ? abstained / rows : null), `of ${maps ? "images" : "rows"} since the start${why}`]);
  }
  return pairs;
}

function story(meta, live, models, refusal, maps) {
  const path = `/v1/models/${meta.name}`;
  if (!models) return `Calibration is not to be had: ${refusal || "the server did not give it"}.`;
  if (!live || !live.served) return `No predictions yet: try one below, or POST ${path}/predict.`;
  if (maps) return "The ledger keeps no pixels, so no label can join a map: reliability and coverage are for hedged evaluate, on labelled images.";
  if (!live.labelled) return "No labels yet: what needs them appears with the first POST /v1/labels of an id and its truth.";
  return "";
}

function set_text(node, words) {
  if (node.textContent !== words) node.textContent = words;
  node.hidden = !words;
}

const MISSING = "Calibration is not to be had.";

function draw_bins(chart, live, models) {
  const bins = live && live.served ? live.bins : null;
  if (!bins) return chart.draw(empty(models ? "No predictions yet." : MISSING), []);
  const rows = bins
    .filter((b) => b.served)
    .map((b) => [
      `${(100 * Number(b.bin) - 5).toFixed(0)}–${(100 * Number(b.bin)).toFixed(0)} %`,
      percent(b.confidence),
      percent(b.accuracy),
      count(b.served),
      count(b.labelled),
      percent(b.label_coverage, 0),
    ]);
  return chart.draw(reliability(bins), rows);
}

function draw_levels(chart, live, models, own, sets) {
  if (!live || !live.labelled) return chart.draw(empty(models ? "No labelled predictions yet." : MISSING), []);
  const none = { labelled: 0, covered: 0, coverage: null, mean_size: null };
  const asked = Object.keys(live.coverage).filter((level) => !own.includes(level));
  asked.sort((a, b) => live.coverage[b].labelled - live.coverage[a].labelled);
  const levels = [...own, ...asked.slice(0, OTHER_LEVELS)]
    .map((level) => ({ level: Number(level), ...none, ...live.coverage[level] }))
    .sort((a, b) => a.level - b.level);
  const size = (l) => (l.mean_size === null ? (l.labelled ? "unbounded" : "–") : sets ? l.mean_size.toFixed(2) : number(l.mean_size));
  const rows = levels.map((l) => [`${number(100 * l.level)} %`, percent(l.coverage), count(l.labelled), size(l)]);
  return chart.draw(coverage(levels), rows);
}

function draw_pvalues(chart, all, key) {
  const upto = new Map(all ? buckets(all, "uq_ood_pvalue", key) : []);
  const n = upto.get(Infinity) || 0;
  if (!n) return chart.draw(empty(all ? "No predictions since the start." : "The metrics are not to be had."), []);
  const tenths = Array.from({ length: 10 }, (_, k) => k / 10);
  const counts = tenths.map((from, k) => (upto.get((k + 1) / 10) || 0) - (k ? upto.get(from) || 0 : 0));
  const shares = counts.map((v) => v / n);
  const rows = tenths.map((from, k) => [`${from.toFixed(1)}–${((k + 1) / 10).toFixed(1)}`, percent(shares[k]), count(counts[k])]);
  const sentence = `${percent(shares[0])} of predictions have a p-value below 0.1, where 10 % would be usual`;
  return chart.draw(flatness(shares, "p-value", sentence), rows);
}

/* Versions that are served no longer, whose labels still count. */
function of_earlier(models) {
  if (!models.length) return [];
  const first = (m) => Object.entries(m.coverage || {})[0];
  const rows = models.map((m) => [
    m.version,
    count(m.served),
    count(m.labelled),
    m.task === "classification" ? percent(m.accuracy) : number(m.rmse),
    first(m) ? `${percent(first(m)[1].coverage)} of ${percent(Number(first(m)[0]), 0)}` : "–",
  ]);
  const head = ["version", "rows", "labels", models[0].task === "classification" ? "accuracy" : "RMSE", "covered"];
  return [
    element("h3", {}, "Earlier versions"),
    element("p", { class: "note" }, "Not served now; their labels still count under them."),
    element(
      "table",
      {},
      element("thead", {}, element("tr", {}, head.map((v) => element("th", { scope: "col" }, v)))),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map((v, k) => element(k ? "td" : "th", k ? {} : { scope: "row" }, v))))),
    ),
  ];
}
