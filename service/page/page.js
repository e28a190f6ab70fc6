/* The live page: polls the server and hands what it says to the sections. */

import { Away, get, get_text, key, Refused } from "./page/api.js";
import { element } from "./page/dom.js";
import { History, read, snapshot } from "./page/metrics.js";
import { panel } from "./page/panel.js";
import { traffic } from "./page/traffic.js";
import { try_it } from "./page/try.js";

const REFRESH_MS = 5000;
const FIRST_MS = 1500; // the second poll, with which rates begin
const LEDGER_MS = 2500; // by then /v1/calibration counts what was just predicted
const $ = (id) => document.getElementById(id);

const history = new History();
const draw_traffic = traffic($("traffic"));
let shown = null; // {id, update}: the panel that is built
let chosen = wanted_model();
let polls = 0;
let paused = false;
let busy = false;
let again = false;
let last = null; // Date of the last whole answer

/* Only what changed is written: a screen reader speaks each change. */
function say(node, words, hidden = !words) {
  if (node.textContent !== words) node.textContent = words;
  node.hidden = hidden;
}

const clock = (date) => date.toLocaleTimeString([], { hour12: false });

function wanted_model() {
  try {
    return decodeURIComponent(location.hash.replace(/^#model=/, ""));
  } catch {
    return "";
  }
}

function state(kind, words) {
  $("state").className = kind;
  say($("state"), words, false);
}

function show_updated() {
  const words = last ? `${paused ? "figures of" : "updated"} ${clock(last)}` : "";
  say($("updated"), words, false);
}

/* A promise's value, or what it was refused with; no answer at all is thrown on. */
async function part(promise) {
  try {
    return { value: await promise, refusal: null };
  } catch (error) {
    if (error instanceof Away) throw error;
    return { value: null, refusal: error };
  }
}

function show_models(names) {
  const select = $("model");
  if (!names.includes(chosen)) chosen = names[0] || "";
  const before = [...select.options].map((o) => o.value);
  if (before.join("\n") !== names.join("\n")) {
    select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  }
  select.value = chosen;
  $("choice").hidden = names.length < 2;
}

function show_panel(meta) {
  const id = `${meta.name} ${meta.versions[0]} ${meta.parameters.identity}`;
  if (shown && shown.id === id) return;
  shown = { id, update: panel($("panel"), meta) };
  show_try(meta);
}

/* The form of a model; where its example is refused, the reason. */
async function show_try(meta) {
  const told = () => {
    refresh();
    setTimeout(refresh, LEDGER_MS);
  };
  try {
    await try_it($("try"), meta, told);
  } catch (error) {
    if (meta.name !== chosen) return;
    $("try").replaceChildren(
      element("h2", { id: "try-title" }, "Try it"),
      element("p", { class: "note" }, `No example is to be had: ${error.message}.`),
    );
    $("try").hidden = false;
  }
}

const asks_key = (error) => error instanceof Refused && (error.status === 401 || error.status === 403);

function ask_key(refusal) {
  const given = Boolean(key.get());
  const title = given ? "The key that was given does not open everything" : "This server asks for a key";
  say($("key-title"), title, false);
  say($("key-why"), `${refusal.path}: ${refusal.message}`, false);
  $("key").hidden = false;
}

function use_key() {
  $("key").hidden = true;
  $("forget").hidden = !key.get();
  shown = null; // the form below may have been refused its example
  refresh();
}

async function poll() {
  const server = await part(get("/v2"));
  if (!server.value) return { ready: false, fresh: false, refusals: [server.refusal] };
  show_models(server.value.models);
  const missing = Object.keys(server.value.unavailable);
  const version = server.value.version === "unknown" ? [] : [server.value.version];
  if (missing.length) version.push(`not served: ${missing.join(", ")}`);
  say($("server"), version.join("; "), false);
  const path = `/v2/models/${encodeURIComponent(chosen)}`;
  const [meta, calibration, metrics] = await Promise.all([
    part(chosen ? get(path) : Promise.resolve(null)),
    part(get("/v1/calibration")),
    part(get_text("/metrics")),
  ]);
  const all = metrics.value === null ? null : read(metrics.value);
  if (meta.value) {
    show_panel(meta.value);
    shown.update(calibration.value && calibration.value.models, all, calibration.refusal?.message);
  }
  const now = all && snapshot(all, performance.now());
  if (now) history.add(now);
  const store = calibration.value ? "here" : calibration.refusal.status === 503 ? "away" : "unknown";
  draw_traffic(all, now, history, store);
  const refusals = [meta, calibration, metrics].map((p) => p.refusal).filter(Boolean);
  return { ready: true, fresh: Boolean(calibration.value || all), refusals };
}

async function refresh() {
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  try {
    const { ready, fresh, refusals } = await poll();
    const locked = refusals.find(asks_key);
    if (locked) ask_key(locked);
    else $("key").hidden = true;
    polls += 1;
    if (fresh) last = new Date();
    if (locked) state("warn", "Locked");
    else if (!ready) state("warn", "Not ready");
    else if (refusals.length) state("warn", "Some figures are missing");
    else if (paused) state("warn", "Paused");
    else state("good", "Live");
    const missing = refusals.filter((r) => !asks_key(r)).map((r) => `${r.path}: ${r.message}`);
    if (!fresh && last) missing.push(`These figures are of ${clock(last)}`);
    say($("stale"), missing.join(". "));
  } catch (error) {
    state("bad", "Not reachable");
    const reason = error instanceof Away ? error.message : `the page failed (${error.message})`;
    say($("stale"), last ? `These figures are of ${clock(last)}: ${reason}. Trying again.` : `Nothing to show: ${reason}. Trying again.`);
    if (!(error instanceof Away)) console.error(error);
  }
  $("forget").hidden = !key.get();
  $("pause").hidden = false;
  show_updated();
  busy = false;
  if (again) {
    again = false;
    refresh();
  }
}

async function keep_fresh() {
  if (!document.hidden && !paused) await refresh();
  setTimeout(keep_fresh, polls === 1 ? FIRST_MS : REFRESH_MS);
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  if (paused) state("warn", "Paused");
  else refresh();
  show_updated();
});

$("model").addEventListener("change", () => {
  chosen = $("model").value;
  location.replace(`#model=${encodeURIComponent(chosen)}`);
  refresh();
});

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key-value").value.trim());
  $("key-value").value = "";
  use_key();
});

$("forget").addEventListener("click", () => {
  key.forget();
  use_key();
});

document.addEventListener("visibilitychange", () => document.hidden || paused || refresh());
keep_fresh();
