/* The form that asks for one prediction, and its answer in words. */

import { get, post } from "./api.js";
import { ends, interval, share } from "./charts.js";
import { element, number, percent } from "./dom.js";

const MOST_VALUES = 4096; // of an input that a form is for
const MOST_COLUMNS = 60;
const MOST_ROWS = 10;
const MOST_CHIPS = 24;

/* Shows the form of a model in `root`; `told` is called after each try. */
export async function try_it(root, meta, told) {
  const path = `/v1/models/${encodeURIComponent(meta.name)}`;
  const title = element("h2", { id: "try-title" }, "Try it");
  root.replaceChildren(title); // a form of another model must not stay while this one's comes
  const small = meta.inputs.every((i) => i.shape.slice(1).reduce((n, d) => n * Math.abs(d), 1) <= MOST_VALUES);
  if (!small) {
    root.replaceChildren(title, note(`An input of ${meta.name} is too large for a form; POST ${path}/predict.`));
    root.hidden = false;
    return;
  }
  const example = await get(`${path}/example`);
  if (!title.isConnected) return; // another model was chosen meanwhile
  const row = example.rows && Object.keys(example.rows[0]).length <= MOST_COLUMNS ? example.rows[0] : null;
  const fields = row ? columns(row) : tensors(example);
  const level = levels(meta.parameters.levels);
  const error = element("p", { class: "refusal", role: "alert", hidden: "" });
  const answer = element("div", { "aria-live": "polite" });
  const reset = element("button", { type: "button" }, "The example again");
  const send = element("button", { type: "submit", class: "main" }, "Predict");
  const form = element("form", { "aria-labelledby": "try-title" }, fields.node, element("p", { class: "line" }, level.node, send, reset));
  reset.addEventListener("click", () => {
    fields.reset();
    error.hidden = true;
    answer.replaceChildren();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (send.getAttribute("aria-disabled") === "true") return;
    send.setAttribute("aria-disabled", "true"); // and not disabled, which would lose the focus
    error.hidden = true;
    try {
      const found = await post(`${path}/predict`, body(fields.json(), level.alpha()));
      answer.replaceChildren(...answers(found, meta, level.text()));
    } catch (problem) {
      answer.replaceChildren();
      error.hidden = false;
      error.textContent = problem.message;
    } finally {
      send.removeAttribute("aria-disabled");
    }
    told();
  });
  const source = row ? "one row of the bundle's own examples" : "the bundle's own example, as JSON of tensors by name";
  root.replaceChildren(
    title,
    note(`Filled with ${source}. A try is a prediction like any other: it is counted and kept in the ledger.`),
    form,
    error,
    answer,
  );
  root.hidden = false;
}

const note = (words) => element("p", { class: "note" }, words);

/* The request's text; what was typed goes in as it is, so that the server says what is wrong. */
function body(inputs, alpha) {
  return `{${inputs}${alpha === null ? "" : `,"alpha":${alpha}`}}`;
}

function columns(row) {
  const inputs = Object.entries(row).map(([name, value], k) => {
    const id = `try-${k}`;
    const input = element("input", { id, type: "text", inputmode: "decimal", autocomplete: "off", spellcheck: "false" });
    input.value = JSON.stringify(value);
    return { name, value: input.value, input, node: element("div", {}, element("label", { for: id }, name), input) };
  });
  return {
    node: element("div", { class: "fields" }, inputs.map((i) => i.node)),
    reset: () => inputs.forEach((i) => (i.input.value = i.value)),
    json: () => `"rows":[${JSON.stringify(Object.fromEntries(inputs.map((i) => [i.name, typed(i.input.value)])))}]`,
  };
}

function tensors(example) {
  const [kind] = Object.keys(example);
  const text = JSON.stringify(example[kind]);
  const area = element("textarea", { id: "try-json", rows: "6", spellcheck: "false", autocomplete: "off" });
  area.value = text;
  return {
    node: element("div", {}, element("label", { for: "try-json" }, kind === "rows" ? "Rows by column name" : "Tensors by name, rows first"), area),
    reset: () => (area.value = text),
    json: () => `"${kind}":${area.value}`,
  };
}

/* A cell as JSON where it is some, else the text itself. */
function typed(text) {
  if (!text.trim()) return null;
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

function levels(names) {
  const select = element("select", { id: "try-level" }, names.map((l) => element("option", { value: l }, percent(Number(l), Number(l) * 100 % 1 > 1e-9 ? 1 : 0))));
  return {
    node: element("span", { class: "line" }, element("label", { for: "try-level" }, "Level"), select),
    alpha: () => (select.value === names[0] ? null : Number((1 - Number(select.value)).toPrecision(10))),
    text: () => select.selectedOptions[0].textContent,
  };
}

function answers(found, meta, level) {
  const say = meta.parameters.dense ? of_map : meta.parameters.task === "classification" ? of_class : of_value;
  const shown = found.predictions.slice(0, MOST_ROWS);
  const more = found.predictions.length - shown.length;
  const raw = shown.length === 1 ? shown[0] : found.predictions;
  return [
    ...shown.map((row) => element("article", { class: "answer", "aria-label": `Answer ${row.id}` }, say(row, level), flags(row))),
    more ? note(`and ${more} more rows`) : null,
    meta.parameters.dense
      ? null
      : element("details", {}, element("summary", {}, "The answer as JSON"), element("pre", { tabindex: "0" }, JSON.stringify(raw, null, 2))),
  ].filter(Boolean);
}

const says = (pairs) =>
  element("dl", { class: "says" }, pairs.filter(Boolean).map(([term, value, words]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, value, words ? element("small", {}, words) : null))));

