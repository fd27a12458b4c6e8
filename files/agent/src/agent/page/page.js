// The chat page. It has no build step and no dependency, and it makes DOM nodes from the model's text, never markup.
"use strict";

const THEME = "agent-theme";
const TURN = "agent-turn";
const PAGE_SIZE = 50;
const SILENCE_MS = 45_000; // three heartbeats: the connection is dead even where nothing says so
const MAX_FAILURES = 12;
const TURN_KEPT_MS = 3_600_000;

/* ---- Theme: before the first paint ------------------------------------------------------------------------------ */

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : systemIsDark.matches;
}

function setTheme(chosen) {
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
}

/** A browser may forbid the page to store anything; then it forgets. */
function stored(storage, key) {
  try {
    return window[storage].getItem(key);
  } catch {
    return null;
  }
}

function store(storage, key, value) {
  try {
    if (value === null) window[storage].removeItem(key);
    else window[storage].setItem(key, value);
  } catch {
    // Forgotten.
  }
}

setTheme(stored("localStorage", THEME));
document.addEventListener("DOMContentLoaded", start);

/* ---- DOM ---------------------------------------------------------------------------------------------------------- */

const byId = (id) => document.getElementById(id);

/** Make an element. A name with a hyphen is an attribute, `on...` a listener, all else a property. Text stays text. */
function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

function iconButton(name, label, onclick) {
  return el("button", { type: "button", className: "icon", title: label, "aria-label": label, onclick }, icon(name));
}

const button = (text, onclick, className = "") => el("button", { type: "button", className, onclick }, text);

/** Tell a screen reader. */
function announce(text) {
  byId("live").textContent = text;
}

/* ---- Markdown ----------------------------------------------------------------------------------------------------- */
// Every search is bounded or remembered, so that no text takes more than a moment, however odd.

const MAX_DEPTH = 8;
const MAX_LINK = 2000;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const PLAIN = /[^\\`*_~![<h\n]+/y;
const WEB_ADDRESS = /https?:\/\/[^\s<>"`]+/iy;
const isWord = (character) => character !== undefined && /[\p{L}\p{N}]/u.test(character);
const isSpace = (character) => character === undefined || /\s/.test(character);

/** The address where it is one of the web and shows where it leads, else null. */
function webAddress(text) {
  try {
    const url = new URL(text);
    const plain = (url.protocol === "http:" || url.protocol === "https:") && !url.username && !url.password;
    return plain ? url.href : null;
  } catch {
    return null;
  }
}

function link(href, ...children) {
  return el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow", title: href }, ...children);
}

/** Nodes and strings for a run of text within a block. */
function inline(text, depth = 0) {
  const nodes = [];
  const hopeless = new Set(); // marks that have no partner in the rest of this text
  let plain = "";
  for (let at = 0; at < text.length; ) {
    PLAIN.lastIndex = at;
    const simple = PLAIN.exec(text);
    if (simple) {
      plain += simple[0];
      at += simple[0].length;
      continue;
    }
    const found = depth < MAX_DEPTH ? special(text, at, depth, hopeless) : null;
    if (!found) {
      plain += text[at++];
      continue;
    }
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(found.node);
    at = found.end;
  }
  if (plain) nodes.push(plain);
  return nodes;
}

function special(text, at, depth, hopeless) {
  switch (text[at]) {
    case "\n":
      return { node: el("br"), end: at + 1 };
    case "\\":
      return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
    case "`":
      return codeSpan(text, at, hopeless);
    case "!":
      // A picture would be a request to somewhere: it becomes a link.
      return text[at + 1] === "[" ? namedLink(text, at + 1) : null;
    case "[":
      return namedLink(text, at);
    case "<":
    case "h":
      return bareLink(text, at);
    default:
      return emphasis(text, at, depth, hopeless);
  }
}

function codeSpan(text, at, hopeless) {
  let start = at;
  while (text[start] === "`") start++;
  const mark = text.slice(at, start);
  if (!hopeless.has(mark)) {
    for (let end = text.indexOf(mark, start); end >= 0; ) {
      let after = end;
      while (text[after] === "`") after++;
      if (after - end === mark.length) {
        const code = text.slice(start, end).replaceAll("\n", " ");
        const padded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
        return { node: el("code", {}, padded ? code.slice(1, -1) : code), end: after };
      }
      end = text.indexOf(mark, after);
    }
    hopeless.add(mark);
  }
  return { node: mark, end: start };
}

function namedLink(text, at) {
  let open = 0;
  let close = at;
  for (const limit = Math.min(text.length, at + MAX_LINK); close < limit; close++) {
    if (text[close] === "\\") close++;
    else if (text[close] === "[") open++;
    else if (text[close] === "]" && --open === 0) break;
  }
  if (open !== 0 || text[close + 1] !== "(") return null;
  let end = close + 1;
  let nested = 0;
  for (const limit = Math.min(text.length, close + MAX_LINK); end < limit; end++) {
    if (text[end] === "(") nested++;
    else if (text[end] === ")" && --nested === 0) break;
  }
  if (nested !== 0) return null;
  const target = text.slice(close + 2, end).trim();
  const href = webAddress(/^<?([^\s<>]*)/.exec(target)[1]);
  if (!href) return null;
  return { node: link(href, ...inline(text.slice(at + 1, close), MAX_DEPTH - 1).map(withoutLink)), end: end + 1 };
}

const withoutLink = (node) => (node instanceof HTMLAnchorElement ? node.textContent : node);

