/* Elements, and numbers as people read them. Data enters as text nodes and attributes only. */

const SVG = "http://www.w3.org/2000/svg";
const NONE = "–"; // no rows yet

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

export function shape(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const absent = (v) => v === null || v === undefined || Number.isNaN(v);

export const count = (n) => (absent(n) ? NONE : Math.round(n).toLocaleString("en"));

export const percent = (v, digits = 1) => (absent(v) ? NONE : `${(100 * v).toFixed(digits)}\u00a0%`);

export const fixed = (v, digits = 3) => (absent(v) ? NONE : v.toFixed(digits));

/* Four significant digits, whatever the unit. */
export function number(v) {
  if (absent(v)) return NONE;
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (size >= 1e7 || size < 1e-4) return v.toExponential(2);
  return v.toLocaleString("en", { maximumSignificantDigits: 4 });
}

export function rate(v) {
  if (absent(v)) return NONE;
  return v === 0 ? "0" : v < 10 ? v.toFixed(v < 0.1 ? 2 : 1) : count(v);
}

export function seconds(v) {
  if (absent(v)) return NONE;
  if (v >= 0.9995) return `${v.toFixed(2)}\u00a0s`;
  const ms = 1000 * v;
  return `${ms.toFixed(ms < 9.95 ? 2 : ms < 99.5 ? 1 : 0)}\u00a0ms`;
}

/* The ends of Wilson's 95 % interval of k in n: what so few rows can say of a share. */
export function wilson(k, n) {
  if (!n) return [0, 1];
  const z = 1.96;
  const [share, spread] = [k / n, (z * z) / n];
  const middle = (share + spread / 2) / (1 + spread);
  const half = (z * Math.sqrt((share * (1 - share)) / n + spread / (4 * n))) / (1 + spread);
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
}

/* A list of figures: [term, value, note, verdict]; a verdict is "good", "bad" or nothing. */
export function tiles(pairs) {
  return pairs.map(([term, value, note, verdict]) =>
    element(
      "div",
      verdict ? { class: verdict } : {},
      element("dt", {}, term),
      element("dd", {}, value, note ? element("small", {}, note) : null),
    ),
  );
}

/* A figure whose drawing and table change while its frame, and what is open in it, stays. */
export function figure(title, sentence, head) {
  const drawing = element("div", { class: "drawing" });
  const rows = element("tbody");
  const columns = head.map((v) => element("th", { scope: "col" }, v));
  const numbers = element(
    "details",
    { hidden: "" },
    element("summary", {}, "The numbers", element("span", { class: "unseen" }, ` of ${title}`)),
    element("table", {}, element("thead", {}, element("tr", {}, columns)), rows),
  );
  const caption = element("figcaption", {}, element("h3", {}, title), element("p", { class: "note" }, sentence));
  return {
    node: element("figure", {}, caption, drawing, numbers),
    draw(picture, values) {
      drawing.replaceChildren(picture);
      rows.replaceChildren(
        ...values.map((row) =>
          element("tr", {}, row.map((v, k) => element(k ? "td" : "th", k ? {} : { scope: "row" }, v))),
        ),
      );
      numbers.hidden = values.length === 0;
    },
  };
}

export const empty = (...text) => element("p", { class: "empty" }, ...text);
