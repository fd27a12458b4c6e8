// Requests to the service, and the events of a stream.

const SILENCE_MS = 45_000; // three heartbeats: the connection is dead even where nothing says so

export class Refusal extends Error {
  constructor(response, error) {
    super(error?.message || `The server answered ${response.status}.`);
    this.status = response.status;
    this.code = error?.code || "";
    this.retryAfter = Number(response.headers.get("Retry-After")) || 0;
  }
}

export async function request(method, path, { body, headers, signal } = {}) {
  // From the origin, not from the page's address: that one may hold a name and a password.
  const response = await fetch(new URL(path, location.origin), {
    method,
    signal,
    cache: "no-store",
    headers: body ? { "Content-Type": "application/json", ...headers } : headers,
    body: body && JSON.stringify(body),
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new Refusal(response, answer?.error);
}

export async function ask(method, path, body) {
  const headers = method === "PATCH" ? { Prefer: "return=minimal" } : {};
  const response = await request(method, path, { body, headers });
  return response.status === 204 ? null : response.json();
}

export const threadPath = (thread, rest = "") => `/threads/${encodeURIComponent(thread)}${rest}`;

/** What to tell a person of any failure. */
export function explain(error) {
  if (!(error instanceof Refusal)) return "The server cannot be reached.";
  if (error.status === 401) return "You are logged out. Load the page again to log in.";
  return error.retryAfter ? `${error.message} Try again in ${error.retryAfter} s.` : error.message;
}

/** randomUUID() is only there over HTTPS and on localhost. */
export function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 15) | 64;
  bytes[8] = (bytes[8] & 63) | 128;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      removeEventListener("online", done);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    addEventListener("online", done, { once: true });
    signal.addEventListener("abort", done, { once: true });
  });
}

/** The events of a server-sent stream, until it ends, breaks or falls silent. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { name: "message", data: [] };
  try {
    for (;;) {
      let timer;
      const silence = new Promise((_, reject) => {
        timer = setTimeout(() => reject(new Error("silence")), SILENCE_MS);
      });
      const { value, done } = await Promise.race([reader.read(), silence]).finally(() => clearTimeout(timer));
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        const [, field, text] = /^([^:]*):? ?(.*)$/s.exec(line);
        if (field === "event") event.name = text;
        else if (field === "data") event.data.push(text);
        else if (field === "id") event.id = text;
        else if (line === "") {
          if (event.data.length) yield { ...event, data: JSON.parse(event.data.join("\n")) };
          event = { name: "message", data: [] };
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
