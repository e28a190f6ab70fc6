/* The server as a whole: requests for predictions, what was turned away, and the ledger. */

import { rates } from "./charts.js";
import { count, element, empty, figure, rate, seconds, tiles } from "./dom.js";
import { quantile, samples, total } from "./metrics.js";

const MINUTE = 60_000;
const SLOWEST = "over 10\u00a0s"; // the last bucket's edge

/* Builds the section; the function it gives draws a poll. */
export function traffic(root) {
  const list = element("dl", { class: "tiles" });
  const chart = figure(
    "Throughput",
    "Requests for predictions since this page was opened, whoever sent them.",
    ["", "since the start", "last minute"],
  );
  root.replaceChildren(
    element("h2", { id: "traffic-title" }, "Traffic"),
    element("p", { class: "note" }, "Of all models together. Latencies are from request to answer in the server, read from a histogram and as fine as its buckets."),
    list,
    chart.node,
  );

  return function update(all, now, history, store) {
    root.hidden = !all;
    if (!all) return;
    const lately = history.since(MINUTE);
    const [p50, p99] = [0.5, 0.99].map((q) => [late(lately, q), wording(quantile(now.edges, q))]);
    const beside = (p) => `${p[0] === "–" ? "none lately" : "last minute"}; ${p[1]} since the start`;
    const latency = (p) => (p[1] === "–" ? "no request answered yet" : beside(p));
    const per = (what) => (lately ? lately[what] / lately.seconds : null);
    list.replaceChildren(
      ...tiles([
        ["Requests", `${rate(per("requests"))} /s`, `last minute; ${count(now.requests)} since the start`],
        ["Rows", `${rate(per("rows"))} /s`, `last minute; ${count(now.rows)} since the start`],
        ["Latency p50", p50[0], latency(p50)],
        ["Latency p99", p99[0], latency(p99)],
        ["Queue", count(total(all, "uq_queue_rows")), "rows that wait for the device"],
        refused(all, now),
        ledger(all, store),
      ]),
    );
    const of = (n) => (lately ? count(n) : "–");
    chart.draw(history.rates().length ? rates(history.rates(), chart.node.clientWidth || 340) : empty("The second poll begins the picture."), [
      ["requests", count(now.requests), of(lately?.requests)],
      ["refused (4xx)", count(now.refused), of(lately?.refused)],
      ["failed (5xx)", count(now.failed), of(lately?.failed)],
      ["rows answered", count(now.rows), of(lately?.rows)],
      ["median latency", p50[1], p50[0]],
      ["99th percentile", p99[1], p99[0]],
    ]);
  };
}

const wording = (v) => (v === Infinity ? SLOWEST : seconds(v));

const late = (lately, q) => (lately ? wording(quantile(lately.edges, q)) : "–");

function refused(all, now) {
  const reasons = samples(all, "uq_rejected_total").filter((s) => s.value).sort((a, b) => b.value - a.value);
  const n = reasons.reduce((sum, s) => sum + s.value, 0);
  const words = reasons.slice(0, 2).map((s) => `${count(s.value)} ${s.labels.reason.replaceAll("_", " ")}`);
  if (reasons.length > 2) words.push("others");
  const failed = now.failed ? `${count(now.failed)} predictions failed (5xx)` : "";
  return ["Turned away", count(n), [failed, ...words].filter(Boolean).join(", ") || "requests since the start", now.failed ? "bad" : null];
}

/* Whether predictions reach the store that labels will look for them in. */
function ledger(all, store) {
  const [queued, written, spooled, lost] = ["queue_rows", "written_total", "spooled_total", "dropped_total"].map((n) => total(all, `uq_ledger_${n}`));
  const counts = [`${count(written)} written`, spooled ? `${count(spooled)} spooled` : "", lost ? `${count(lost)} lost` : ""];
  const note = counts.filter(Boolean).join(", ");
  if (store === "away") return ["Ledger", "away", `entries go to local disk; ${note}`, "bad"];
  if (store === "unknown") return ["Ledger", `${count(queued)} waiting`, note, lost ? "bad" : null];
  return ["Ledger", queued ? `${count(queued)} waiting` : "up to date", note, lost ? "bad" : "good"];
}
