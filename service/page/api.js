/* Requests to the server that this page came from, with the key that its reader gave. */

const STORED = "hedged-key";
const TIMEOUT_MS = 15000;

export const key = {
  get: () => sessionStorage.getItem(STORED),
  set: (value) => sessionStorage.setItem(STORED, value),
  forget: () => sessionStorage.removeItem(STORED),
};

/* The server's refusal: its status and its own words. */
export class Refused extends Error {
  constructor(path, status, message) {
    super(message || `${path} answered ${status}`);
    this.path = path;
    this.status = status;
  }
}

/* No answer at all. */
export class Away extends Error {}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const given = key.get();
  if (given) headers.authorization = `Bearer ${given}`;
  // Without a key of its own the page uses the one that the browser asked for, if it did; with
  // one the browser stays out of it: it would ask again, over the page, when that one is refused.
  const credentials = given ? "omit" : "same-origin";
  let answer, text;
  try {
    const signal = AbortSignal.timeout(TIMEOUT_MS);
    answer = await fetch(path, { cache: "no-store", credentials, ...options, headers, signal });
    text = await answer.text();
  } catch (error) {
    const late = error.name === "TimeoutError";
    throw new Away(late ? `no answer within ${TIMEOUT_MS / 1000} s` : "the server does not answer");
  }
  if (!answer.ok) throw new Refused(path, answer.status, words(text));
  return text;
}

function words(text) {
  try {
    const { error } = JSON.parse(text);
    return typeof error === "string" ? error : error.message;
  } catch {
    return null;
  }
}

export const get_text = (path) => ask(path);
export const get = async (path) => JSON.parse(await ask(path));
export const post = async (path, body) =>
  JSON.parse(await ask(path, { method: "POST", headers: { "content-type": "application/json" }, body }));
