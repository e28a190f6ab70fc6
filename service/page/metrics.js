/* Numbers from the exposition text of /metrics, and their differences between polls. */

const PREDICTS = /\/(infer|predict)$/;
const KEPT_MS = 300_000;

/* The samples of the text: name → [{labels, value}]. */
export function read(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const parts = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!parts) continue;
    const labels = {};
    for (const [, name, value] of (parts[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value;
    }
    if (!found.has(parts[1])) found.set(parts[1], []);
    found.get(parts[1]).push({ labels, value: Number(parts[3]) });
  }
  return found;
}

export function samples(all, name, labels = {}) {
  const wanted = Object.entries(labels);
  return (all.get(name) || []).filter((s) => wanted.every(([key, value]) => s.labels[key] === value));
}

export const total = (all, name, labels) => samples(all, name, labels).reduce((sum, s) => sum + s.value, 0);

/* Rows that got an answer; those that were refused are predictions of nothing. */
export const answered = (all, labels) =>
  total(all, "uq_predictions_total", { ...labels, outcome: "answered" }) +
  total(all, "uq_predictions_total", { ...labels, outcome: "abstained" });

/* Cumulative buckets of a histogram, [upper edge, count] in order, over the samples that fit. */
export function buckets(all, name, labels = {}, fits = () => true) {
  const sums = new Map();
  for (const s of samples(all, `${name}_bucket`, labels)) {
    if (!fits(s.labels)) continue;
    const edge = s.labels.le === "+Inf" ? Infinity : Number(s.labels.le);
    sums.set(edge, (sums.get(edge) || 0) + s.value);
  }
  return [...sums].sort((a, b) => a[0] - b[0]);
}

/* A quantile from cumulative buckets, linear inside one; null of nothing, Infinity beyond them. */
export function quantile(edges, q) {
  const n = edges.length ? edges[edges.length - 1][1] : 0;
  if (!n) return null;
  let [low, below] = [0, 0];
  for (const [high, upto] of edges) {
    if (upto >= q * n && upto > below) {
      return high === Infinity ? Infinity : low + ((high - low) * (q * n - below)) / (upto - below);
    }
    [low, below] = [high, upto];
  }
  return null;
}

/* What one poll says of the requests for predictions. */
export function snapshot(all, at) {
  const requests = samples(all, "uq_request_duration_seconds_count").filter((s) => PREDICTS.test(s.labels.route));
  const of = (fits) => requests.filter((s) => fits(s.labels.code)).reduce((sum, s) => sum + s.value, 0);
  return {
    at,
    requests: of(() => true),
    refused: of((code) => code.startsWith("4")),
    failed: of((code) => code.startsWith("5")),
    rows: answered(all),
    edges: buckets(all, "uq_request_duration_seconds", {}, (l) => PREDICTS.test(l.route) && l.code.startsWith("2")),
  };
}

/* The polls of the last five minutes, for what happened between two of them. */
export class History {
  #polls = [];

  add(poll) {
    const last = this.#polls[this.#polls.length - 1];
    if (last && (poll.requests < last.requests || poll.rows < last.rows)) this.#polls = []; // a restart
    this.#polls.push(poll);
    while (this.#polls[0].at < poll.at - KEPT_MS) this.#polls.shift();
  }

  /* What the last `ms` added, measured from the oldest poll within them; null of one poll. */
  since(ms) {
    const now = this.#polls[this.#polls.length - 1];
    const then = this.#polls.find((p) => p.at >= now.at - ms);
    if (then === now) return null;
    const before = new Map(then.edges);
    return {
      seconds: (now.at - then.at) / 1000,
      requests: now.requests - then.requests,
      refused: now.refused - then.refused,
      failed: now.failed - then.failed,
      rows: now.rows - then.rows,
      edges: now.edges.map(([edge, n]) => [edge, n - (before.get(edge) || 0)]),
    };
  }

  /* Requests per second between polls: [{from, to, rate}] in seconds before the last poll. */
  rates() {
    const last = this.#polls[this.#polls.length - 1];
    return this.#polls.slice(1).map((p, k) => {
      const before = this.#polls[k];
      const [from, to] = [before.at, p.at].map((at) => (last.at - at) / 1000);
      return { from, to, rate: (1000 * (p.requests - before.requests)) / (p.at - before.at) };
    });
  }
}
