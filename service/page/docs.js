/* The OpenAPI document of this server, to read, with commands to copy. */

import { get, key } from "./api.js";
import { element } from "./dom.js";

const state = document.getElementById("state");
const main = document.getElementById("main");
const JSON_TYPE = "application/json";

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const slug = (text) => text.replaceAll(/[^a-z0-9]+/gi, "-");

/* JSON on one line where it fits: an example is read, not only run. */
function compact(value, indent = "") {
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? ["[", "]"] : ["{", "}"];
  const next = `${indent}  `;
  const parts = (inner) =>
    Array.isArray(value)
      ? value.map((v) => compact(v, inner))
      : Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${compact(v, inner)}`);
  const flat = `${open}${parts("").join(", ")}${close}`;
  if (flat.length <= 88 && !flat.includes("\n")) return flat;
  return `${open}\n${next}${parts(next).join(`,\n${next}`)}\n${indent}${close}`;
}

/* A curl command for one operation, of one model where the path names one. */
function command(schema, method, path, operation, name) {
  const body = operation.requestBody?.content?.[JSON_TYPE];
  const example = body?.examples?.[name] ?? Object.values(body?.examples ?? {})[0];
  const version = operation.parameters?.find((p) => p.name === "version")?.schema.enum[0];
  const part = operation.parameters?.find((p) => p.name === "part")?.schema.enum[0];
  const filled = path
    .replace("{name}", name)
    .replace("{version}", version)
    .replace("{part}", part)
    .replace("{id}", "first:0");
  const words = [`curl -s${method === "delete" ? " -X DELETE" : ""} ${quoted(location.origin + filled)}`];
  if (operation.security) words.push('-H "Authorization: Bearer $HEDGED_KEY"');
  if (example) {
    words.push(`-H 'Content-Type: ${JSON_TYPE}'`);
    words.push(`-d ${quoted(compact(example.value))}`);
  }
  const short = words.join(" ");
  return short.length <= 90 ? short : words.join(" \\\n  ");
}

function copyable(text) {
  const button = element("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      // Without https a browser may keep its clipboard to itself.
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  const code = element("code", {}, text);
  return element("div", { class: "command" }, element("pre", { tabindex: "0" }, code), button);
}

/* What a schema says, in a line. */
function brief(schema, all) {
  if (schema.$ref) return brief(all[schema.$ref.split("/").pop()], all);
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) {
    const shown = schema.enum.slice(0, 6).map((v) => JSON.stringify(v));
    const rest = schema.enum.length - shown.length;
    return `${shown.join(", ")}${rest > 0 ? ` and ${rest} more` : ""}`;
  }
  if (schema.anyOf) return schema.anyOf.map((s) => brief(s, all)).join(", or ");
  if (schema.type === "array") {
    const size = schema.minItems === schema.maxItems ? `${schema.minItems ?? ""} ` : "";
    return `list of ${size}${brief(schema.items ?? {}, all)}`;
  }
  if (schema.type === "object") {
    const names = Object.keys(schema.properties ?? {});
    return `object${names.length ? ` (${names.slice(0, 12).join(", ")}${names.length > 12 ? ", …" : ""})` : ""}`;
  }
  return [schema.type ?? "anything"].flat().join(" or ");
}

function fields(schema, all) {
  if (!schema?.properties) return null;
  const needed = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties).map(([name, of]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, element("code", {}, name), needed.has(name) ? " *" : ""),
      element("td", {}, brief(of, all), of.description ? element("small", {}, of.description) : null),
    ),
  );
  return element("div", { class: "wide" }, element("table", {}, element("tbody", {}, rows)));
}

/* The schemas behind an anyOf of models, by what they are called. */
function named(schema) {
  const refs = (schema?.anyOf ?? [schema]).map((s) => s?.$ref?.split("/").pop());
  return refs.filter(Boolean);
}

function bodies(title, content, all) {
  return Object.entries(content).map(([type, { schema }]) => {
    const names = named(schema);
    const of = names.map((name) => [
      names.length > 1 ? element("h4", {}, element("code", {}, name)) : null,
      fields(all[name], all),
    ]);
    const said = schema?.description ? `: ${schema.description}` : "";
    return element("div", {}, element("p", { class: "note" }, `${title} `, element("code", {}, type), said), of);
  });
}

function operation(schema, path, method, of, models) {
  const all = schema.components.schemas;
  const content = of.requestBody?.content ?? {};
  const examples = Object.keys(content[JSON_TYPE]?.examples ?? {});
  const names = path.includes("{name}") || examples.length > 1 ? models : models.slice(0, 1);
  // Nothing to copy where no request of this kind is answered: maps have no labels.
  const silent = (of.requestBody && !examples.length) || (path === "/v1/predict" && models.length > 1);
  const shown = silent ? [] : names;
  const statuses = Object.entries(of.responses).map(([status, answer]) =>
    element("tr", {}, element("th", { scope: "row" }, status), element("td", {}, answer.description)),
  );
  const id = of.operationId;
  return element(
    "article",
    { id, "aria-labelledby": `${id}-title` },
    element(
      "h3",
      { id: `${id}-title` },
      element("span", { class: `method ${method}` }, method.toUpperCase()),
      " ",
      element("code", {}, path),
    ),
    element("p", {}, of.summary, of.description ? `. ${of.description}` : ""),
    shown.map((name) => [
      shown.length > 1 ? element("p", { class: "note" }, name) : null,
      copyable(command(schema, method, path, of, name)),
    ]),
    element(
      "details",
      {},
      element("summary", {}, "What it takes and gives", element("span", { class: "unseen" }, `: ${path}`)),
      (of.parameters ?? []).map((p) =>
        element("p", { class: "note" }, `${p.in} `, element("code", {}, p.name), `: ${p.description}; ${brief(p.schema, all)}`),
      ),
      bodies("Takes", content, all),
      bodies("Gives", of.responses["200"].content, all),
      element("div", { class: "wide" }, element("table", {}, element("tbody", {}, statuses))),
    ),
  );
}

function draw(schema) {
  const ready = schema.paths["/v2/models/{name}"].get.parameters[0].schema.enum;
  for (const tag of schema.tags) {
    const articles = [];
    for (const [path, methods] of Object.entries(schema.paths))
      for (const [method, of] of Object.entries(methods))
        if (of.tags.includes(tag.name)) articles.push(operation(schema, path, method, of, ready));
    const id = slug(tag.name);
    main.append(
      element(
        "section",
        { "aria-labelledby": id },
        element("h2", { id }, tag.name),
        element("p", { class: "note" }, tag.description),
        articles,
      ),
    );
  }
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

try {
  const schema = await get("/openapi.json");
  draw(schema);
  const count = Object.keys(schema.paths).length;
  state.textContent = `${count} paths, version ${schema.info.version}`;
} catch (error) {
  state.className = "down";
  state.textContent = error.status === 401 && !key.get() ? "Give a key on the live page first" : error.message;
}