function bareLink(text, at) {
  const angled = text[at] === "<";
  if (!angled && isWord(text[at - 1])) return null;
  WEB_ADDRESS.lastIndex = angled ? at + 1 : at;
  let address = WEB_ADDRESS.exec(text)?.[0].slice(0, MAX_LINK);
  if (!address) return null;
  let end = WEB_ADDRESS.lastIndex;
  if (angled) {
    if (text[end] !== ">") return null;
    end++;
  } else {
    // What ends a sentence is not part of an address; a bracket is where it was opened in it.
    while (/[.,;:!?'*_~\]]/.test(address.at(-1)) || (address.endsWith(")") && !address.includes("("))) {
      address = address.slice(0, -1);
    }
    end = at + address.length;
  }
  const href = webAddress(address);
  return href && { node: link(href, address), end };
}

const EMPHASIS = { 1: ["em"], 2: ["strong"], 3: ["strong", "em"] };

function emphasis(text, at, depth, hopeless) {
  const mark = text[at];
  let start = at;
  while (text[start] === mark) start++;
  const size = start - at;
  const whole = text.slice(at, start);
  const tags = mark === "~" ? (size === 2 ? ["del"] : null) : EMPHASIS[size];
  const opens = tags && !isSpace(text[start]) && !(mark === "_" && isWord(text[at - 1]));
  if (!opens || hopeless.has(whole)) return { node: whole, end: start };
  for (let end = text.indexOf(whole, start); end >= 0; ) {
    let after = end;
    while (text[after] === mark) after++;
    // In "**a *b***" the last two belong to the outer pair.
    const fits = after - end === size || (size === 2 && after - end === 3);
    if (fits && !isSpace(text[end - 1]) && !(mark === "_" && isWord(text[after]))) {
      const close = after - size;
      const children = inline(text.slice(start, close), depth + 1);
      const node = tags.reduceRight((inner, tag) => [el(tag, {}, ...inner)], children)[0];
      return { node, end: after };
    }
    end = text.indexOf(whole, after);
  }
  hopeless.add(whole);
  return { node: whole, end: start };
}

const indentOf = (line) => line.length - line.trimStart().length;

function fenceOf(line) {
  const mark = /^ {0,3}(`{3,}|~{3,})/.exec(line);
  if (!mark || (mark[1][0] === "`" && line.slice(mark[0].length).includes("`"))) return null;
  return { mark: mark[1], indent: indentOf(line) };
}

const isRule = (line) => indentOf(line) < 4 && /^(-{3,}|\*{3,}|_{3,})$/.test(line.replace(/\s/g, ""));
const headingOf = (line) => /^ {0,3}(#{1,6})(?: |$)/.exec(line);
const isQuote = (line) => /^ {0,3}>/.test(line);

function endsParagraph(line) {
  const item = ITEM.exec(line);
  const listed = item && line.length > item[0].length && (!/^\d/.test(item[2]) || /^1[.)]$/.test(item[2]));
  return !line.trim() || listed || isQuote(line) || headingOf(line) || isRule(line) || fenceOf(line);
}

/** Read the block that starts at a line: its node, if it shows anything, and the line after it. */
function readBlock(lines, at, depth) {
  const line = lines[at];
  if (!line.trim()) return { next: at + 1 };
  const fence = fenceOf(line);
  if (fence) return readCode(lines, at, fence);
  const heading = headingOf(line);
  if (heading) {
    const text = line.slice(heading[0].length).trim().replace(/ #+$/, "");
    return { node: el(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(text)), next: at + 1 };
  }
  if (isRule(line)) return { node: el("hr"), next: at + 1 };
  if (depth < MAX_DEPTH) {
    if (isQuote(line)) return readQuote(lines, at, depth);
    if (ITEM.test(line)) return readList(lines, at, depth);
  }
  return readTable(lines, at) ?? readParagraph(lines, at);
}

function readBlocks(lines, depth) {
  const nodes = [];
  for (let at = 0; at < lines.length; ) {
    const block = readBlock(lines, at, depth);
    if (block.node) nodes.push(block.node);
    at = block.next;
  }
  return nodes;
}

function readCode(lines, at, { mark, indent }) {
  let next = at + 1;
  const code = [];
  for (; next < lines.length; next++) {
    const closing = lines[next].trim();
    if (closing.length >= mark.length && closing[0] === mark[0] && !closing.replaceAll(mark[0], "")) break;
    code.push(lines[next].slice(Math.min(indent, indentOf(lines[next]))));
  }
  const text = code.join("\n");
  const block = el("div", { className: "code" }, el("pre", { tabIndex: 0 }, el("code", {}, text)));
  if (navigator.clipboard) {
    const copy = button("Copy", async () => {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
      announce("Copied");
    });
    copy.className = "copy";
    block.append(copy);
  }
  return { node: block, next: next + 1 };
}

function readQuote(lines, at, depth) {
  const inner = [];
  let next = at;
  for (; next < lines.length && (isQuote(lines[next]) || (next > at && !endsParagraph(lines[next]))); next++) {
    inner.push(lines[next].replace(/^ {0,3}> ?/, ""));
  }
  return { node: el("blockquote", {}, ...readBlocks(inner, depth + 1)), next };
}

function readList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = /^\d/.test(first[2]);
  const kind = first[2].at(-1);
  const base = first[1].length;
  const items = [];
  let next = at;
  let loose = false;
  for (; next < lines.length; next++) {
    const line = lines[next];
    const blank = next > at && !lines[next - 1].trim();
    const item = ITEM.exec(line);
    if (item && item[1].length < base + 2 && !isRule(line)) {
      if (item[2].at(-1) !== kind || item[1].length + 2 <= base) break;
      loose ||= blank;
      items.push({ offset: item[0].length, lines: [line.slice(item[0].length)] });
    } else if (!line.trim()) {
      items.at(-1).lines.push("");
    } else if (indentOf(line) >= base + 2) {
      items.at(-1).lines.push(line.slice(Math.min(items.at(-1).offset, indentOf(line))));
    } else if (!blank && !endsParagraph(line)) {
      items.at(-1).lines.push(line.trimStart());
    } else {
      break;
    }
  }
  const list = el(ordered ? "ol" : "ul");
  if (ordered) list.start = Number.parseInt(first[2], 10);
  for (const item of items) {
    const blocks = readBlocks(item.lines, depth + 1);
    const tight = blocks.flatMap((node) => (!loose && node.tagName === "P" ? [...node.childNodes] : [node]));
    list.append(el("li", {}, ...tight));
  }
  return { node: list, next };
}

const cellsOf = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());

function readTable(lines, at) {
  if (!lines[at].includes("|") || !lines[at + 1]?.includes("-")) return null;
  const head = cellsOf(lines[at]);
  const rule = cellsOf(lines[at + 1]);
  if (rule.length !== head.length || !rule.every((cell) => /^:?-+:?$/.test(cell))) return null;
  const body = el("tbody");
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|"); next++) {
    const cells = cellsOf(lines[next]);
    body.append(el("tr", {}, ...head.map((_, column) => el("td", {}, ...inline(cells[column] ?? "")))));
  }
  const row = el("tr", {}, ...head.map((cell) => el("th", { scope: "col" }, ...inline(cell))));
  const table = el("table", {}, el("thead", {}, row), body);
  return { node: el("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" }, table), next };
}

function readParagraph(lines, at) {
  let next = at + 1;
  while (next < lines.length && !endsParagraph(lines[next]) && !readTable(lines, next)) next++;
  const text = lines.slice(at, next).map((line) => line.trim()).join("\n");
  return { node: el("p", {}, ...inline(text)), next };
}

/** Text that grows. Only the last two blocks are made again: what comes later cannot change the ones before. */
class Answer {
  constructor() {
    this.node = el("div", { className: "answer", dir: "auto" });
    this.text = "";
    this.settled = 0;
    this.open = [];
    this.frame = 0;
  }

  add(text) {
    this.text += text;
    this.frame ||= requestAnimationFrame(() => this.render());
  }

  replace(text) {
    this.text = text;
    this.settled = 0;
    this.open = [];
    this.node.replaceChildren();
    this.render();
  }

  render() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const lines = this.text.split(/\r?\n/);
    const blocks = [];
    for (let at = this.settled; at < lines.length; ) {
      const block = readBlock(lines, at, 0);
      if (block.node) blocks.push({ node: block.node, line: at });
      at = block.next;
    }
    const stays = keepsLatest();
    for (const block of this.open) block.node.remove();
    this.node.append(...blocks.map((block) => block.node));
    this.open = blocks.slice(-2);
    this.settled = this.open[0]?.line ?? 0;
    if (stays) showLatest();
  }
}

/* ---- Requests ----------------------------------------------------------------------------------------------------- */

class Refusal extends Error {
  constructor(response, error) {
    super(error?.message || `The server answered ${response.status}.`);
    this.status = response.status;
    this.code = error?.code || "";
    this.retryAfter = Number(response.headers.get("Retry-After")) || 0;
  }
}

async function request(method, path, { body, headers, signal } = {}) {
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

async function ask(method, path, body) {
  const headers = method === "PATCH" ? { Prefer: "return=minimal" } : {};
  const response = await request(method, path, { body, headers });
  return response.status === 204 ? null : response.json();
}

const threadPath = (thread, rest = "") => `/threads/${encodeURIComponent(thread)}${rest}`;

/** What to tell a person of any failure. */
function explain(error) {
  if (!(error instanceof Refusal)) return "The server cannot be reached.";
  if (error.status === 401) return "You are logged out. Load the page again to log in.";
  return error.retryAfter ? `${error.message} Try again in ${error.retryAfter} s.` : error.message;
}

/** randomUUID() is only there over HTTPS and on localhost. */
function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 15) | 64;
  bytes[8] = (bytes[8] & 63) | 128;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

function pause(milliseconds, signal) {
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
async function* events(response) {
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

/* ---- One turn on the page ----------------------------------------------------------------------------------------- */

const pretty = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));
const brief = (value) => (typeof value === "string" ? value : JSON.stringify(value)).slice(0, 200);

class Turn {
  constructor(id, text) {
    this.id = id;
    this.text = text;
    this.node = el("article", { className: "turn" });
    this.answer = null;
    this.steps = new Map();
    this.notes = [];
    if (text !== null) {
      this.node.append(el("h2", { className: "unseen" }, "You"), el("div", { className: "mine", dir: "auto" }, text));
    }
    this.node.append(el("h2", { className: "unseen" }, "Agent"));
  }

  #append(node) {
    const stays = keepsLatest();
    this.node.append(node);
    if (this.progressNode) this.node.append(this.progressNode);
    if (stays) showLatest();
  }

  add(text) {
    if (!this.answer) {
      this.answer = new Answer();
      this.#append(this.answer.node);
    }
    this.answer.add(text);
  }

  /** What is being written will be written anew. */
  void() {
    if (this.answer) cancelAnimationFrame(this.answer.frame);
    this.answer?.node.remove();
    this.answer = null;
  }

  /** What is written so far is complete; text that follows stands by itself. */
  close() {
    this.answer?.render();
    this.answer = null;
  }

  step(id, name) {
    let step = this.steps.get(id);
    if (step) return step;
    this.close();
    const state = el("span", { className: "state" });
    const short = el("span", { className: "short" });
    const list = el("dl");
    const summary = el("summary", {}, el("code", { className: "name" }, name), short, state);
    step = { node: el("details", { className: "tool" }, summary, list), state, short, list };
    step.node.addEventListener("toggle", () => step.node.open && this.onOpen?.());
    this.steps.set(id, step);
    this.setStep(step, "running");
    this.#append(step.node);
    return step;
  }

  /** The stream tells only that a tool works; what it was given and what it gave are in the thread. */
  detail(step, title, value) {
    if (step[title]) return;
    step[title] = true;
    if (title === "Arguments") step.short.textContent = brief(value);
    const entry = [el("dt", {}, title), el("dd", {}, el("pre", { tabIndex: 0 }, pretty(value)))];
    if (title === "Arguments") step.list.prepend(...entry);
    else step.list.append(...entry);
  }

  setStep(step, state) {
    step.done = state !== "running";
    step.stopped = state === "stopped";
    step.state.className = `state ${state}`;
    step.state.replaceChildren(
      ...(state === "running" ? [el("span", { className: "spinner", "aria-hidden": "true" })] : []),
      { running: "", waiting: "waiting", done: "✓ done", failed: "✗ failed", stopped: "stopped" }[state],
    );
    if (state === "running") step.state.setAttribute("aria-label", "running");
    else step.state.removeAttribute("aria-label");
  }

  /** Say what is being waited for, below all else; nothing takes the line away. */
  progress(text) {
    this.progressNode?.remove();
    this.progressNode = null;
    if (!text) return;
    const node = el("p", { className: "progress" }, el("span", { className: "spinner", "aria-hidden": "true" }), text);
    this.#append(node);
    this.progressNode = node;
  }

  note(text, { plain = false, actions = [] } = {}) {
    const node = el("div", { className: plain ? "problem plain" : "problem" }, el("p", {}, text), ...actions);
    this.notes.push(node);
    this.#append(node);
  }

  clearNotes() {
    for (const node of this.notes.splice(0)) node.remove();
  }

  /** Nothing more comes. */
  end(state) {
    this.close();
    this.progress(null);
    for (const step of this.steps.values()) if (!step.done) this.setStep(step, state);
  }

  usage(input, output) {
    if (!input && !output) return;
    this.usageNode?.remove();
    this.usageNode = el("p", { className: "note" }, `${input + output} tokens: ${input} read, ${output} written`);
    this.#append(this.usageNode);
  }
}

/* ---- Scrolling: the latest stays in view unless somebody scrolled away from it ------------------------------------ */

let atLatest = true;
const keepsLatest = () => atLatest;

function showLatest() {
  const box = byId("conversation");
  box.scrollTop = box.scrollHeight;
}

function noteScroll() {
  const box = byId("conversation");
  atLatest = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  byId("latest").hidden = atLatest;
}

/* ---- Threads ------------------------------------------------------------------------------------------------------ */

const view = { thread: null, run: null, approval: null, loading: 0 };
const listed = new Map(); // thread id -> { thread, node }
let pages = 1;
let listedAt = 0;

const firstWords = (text) => text.trim().replace(/\s+/g, " ").slice(0, 80) || "New thread";

function titleOf(thread) {
  const given = thread.metadata?.title;
  if (typeof given === "string" && given.trim()) return given;
  const when = new Date(thread.created_at);
  return `Thread of ${when.toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}`;
}

async function loadThreads() {
  listedAt = Date.now();
  const limit = PAGE_SIZE;
  try {
    const threads = [];
    let full = true;
    for (let page = 0; page < pages && full; page++) {
      // Without their messages, each of which would have to be read.
      const select = ["thread_id", "created_at", "metadata", "status"];
      const body = { limit, offset: page * limit, sort_by: "updated_at", sort_order: "desc", select };
      const found = await ask("POST", "/threads/search", body);
      full = found.length === limit;
      threads.push(...found);
    }
    showThreads(threads);
    byId("more").hidden = !full;
    noteThreads(threads.length ? "" : "No threads yet.");
  } catch (error) {
    noteThreads(explain(error));
  }
}

function noteThreads(text) {
  byId("threads-note").textContent = text;
  byId("threads-note").hidden = !text;
}

function showThreads(threads) {
  const list = byId("threads");
  const ids = new Set(threads.map((thread) => thread.thread_id));
  for (const [id, entry] of listed) {
    if (ids.has(id)) continue;
    entry.node.remove();
    listed.delete(id);
  }
  threads.forEach((thread, index) => {
    const entry = listed.get(thread.thread_id) ?? threadEntry(thread);
    entry.thread = thread;
    entry.link.textContent = entry.link.title = titleOf(thread);
    const state = { busy: "is being answered", interrupted: "waits for you" }[thread.status];
    entry.state.className = `state ${thread.status}`;
    entry.state.hidden = !state;
    entry.state.title = state ?? "";
    entry.state.setAttribute("aria-label", state ?? "");
    // Only what is out of place is moved: moving takes the focus away.
    if (list.children[index] !== entry.node) list.insertBefore(entry.node, list.children[index] ?? null);
  });
  markCurrent();
}

function threadEntry(thread) {
  const id = thread.thread_id;
  const entry = {
    link: el("a", { href: `#${id}`, onclick: () => closeDrawer() }),
    state: el("span", { className: "state", role: "img" }),
  };
  entry.node = el(
    "li",
    {},
    entry.state,
    entry.link,
    iconButton("rename", "Rename", () => renameThread(id)),
    iconButton("delete", "Delete", () => deleteThread(id)),
  );
  listed.set(id, entry);
  return entry;
}

function markCurrent() {
  for (const [id, entry] of listed) {
    const current = id === view.thread;
    entry.node.classList.toggle("current", current);
    if (current) entry.link.setAttribute("aria-current", "page");
    else entry.link.removeAttribute("aria-current");
  }
  const entry = listed.get(view.thread);
  if (entry) setTitle(titleOf(entry.thread));
}

function setTitle(text) {
  byId("title").textContent = text;
  document.title = view.thread ? `${text} – Agent` : "Agent";
}

/** Ask with the dialog; `act` runs when the answer is yes, and the dialog stays open where it fails. */
function choose({ title, text = "", field = null, ok, danger = false, act }) {
  const dialog = byId("dialog");
  byId("dialog-title").textContent = title;
  byId("dialog-text").textContent = text;
  byId("dialog-field").hidden = field === null;
  byId("dialog-input").value = field ?? "";
  byId("dialog-input").required = field !== null;
  byId("dialog-error").hidden = true;
  byId("dialog-ok").textContent = ok;
  byId("dialog-ok").classList.toggle("danger", danger);
  dialog.querySelector("form").onsubmit = async (event) => {
    event.preventDefault();
    byId("dialog-ok").disabled = true;
    try {
      await act(byId("dialog-input").value.trim());
      dialog.close();
      // The button that asked may be gone.
      if (document.activeElement === document.body) byId("message").focus();
    } catch (error) {
      byId("dialog-error").textContent = explain(error);
      byId("dialog-error").hidden = false;
    } finally {
      byId("dialog-ok").disabled = false;
    }
  };
  dialog.showModal();
  // What cannot be undone is not one key away.
  if (field !== null) byId("dialog-input").select();
  else byId("dialog-cancel").focus();
}

function renameThread(id) {
  choose({
    title: "Rename the thread",
    field: titleOf(listed.get(id).thread),
    ok: "Rename",
    act: async (title) => {
      if (!title) return;
      await ask("PATCH", threadPath(id), { metadata: { title } });
      await loadThreads();
    },
  });
}

function deleteThread(id) {
  choose({
    title: "Delete the thread?",
    text: `“${titleOf(listed.get(id).thread)}” and all its messages will be gone for good.`,
    ok: "Delete",
    danger: true,
    act: async () => {
      await ask("DELETE", threadPath(id)).catch((error) => {
        if (error.status !== 404) throw error; // somebody else was faster
      });
      if (id === view.thread) newThread();
      await loadThreads();
      announce("Deleted");
    },
  });
}

/* ---- The open thread ---------------------------------------------------------------------------------------------- */

function newThread() {
  history.pushState(null, "", location.pathname);
  openThread(null);
  closeDrawer();
  byId("message").focus();
}

const threadInAddress = () => (/^#([A-Za-z0-9_-]{1,64})$/.exec(location.hash) ?? [])[1] ?? null;

function clearView() {
  view.run?.leave();
  view.run = view.approval = null;
  byId("turns").replaceChildren();
  atLatest = true;
  byId("latest").hidden = true;
  showControls();
}

async function openThread(id) {
  const mine = ++view.loading;
  view.thread = id;
  clearView();
  byId("welcome").hidden = id !== null;
  setTitle("New thread");
  markCurrent();
  if (id === null) return;
  try {
    await showThread(id, mine);
  } catch (error) {
    if (mine !== view.loading) return;
    const gone = error.status === 404;
    const text = gone ? "There is no such thread, or no longer." : explain(error);
    const again = button("Try again", () => openThread(id));
    byId("turns").replaceChildren(problem(text, gone ? [] : [again]));
    announce(text);
  }
}

function problem(text, actions = []) {
  return el("div", { className: "problem" }, el("p", {}, text), ...actions);
}

async function showThread(id, mine) {
  const kept = keptTurn(id);
  // The runs first: one that ends in between is then still followed, and replayed.
  const ignoreNone = (error) => {
    if (kept && error.status === 404) return null; // this thread's first message may not have arrived
    throw error;
  };
  const runs = await ask("GET", threadPath(id, "/runs?limit=20")).catch(ignoreNone);
  const state = await ask("GET", threadPath(id, "/state")).catch(ignoreNone);
  if (mine !== view.loading) return;
  const turns = turnsOf(state?.values?.messages ?? []);
  byId("turns").replaceChildren(...turns.map((turn) => turn.node));
  byId("welcome").hidden = true;
  if (turns.length && !listed.has(id)) setTitle(firstWords(turns[0].text ?? ""));
  const active = (runs ?? []).filter((run) => run.status === "pending" || run.status === "running").at(-1);
  const last = turns.at(-1);
  if (kept && (!kept.run || kept.run === active?.run_id)) {
    const known = turns.find((turn) => turn.id === kept.run);
    followRun(new Run(replaceTurn(known, kept.text), { thread: id, turnId: kept.turn, runId: kept.run }));
  } else if (active) {
    const known = turns.find((turn) => turn.id === active.run_id);
    // Without a message of its own it goes on with the last turn, or waits behind another.
    const turn = known ? replaceTurn(known, known.text) : last ?? replaceTurn(null, null);
    followRun(new Run(turn, { thread: id, runId: active.run_id, reload: !known }));
  } else if (last && !showApproval(last, state) && last.lacksAnswer) {
    last.note("This message was not answered. The next one takes its place.", { plain: true, actions: [reuse(last)] });
  }
  showLatest();
}

/** A fresh turn in the place of one that is told anew. */
function replaceTurn(known, text) {
  const turn = new Turn(known?.id ?? null, text);
  if (known) known.node.replaceWith(turn.node);
  else byId("turns").append(turn.node);
  return turn;
}

function textOf(message) {
  if (typeof message.content === "string") return message.content;
  return (message.content ?? []).map((part) => (typeof part === "string" ? part : part.text ?? "")).join("");
}

/** The turns that a thread's messages are. */
function turnsOf(messages) {
  const turns = [];
  for (const message of messages) {
    if (message.type === "human" || !turns.length) {
      turns.push(new Turn(message.id, message.type === "human" ? textOf(message) : null));
    }
    const turn = turns.at(-1);
    turn.lacksAnswer = message.type !== "ai" || message.tool_calls?.length > 0;
    if (message.type === "ai") {
      const text = textOf(message);
      if (text) turn.add(text);
      turn.close();
      turn.tokens ??= [0, 0];
      turn.tokens[0] += message.usage_metadata?.input_tokens ?? 0;
      turn.tokens[1] += message.usage_metadata?.output_tokens ?? 0;
    }
    addDetails(turn, message);
  }
  for (const turn of turns) {
    turn.end("stopped");
    if (!turn.lacksAnswer) turn.usage(...(turn.tokens ?? [0, 0]));
  }
  return turns;
}

function addDetails(turn, message) {
  for (const call of message.type === "ai" ? message.tool_calls ?? [] : []) {
    turn.detail(turn.step(call.id, call.name), "Arguments", call.args);
  }
  if (message.type !== "tool") return;
  const step = turn.step(message.tool_call_id, message.name ?? "tool");
  turn.setStep(step, message.status === "error" ? "failed" : "done");
  turn.detail(step, "Result", textOf(message));
}

/** Fill in what the stream did not tell of this turn's tools. */
async function loadDetails(turn, thread) {
  const state = await ask("GET", threadPath(thread, "/state"));
  for (const message of state.values?.messages ?? []) {
    const calls = message.tool_calls?.some((call) => turn.steps.has(call.id));
    if (calls || turn.steps.has(message.tool_call_id)) addDetails(turn, message);
  }
  return state;
}

/* ---- Approval ----------------------------------------------------------------------------------------------------- */

/** Show what the thread waits for, if it does. Questions come one by one. */
function showApproval(turn, state) {
  const question = state?.interrupts?.[0]?.value;
  if (question === undefined) return false;
  const decide = (approve) => {
    node.remove();
    view.approval = null;
    const step = turn.steps.get(question.id);
    if (step) turn.setStep(step, "running");
    const resume = question.id === undefined ? { approve } : { approve, id: question.id };
    followRun(new Run(turn, { thread: view.thread, turnId: uuid(), resume }));
    byId("message").focus();
  };
  const heading = el("h2", { tabIndex: -1 }, "Approve this step?");
  const node = el(
    "section",
    { className: "approval", "aria-label": "Approval" },
    heading,
    el("p", {}, "The agent wants to use ", el("code", {}, question.tool ?? "a tool"), " with"),
    el("pre", { tabIndex: 0 }, pretty(question.arguments ?? question)),
    el(
      "div",
      { className: "choices" },
      button("Approve", () => decide(true), "approve"),
      button("Deny", () => decide(false)),
    ),
  );
  for (const step of turn.steps.values()) if (!step.done || step.stopped) turn.setStep(step, "waiting");
  turn.node.append(node);
  view.approval = node;
  showControls();
  if (keepsLatest()) showLatest();
  announce(heading.textContent);
  // Not on a button: a key that was meant for the message must not approve anything.
  if (!byId("message").value) heading.focus({ preventScroll: true });
  return true;
}

/* ---- A run, followed until it ends -------------------------------------------------------------------------------- */

/** What was sent and not yet answered is kept over a reload, so that it can be sent again under the same id. */
function keepTurn(turn) {
  store("sessionStorage", TURN, turn && JSON.stringify({ ...turn, at: Date.now() }));
}

function keptTurn(thread) {
  try {
    const kept = JSON.parse(stored("sessionStorage", TURN));
    return kept?.thread === thread && Date.now() - kept.at < TURN_KEPT_MS ? kept : null;
  } catch {
    return null;
  }
}

const reuse = (turn) =>
  button("Edit and send again", () => {
    byId("message").value = turn.text;
    byId("message").focus();
    showControls();
  });

function followRun(run) {
  view.run = run;
  showControls();
  run.follow();
}

/** Starts a run, or joins one (runId), and writes what it tells into a turn. */
class Run {
  constructor(turn, { thread, turnId = null, runId = null, resume, reload = false }) {
    Object.assign(this, { turn, thread, turnId, runId, resume, reload });
    this.lastId = "";
    this.connection = new AbortController();
    this.failures = 0;
    this.left = false;
    this.stopping = false;
    turn.onOpen = () => this.detailsOf().catch(() => {});
  }

  detailsOf() {
    return loadDetails(this.turn, this.thread);
  }

  /** The page shows something else from now on. The run goes on without it, once the server has it. */
  leave() {
    this.left = true;
    if (this.runId) this.connection.abort();
  }

  async follow() {
    this.turn.progress("Thinking…");
    while (!this.left || !this.runId) {
      try {
        for await (const event of events(await this.#connect())) {
          this.failures = 0;
          if (event.id !== undefined) this.lastId = event.id;
          if (this.#take(event)) return;
          if (this.left && this.runId) return;
        }
      } catch (error) {
        if (this.left) return;
        const lost = !(error instanceof Refusal) || error.status >= 502 || (error.status === 429 && this.runId);
        if (!lost || ++this.failures > MAX_FAILURES) {
          this.#refused(error);
          return;
        }
        const seconds = error.retryAfter || Math.min(8, 0.5 * 2 ** this.failures);
        this.turn.progress("The connection is lost. Trying again…");
        await pause(seconds * 1000, this.connection.signal);
        continue;
      }
      if (++this.failures > MAX_FAILURES) return void this.#refused(new Error("the stream ends again and again"));
      this.turn.progress("The connection is lost. Trying again…");
      await pause(300 * this.failures, this.connection.signal);
    }
  }

  async #connect() {
    const { signal } = this.connection;
    const headers = this.lastId ? { "Last-Event-ID": this.lastId } : {};
    // What was not begun by a message of this page, as an answer to a question, goes the way of the LangGraph API.
    if (this.resume !== undefined || this.reload) {
      const path = threadPath(this.thread, "/runs");
      if (this.runId) return request("GET", `${path}/${this.runId}/stream?stream_mode=messages-tuple`, { headers, signal });
      const command = { resume: this.resume };
      const body = { assistant_id: "agent", command, stream_mode: ["messages-tuple"], stream_resumable: true };
      return request("POST", `${path}/stream`, { body, headers: { "Idempotency-Key": this.turnId }, signal });
    }
    if (this.runId) return request("GET", `/chat/stream/${this.runId}`, { headers, signal });
    // Sent again under the same id it is the same turn, however often it arrives.
    const body = { message: this.turn.text, thread_id: this.thread, turn_id: this.turnId };
    return request("POST", "/chat/stream", { body, signal });
  }

  #started(runId) {
    if (this.runId === runId) return;
    this.runId = runId;
    if (this.turnId && this.resume === undefined) {
      this.turn.id = runId;
      this.#keep();
    }
    loadThreads();
    if (this.stopping) this.#cancel();
    if (this.left) this.connection.abort();
  }

  /** Returns whether it was the last event. */
  #take({ name, data }) {
    const { turn } = this;
    switch (name) {
      case "run":
      case "metadata":
        this.#started(data.run_id);
        break;
      case "messages":
        this.#message(data[0]);
        break;
      case "token":
        turn.progress(null);
        turn.add(data.text);
        break;
      case "tool":
        if (data.state === "start") {
          turn.setStep(turn.step(data.id, data.name), "running");
          turn.progress(`Using ${data.name}…`);
        } else {
          turn.setStep(turn.step(data.id, data.name), data.status === "error" ? "failed" : "done");
          turn.progress("Thinking…");
        }
        break;
      case "status":
        if (data.state === "restarted") turn.void();
        turn.progress(data.state === "waiting" ? "Waiting for the model…" : "Starting again…");
        if (data.state === "waiting") announce("Waiting for the model");
        break;
      case "usage":
        this.tokens = [data.input_tokens ?? 0, data.output_tokens ?? 0];
        break;
      case "error":
        this.#failed(data.code ?? data.error, data.message);
        return true;
      case "end":
        this.#ended(data);
        return true;
    }
    return false;
  }

  /** A message, or a piece of one, as LangGraph streams it. */
  #message(message) {
    const { turn } = this;
    if (message.type === "tool") {
      addDetails(turn, message);
      turn.progress("Thinking…");
      return;
    }
    const text = message.type === "AIMessageChunk" ? textOf(message) : "";
    if (text) {
      turn.progress(null);
      turn.add(text);
    }
    for (const call of message.tool_call_chunks ?? []) {
      if (!call.id) continue;
      turn.step(call.id, call.name);
      turn.progress(`Using ${call.name}…`);
    }
  }

  async #ended({ status, response }) {
    if (status === "interrupted" && !response && this.stopping) return this.#failed("cancelled");
    const { turn } = this;
    if (response && turn.answer && turn.answer.text !== response) turn.answer.replace(response);
    else if (response && !turn.answer) turn.add(response);
    const answer = turn.answer?.text ?? "";
    turn.end("stopped");
    if (this.tokens) turn.usage(...this.tokens);
    this.#over();
    if (answer) announce(`The agent says: ${answer}`);
    if (this.reload && !this.left) return openThread(this.thread);
    if (!turn.steps.size && answer) return;
    try {
      const state = await this.detailsOf();
      if (!this.left && view.thread === this.thread && !view.run) showApproval(turn, state);
    } catch (error) {
      if (!this.left && !answer) turn.note(explain(error), { actions: [button("Load again", () => openThread(this.thread))] });
    }
  }

  #failed(code, message = "") {
    this.turn.end("stopped");
    this.turn.node.classList.add("lost");
    const stopped = code === "cancelled";
    const actions = this.turn.text === null ? [] : [this.#again(), reuse(this.turn)];
    const text = stopped ? "Stopped. The next message takes the place of this one." : message || "The answer failed.";
    this.turn.note(text, { plain: stopped, actions });
    announce(text);
    this.#over();
    if (this.turn.steps.size) this.detailsOf().catch(() => {});
  }

  /** The server said no, or cannot be reached at all. */
  #refused(error) {
    const text = explain(error);
    this.turn.end("stopped");
    const accepted = this.runId !== null;
    const lost = !(error instanceof Refusal);
    if (!accepted) this.turn.node.classList.add("lost");
    const actions = [];
    if (accepted || lost) actions.push(button("Try again", () => this.#join()));
    else if (this.turn.text !== null) actions.push(this.#again(), reuse(this.turn));
    this.turn.note(text, { actions });
    announce(text);
    this.#over();
    if (lost && !accepted && this.resume === undefined) this.#keep();
  }

  #keep() {
    keepTurn({ thread: this.thread, turn: this.turnId, text: this.turn.text, run: this.runId });
  }

  /** The same turn again: it may well be running. */
  #join() {
    if (view.run) return;
    this.turn.clearNotes();
    this.failures = 0;
    this.stopping = false;
    followRun(this);
  }

  #again() {
    return button("Try again", () => {
      if (view.run || view.approval) return;
      this.turn.node.remove();
      send(this.turn.text);
    });
  }

  #over() {
    keepTurn(null);
    if (view.run === this) view.run = null;
    showControls();
    loadThreads();
  }

  stop() {
    if (this.stopping) return;
    this.stopping = true;
    this.turn.progress("Stopping…");
    announce("Stopping");
    if (this.runId) this.#cancel();
    showControls();
  }

  async #cancel() {
    try {
      await ask("POST", threadPath(this.thread, `/runs/${this.runId}/cancel`));
    } catch (error) {
      if (error.status === 404 || error.status === 409) return; // it has ended; the stream says how
      this.stopping = false;
      this.turn.note(`It could not be stopped. ${explain(error)}`);
      showControls();
    }
  }
}

