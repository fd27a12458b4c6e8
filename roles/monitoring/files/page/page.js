// What is broken, since when, and what to do: Prometheus' alerts, and the panels of Grafana's dashboards, drawn without Grafana.
// Prometheus serves this page at /user/, and is asked by its HTTP API. The dashboards beside it say what to ask and how to show it.

import {sorted, verdict} from "./judge.js";

const DASHBOARDS = {"agent-stack": "Overview", model: "Model and GPU", agent: "Agent", data: "Data", host: "Host and edge"};
const HOURS = [1, 6, 24];
const SCRAPE_SECONDS = 15;
const PATIENCE_MS = 10000;
const POINTS = 240;
// Told apart on white and on black, and by people who see red and green alike.
const COLOURS = ["#2f7ed8", "#d9822b", "#8e5bd0", "#20a39e", "#d6478b", "#7f8c1f", "#8a6d5a", "#5d6d7e"];

const wanted = new URLSearchParams(location.search);
const dashboard = wanted.get("dashboard") in DASHBOARDS ? wanted.get("dashboard") : "agent-stack";
const hours = HOURS.find((each) => String(each) === wanted.get("hours")) ?? 1;
const step = Math.max(SCRAPE_SECONDS, (hours * 3600) / POINTS);
let answered = null;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function draw(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

async function ask(path, parameters = {}) {
  const answer = await fetch(`../api/v1/${path}?${new URLSearchParams(parameters)}`, {signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store"});
  const body = await answer.json();
  if (body.status !== "success") throw new Error(body.error);
  return body.data;
}

function clock(date, withDay = hours > 6) {
  const time = date.toLocaleTimeString([], {hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false});
  return withDay ? `${date.toLocaleDateString([], {month: "short", day: "numeric"})} ${time}` : time;
}

function lasting(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

function short(number) {
  if (Number.isInteger(number)) return number.toLocaleString("en");
  return Number(number.toPrecision(3)).toLocaleString("en", {maximumFractionDigits: 6});
}

// A number with the unit that Grafana's panel names.
function readable(number, unit) {
  if (!Number.isFinite(number)) return "–";
  if (unit === "percentunit") return `${short(number * 100)} %`;
  if (unit === "s") return number !== 0 && Math.abs(number) < 1 ? `${short(number * 1000)} ms` : `${short(number)} s`;
  if (unit === "d") return `${Math.floor(number)} days`;
  if (unit === "celsius") return `${short(number)} °C`;
  if (unit === "watt") return `${short(number)} W`;
  if (unit === "bytes" || unit === "Bps") {
    const power = Math.min(4, Math.max(0, Math.floor(Math.log2(Math.abs(number) || 1) / 10)));
    return `${short(number / 1024 ** power)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}${unit === "Bps" ? "/s" : ""}`;
  }
  return short(number);
}

function expression(target) {
  // As Grafana reckons it: four scrapes, or a scrape more than a point of the picture.
  return target.expr.replaceAll("$__rate_interval", `${Math.ceil(Math.max(4 * SCRAPE_SECONDS, step + SCRAPE_SECONDS))}s`);
}

function legend(target, labels) {
  return (target.legendFormat || "").replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? "").trim() || "value";
}

// The last threshold that a value reaches. Without one that warns there is nothing to judge, and what nobody measures is not well.
function judged(value, steps) {
  if (steps.length < 2) return "";
  if (!Number.isFinite(value)) return "bad";
  const reached = steps.filter((each) => each.value === null || value >= each.value).at(-1);
  return reached.color === "red" ? "bad" : "good";
}

async function stat(panel) {
  const {unit, thresholds, mappings = []} = panel.fieldConfig.defaults;
  const rows = await ask("query", {query: expression(panel.targets[0])});
  const value = rows.result.length > 0 ? Number(rows.result[0].value[1]) : NaN;
  const text = mappings[0]?.options[String(value)]?.text ?? (rows.result.length > 0 ? readable(value, unit) : "no data");
  return make("div", {class: "panel"}, make("h3", {}, panel.title), make("div", {class: `value ${judged(value, thresholds.steps)}`}, text));
}

// The points of a series as a path from 0 to 100 each way; where Prometheus has none, the line is interrupted.
function path(points, from, to, low, high) {
  let last = -Infinity;
  return points
    .map(([time, text]) => {
      const value = Number(text);
      if (!Number.isFinite(value)) return "";
      const command = time - last > step * 1.5 ? "M" : "L";
      last = time;
      const across = ((time - from) / (to - from)) * 100;
      const up = ((value - low) / (high - low)) * 100;
      return `${command}${across.toFixed(2)} ${(100 - Math.min(100, Math.max(0, up))).toFixed(2)}${command === "M" ? "h0" : ""}`;
    })
    .join("");
}

async function chart(panel) {
  const settings = panel.fieldConfig.defaults;
  const to = Date.now() / 1000;
  const from = to - hours * 3600;
  const answers = await Promise.all(panel.targets.map((target) => ask("query_range", {query: expression(target), start: from, end: to, step})));
  const lines = panel.targets.flatMap((target, at) => answers[at].result.map((row) => ({name: legend(target, row.metric), points: row.values})));
  const values = lines.flatMap((line) => line.points.map((point) => Number(point[1]))).filter(Number.isFinite);
  const limits = settings.custom?.thresholdsStyle?.mode === "line" ? settings.thresholds.steps.filter((each) => each.value !== null) : [];
  const low = Math.min(settings.min ?? 0, ...values);
  const highest = Math.max(settings.max ?? low, ...values);
  const high = highest > low ? highest : low + 1;
  const box = make("div", {class: "panel"}, make("h3", {}, panel.title));
  if (values.length === 0) {
    // A quantile of no requests is not a number, and not a fault.
    box.append(make("p", {class: "legend"}, lines.length > 0 ? "nothing to measure" : "no data"));
    return box;
  }
  const picture = draw("svg", {viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": panel.title});
  for (const height of [0, 50, 100]) picture.append(draw("line", {x1: 0, x2: 100, y1: height, y2: height}));
  for (const limit of limits) {
    const height = 100 - ((limit.value - low) / (high - low)) * 100;
    if (height >= 0) picture.append(draw("line", {class: "limit", x1: 0, x2: 100, y1: height, y2: height}));
  }
  lines.forEach((line, at) => picture.append(draw("path", {d: path(line.points, from, to, low, high), stroke: COLOURS[at % COLOURS.length]})));
  const key = make("div", {class: "legend"});
  const tell = (time) => {
    const near = (line) => line.points.findLast((point) => point[0] <= time && time - point[0] <= step * 1.5);
    const entries = lines.map((line, at) => {
      const dot = make("i");
      dot.style.background = COLOURS[at % COLOURS.length];
      return make("span", {}, dot, `${line.name}: ${readable(Number(near(line)?.[1] ?? NaN), settings.unit)}`);
    });
    key.replaceChildren(...(time < to ? [make("span", {}, clock(new Date(time * 1000)))] : []), ...entries);
  };
  tell(to);
  picture.addEventListener("pointermove", (event) => tell(from + (event.offsetX / picture.clientWidth) * (to - from)));
  picture.addEventListener("pointerleave", () => tell(to));
  box.append(make("div", {class: "axis"}, readable(high, settings.unit)), picture);
  box.append(make("div", {class: "axis"}, make("span", {}, clock(new Date(from * 1000))), make("span", {}, clock(new Date(to * 1000)))), key);
  return box;
}

async function panel(definition) {
  try {
    return await (definition.type === "stat" ? stat(definition) : chart(definition));
  } catch (error) {
    return make("div", {class: "panel"}, make("h3", {}, definition.title), make("p", {}, `Prometheus says: ${error.message}`));
  }
}

async function panels() {
  const answer = await fetch(`dashboards/${dashboard}.json`, {signal: AbortSignal.timeout(PATIENCE_MS)});
  const {panels: definitions} = await answer.json();
  const drawn = await Promise.all(definitions.map((each) => (each.type === "row" ? make("h2", {}, each.title) : panel(each))));
  const groups = [];
  drawn.forEach((element, at) => {
    const kind = definitions[at].type === "stat" ? "stats" : "charts";
    if (definitions[at].type === "row") groups.push(element);
    else if (groups.at(-1)?.className === kind) groups.at(-1).append(element);
    else groups.push(make("div", {class: kind}, element));
  });
  document.getElementById("panels").replaceChildren(...groups);
}

function article(alert, now) {
  const {alertname, severity, ...labels} = alert.labels;
  const since = new Date(alert.activeAt);
  const {summary = alertname, description = "", runbook_url: runbook = ""} = alert.annotations;
  const about = Object.entries(labels).map(([name, value]) => `${name}=${value}`);
  const box = make("article", {class: severity ?? ""});
  box.append(make("h3", {}, `${alertname}: ${summary}`));
  box.append(make("p", {class: "since"}, `${severity ?? "no severity"}, since ${clock(since, now - since > 43200000)} (${lasting((now - since) / 1000)})`));
  box.append(make("p", {}, description));
  if (/^https?:/.test(runbook)) box.append(make("p", {}, make("a", {href: runbook, rel: "noreferrer"}, "Runbook")));
  if (about.length > 0) box.append(make("p", {class: "labels"}, about.join(", ")));
  return box;
}

function say([sentence, good]) {
  const place = document.getElementById("verdict");
  if (place.textContent !== sentence) place.textContent = sentence;
  place.className = good ? "good" : "bad";
  document.title = `${good ? "✓" : "✗"} ${sentence}`;
}

async function alerts() {
  const fired = 'ALERTS{alertstate="firing", severity!="none"}';
  const [{alerts: all}, ended] = await Promise.all([
    ask("alerts"),
    ask("query", {query: `max by (alertname) (max_over_time(timestamp(${fired})[6h:1m])) unless max by (alertname) (${fired})`}),
  ]);
  const now = new Date();
  const known = sorted(all.filter((alert) => alert.labels.severity !== "none"));
  const parts = [
    ["Broken", known.filter((alert) => alert.state === "firing")],
    ["About to be an alert", known.filter((alert) => alert.state === "pending")],
  ];
  const shown = parts.flatMap(([title, list]) => (list.length > 0 ? [make("h2", {}, title), ...list.map((alert) => article(alert, now))] : []));
  const names = ended.result.map((row) => `${row.metric.alertname} (until ${clock(new Date(row.value[1] * 1000))})`);
  if (names.length > 0) shown.push(make("h2", {}, "Over, in the last 6 hours"), make("p", {}, names.join(", ")));
  document.getElementById("alerts").replaceChildren(...shown);
  answered = now;
  say(verdict(all));
}

function links(place, entries, name, current) {
  for (const [value, text] of entries) {
    const query = new URLSearchParams({dashboard, hours, [name]: value});
    const link = make("a", {href: `?${query}`}, text);
    if (String(value) === String(current)) link.setAttribute("aria-current", "page");
    document.getElementById(place).append(link);
  }
}

async function refresh() {
  try {
    await Promise.all([alerts(), panels()]);
    document.getElementById("asked").textContent = `Prometheus answered at ${clock(answered, false)}`;
  } catch (error) {
    say([`Prometheus does not answer (${error.message})`, false]);
    document.getElementById("asked").textContent = answered ? `What is below is from ${clock(answered, true)}` : "See whether it runs: docker compose -p agent-stack-monitoring ps";
  }
  document.body.dataset.refreshed = Date.now();
  setTimeout(refresh, SCRAPE_SECONDS * 1000);
}

links("dashboards", Object.entries(DASHBOARDS), "dashboard", dashboard);
links("ranges", HOURS.map((each) => [each, each === 1 ? "1 hour" : `${each} hours`]), "hours", hours);
refresh();
