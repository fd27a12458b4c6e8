// Markdown to DOM nodes. It makes nodes from the model's text, never markup.
// Every search is bounded or remembered, so that no text takes more than a moment, however odd.

import { announce, button, el } from "./dom.js";

const MAX_DEPTH = 8;
const MAX_LINK = 2000;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const PLAIN = /[^\\`*_~![<h\n$]+/y;
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
      return formula(text, at, hopeless) ?? escaped(text, at);
    case "$":
      return formula(text, at, hopeless);
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

/** A mark that means itself. What else has a backslash before it is no Markdown, and most likely TeX. */
const escaped = (text, at) => (/[\\`*_{}[\]()#+\-.!|~<>$]/.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null);

const FORMULAS = { "\\(": "\\)", "\\[": "\\]", $$: "$$", $: "$" };

/** TeX as it was written: nothing in it is Markdown. */
function formula(text, at, hopeless) {
  const two = text.slice(at, at + 2);
  const opening = FORMULAS[two] ? two : text[at];
  const closing = FORMULAS[opening];
  // A price is no formula: one begins and ends without space, and no digit follows it.
  const single = opening === "$";
  if (!closing || hopeless.has(opening) || (single && isSpace(text[at + 1]))) return null;
  const start = at + opening.length;
  for (let end = text.indexOf(closing, start); end >= 0; end = text.indexOf(closing, end + 1)) {
    if (end === start || (text[end - 1] === "\\" && closing[0] === "$")) continue;
    if (single && (isSpace(text[end - 1]) || /\d/.test(text[end + 1] ?? ""))) continue;
    const after = end + closing.length;
    return { node: el("span", { className: "formula" }, text.slice(at, after)), end: after };
  }
  hopeless.add(opening);
  return null;
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
  const [language] = line.slice(mark[0].length).trim().split(/\s/);
  return { mark: mark[1], indent: indentOf(line), language: language.slice(0, 32) };
}

/** Whether a formula of several lines begins here. */
const opensFormula = (line) => /^ {0,3}(\$\$|\\\[)/.exec(line)?.[1];

const isRule = (line) => indentOf(line) < 4 && /^(-{3,}|\*{3,}|_{3,})$/.test(line.replace(/\s/g, ""));
const headingOf = (line) => /^ {0,3}(#{1,6})(?: |$)/.exec(line);
const isQuote = (line) => /^ {0,3}>/.test(line);

function endsParagraph(line) {
  const item = ITEM.exec(line);
  const listed = item && line.length > item[0].length && (!/^\d/.test(item[2]) || /^1[.)]$/.test(item[2]));
  return !line.trim() || listed || isQuote(line) || headingOf(line) || isRule(line) || fenceOf(line);
}

/** Read the block that starts at a line: its node, if it shows anything, and the line after it. */
export function readBlock(lines, at, depth) {
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
  return readFormula(lines, at) ?? readTable(lines, at) ?? readParagraph(lines, at);
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

/** A formula that stands by itself, its lines as they are; null where it does not end before a blank line. */
function readFormula(lines, at) {
  const opening = opensFormula(lines[at]);
  if (!opening) return null;
  const closing = FORMULAS[opening];
  for (let next = at; next < lines.length && lines[next].trim(); next++) {
    const line = next === at ? lines[at].trim().slice(2) : lines[next].trim();
    if (!line.endsWith(closing)) continue;
    const text = lines.slice(at, next + 1).map((each) => each.trim()).join("\n");
    return { node: el("div", { className: "formula", tabIndex: 0 }, text), next: next + 1 };
  }
  return null;
}

function readCode(lines, at, { mark, indent, language }) {
  let next = at + 1;
  const code = [];
  for (; next < lines.length; next++) {
    const closing = lines[next].trim();
    if (closing.length >= mark.length && closing[0] === mark[0] && !closing.replaceAll(mark[0], "")) break;
    code.push(lines[next].slice(Math.min(indent, indentOf(lines[next]))));
  }
  const text = code.join("\n");
  const label = language ? [el("span", { className: "language" }, language)] : [];
  const block = el("div", { className: "code" }, ...label, el("pre", { tabIndex: 0 }, el("code", {}, text)));
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

/** The cells of a row. A bar with a backslash before it is part of its cell, also in code. */
function cellsOf(line) {
  const cells = line.trim().replace(/^\|/, "").replace(/((?:^|[^\\])(?:\\\\)*)\|$/, "$1").split(/(?<!\\)\|/);
  return cells.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

const alignmentOf = (rule) => ({ "10": "start", "01": "end", "11": "center" })[`${Number(rule.startsWith(":"))}${Number(rule.endsWith(":"))}`];

function readTable(lines, at) {
  if (!lines[at].includes("|") || !lines[at + 1]?.includes("-")) return null;
  const head = cellsOf(lines[at]);
  const rule = cellsOf(lines[at + 1]);
  if (rule.length !== head.length || !rule.every((cell) => /^:?-+:?$/.test(cell))) return null;
  const cell = (tag, properties, column, text) => {
    const side = alignmentOf(rule[column]);
    return el(tag, side ? { ...properties, className: side } : properties, ...inline(text));
  };
  const body = el("tbody");
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|"); next++) {
    const cells = cellsOf(lines[next]);
    body.append(el("tr", {}, ...head.map((_, column) => cell("td", {}, column, cells[column] ?? ""))));
  }
  const row = el("tr", {}, ...head.map((text, column) => cell("th", { scope: "col" }, column, text)));
  const table = el("table", {}, el("thead", {}, row), body);
  return { node: el("div", { className: "table", tabIndex: 0, role: "region", "aria-label": "Table" }, table), next };
}

function readParagraph(lines, at) {
  let next = at + 1;
  while (next < lines.length && !endsParagraph(lines[next]) && !readTable(lines, next)) next++;
  const text = lines.slice(at, next).map((line) => line.trim()).join("\n");
  return { node: el("p", {}, ...inline(text)), next };
}