/* ---- Composer, keyboard, drawer ----------------------------------------------------------------------------------- */

function showControls() {
  const running = view.run !== null;
  byId("stop").hidden = !running;
  byId("stop").disabled = running && view.run.stopping;
  byId("send").hidden = running;
  byId("send").disabled = view.approval !== null || !byId("message").value.trim();
  byId("conversation").setAttribute("aria-busy", String(running));
}

function submit(event) {
  event?.preventDefault();
  const text = byId("message").value;
  if (view.run || view.approval || !text.trim()) return;
  byId("message").value = "";
  send(text);
  byId("message").focus();
}

function send(text) {
  if (view.thread === null) {
    view.thread = uuid();
    view.loading++;
    history.pushState(null, "", `#${view.thread}`);
    setTitle(firstWords(text));
    markCurrent();
  }
  byId("welcome").hidden = true;
  const turn = new Turn(null, text);
  byId("turns").append(turn.node);
  const turnId = uuid();
  keepTurn({ thread: view.thread, turn: turnId, text, run: null });
  atLatest = true;
  followRun(new Run(turn, { thread: view.thread, turnId }));
  showLatest();
}

const isPhone = matchMedia("(max-width: 48rem)");
const drawerIsOpen = () => document.body.classList.contains("drawer");

function openDrawer() {
  document.body.classList.add("drawer");
  byId("backdrop").hidden = false;
  byId("menu").setAttribute("aria-expanded", "true");
  byId("main").inert = true;
  byId("new").focus();
}