const has = (v) => v !== undefined && v !== null;

function of_class(row, level) {
  return [
    element("p", { class: "headline" }, element("strong", {}, String(row.label)), ` with ${percent(row.confidence)} confidence`),
    share(row.confidence, `Confidence ${percent(row.confidence)}`),
    says([
      has(row.set) ? [`Set at ${level}`, chips(row.set), row.set.length ? "holds the truth that often" : "no class is usual enough at this level"] : null,
      has(row.epistemic) ? ["Epistemic", `${number(row.epistemic)} nats`, "doubt that more training data would remove"] : null,
      has(row.aleatoric) ? ["Aleatoric", `${number(row.aleatoric)} nats`, "doubt that would stay"] : null,
      has(row.entropy) ? ["Entropy", `${number(row.entropy)} nats`, "of all class probabilities"] : null,
      pvalue(row),
    ]),
  ];
}

function chips(names) {
  const shown = names.slice(0, MOST_CHIPS).map((name) => element("li", {}, String(name)));
  const more = names.length - shown.length;
  if (!names.length) return "empty";
  return element("ul", { class: "chips" }, shown, more ? element("li", {}, `and ${more} more`) : null);
}

const pvalue = (row) =>
  has(row.ood_pvalue) ? ["Likeness", number(row.ood_pvalue), "share of the fit's rows that look as strange"] : null;

function of_value(row, level) {
  const many = Array.isArray(row.mean);
  const means = many ? row.mean : [row.mean];
  const pick = (name, k) => (row[name] === undefined ? undefined : many ? row[name][k] : row[name]);
  return means.map((mean, k) => {
    const [lower, upper] = [pick("lower", k), pick("upper", k)];
    const bounds = lower !== undefined && upper !== undefined;
    return [
      element("p", { class: "headline" }, many ? `Output ${k}: ` : null, element("strong", {}, number(mean)), ` ± ${number(pick("std", k))} (one standard deviation)`),
      bounds ? interval(lower, mean, upper) : null,
      says([
        bounds ? [`Interval at ${level}`, `${ends(lower, "−∞")} to ${ends(upper, "∞")}`, "holds the truth that often"] : null,
        has(pick("epistemic_std", k)) ? ["Epistemic", number(pick("epistemic_std", k)), "deviation that more training data would remove"] : null,
        has(pick("aleatoric_std", k)) ? ["Aleatoric", number(pick("aleatoric_std", k)), "deviation that would stay"] : null,
        k === 0 ? pvalue(row) : null,
      ]),
    ];
  });
}

/* Of a map its size and means; each pixel has an answer of its own. */
function of_map(row) {
  const mean = (v) => {
    const all = v.flat(Infinity).map(Number);
    return all.reduce((sum, x) => sum + x, 0) / all.length;
  };
  const size = (v) => (Array.isArray(v) ? [v.length, ...size(v[0])] : []);
  const main = row.label ?? row.mean;
  return [
    element("p", { class: "headline" }, element("strong", {}, `A map of ${size(main).join(" × ")}`), " has one answer for each pixel"),
    says([
      row.confidence ? ["Confidence", percent(mean(row.confidence)), "mean of pixels"] : null,
      row.set_size ? ["Set size", number(mean(row.set_size)), "classes, mean of pixels"] : null,
      row.std ? ["Deviation", number(mean(row.std)), "mean of pixels"] : null,
      row.epistemic ? ["Epistemic", `${number(mean(row.epistemic))} nats`, "mean of pixels"] : null,
      row.ood ? ["Out of distribution", percent(mean(row.ood)), "of pixels"] : null,
      row.abstain ? ["Abstained", percent(mean(row.abstain)), "of pixels"] : null,
    ]),
  ];
}

function flags(row) {
  const badges = [
    typeof row.ood === "boolean" ? [row.ood, "out of distribution: unlike the fit's rows", "in distribution"] : null,
    typeof row.abstain === "boolean" ? [row.abstain, "abstain: too unsure to answer", "sure enough to answer"] : null,
  ].filter(Boolean);
  return badges.length
    ? element("ul", { class: "flags" }, badges.map(([raised, yes, no]) => element("li", { class: raised ? "bad" : "good" }, raised ? yes : no)))
    : null;
}
