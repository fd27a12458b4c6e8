// The chat page. It has no build step and no dependency.

import { ask, explain, threadPath } from "./api.js";
import { announce, button, byId, el, store } from "./dom.js";
import { followRun, keptTurn, offerActs, reuse, Run, send, showApproval } from "./run.js";
import { isListed, loadMore, loadThreads, markCurrent, refreshThreads } from "./threads.js";
import { Turn, turnsOf } from "./turn.js";
import {
  closeDrawer,
  drawerIsOpen,
  firstWords,
  followLatest,
  newThread,
  noteScroll,
  openDrawer,
  setTitle,
  showControls,
  showLatest,
  view,
} from "./view.js";

const THEME = "agent-theme"; // theme.js has it too

/* ---- The open thread ---- */

const threadInAddress = () => (/^#([A-Za-z0-9_-]{1,64})$/.exec(location.hash) ?? [])[1] ?? null;

/** What was written and not sent, for each thread by its own. */
const drafts = new Map();

function changeDraft(id) {
  const field = byId("message");
  if (field.value) drafts.set(view.thread, field.value);
  else drafts.delete(view.thread);
  field.value = drafts.get(id) ?? "";
}

function clearView() {
  view.run?.leave();
  view.run = view.approval = null;
  byId("turns").replaceChildren();
  followLatest();
  byId("latest").hidden = true;
  showControls();
}

async function openThread(id) {
  const mine = ++view.loading;
  if (id !== view.thread) changeDraft(id);
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
  for (const turn of turns) offerActs(turn, id);
  byId("welcome").hidden = true;
  if (turns.length && !isListed(id)) setTitle(firstWords(turns[0].text ?? ""));
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
    last.note("This message was not answered.", { plain: true, actions: [reuse(last)] });
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

/* ---- Composer and keyboard ---- */

function submit(event) {
  event?.preventDefault();
  const text = byId("message").value;
  if (view.run || view.approval || !text.trim()) return;
  byId("message").value = "";
  send(text);
  byId("message").focus();
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

/* ---- Theme: theme.js has set it before the first paint ---- */

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : systemIsDark.matches;
}

function setTheme(chosen) {
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
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

/* ---- Start ---- */

const isPhone = matchMedia("(max-width: 48rem)");

function start() {
  showTheme();
  showControls();
  systemIsDark.addEventListener("change", showTheme);
  isPhone.addEventListener("change", closeDrawer);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => threadInAddress() !== view.thread && openThread(threadInAddress()));
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) refreshThreads();
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
  on("more", "click", loadMore);
  loadThreads();
  openThread(threadInAddress());
}

view.open = openThread;
start();