function closeDrawer() {
  if (!drawerIsOpen()) return;
  document.body.classList.remove("drawer");
  byId("backdrop").hidden = true;
  byId("menu").setAttribute("aria-expanded", "false");
  byId("main").inert = false;
  byId("menu").focus();
}

function onKey(event) {
  // The dialog closes itself, and while a word is being composed the keys belong to the input method.
  if (byId("dialog").open || event.isComposing) return;
  if ((event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    newThread();
  } else if (event.key === "Escape") {
    if (drawerIsOpen()) closeDrawer();
    else view.run?.stop();
  } else if (event.key === "Enter" && event.target === byId("message")) {
    if (event.shiftKey) return;
    event.preventDefault();
    submit();
  }
}

function toggleTheme() {
  const dark = !isDark();
  // The choice that the system makes too is no choice: from then on it is followed again.
  const chosen = dark === systemIsDark.matches ? null : dark ? "dark" : "light";
  setTheme(chosen);
  store("localStorage", THEME, chosen);
  showTheme();
}

function showTheme() {
  byId("theme").setAttribute("aria-pressed", String(isDark()));
}

function start() {
  showTheme();
  showControls();
  systemIsDark.addEventListener("change", showTheme);
  isPhone.addEventListener("change", closeDrawer);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => threadInAddress() !== view.thread && openThread(threadInAddress()));
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && Date.now() - listedAt > 10_000) loadThreads();
  });
  const on = (id, type, act) => byId(id).addEventListener(type, act);
  on("composer", "submit", submit);
  on("message", "input", showControls);
  on("stop", "click", () => view.run?.stop());
  on("new", "click", newThread);
  on("theme", "click", toggleTheme);
  on("dialog-cancel", "click", () => byId("dialog").close());
  // Not by its address: what follows # there is the thread.
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("message").focus();
  });
  on("menu", "click", openDrawer);
  on("backdrop", "click", closeDrawer);
  on("latest", "click", showLatest);
  on("conversation", "scroll", noteScroll);
  on("more", "click", () => {
    pages++;
    loadThreads();
  });
  loadThreads();
  openThread(threadInAddress());
}
