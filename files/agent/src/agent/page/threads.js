// The list of threads: shown, renamed, deleted.

import { ask, explain, threadPath } from "./api.js";
import { announce, byId, el, iconButton } from "./dom.js";
import { closeDrawer, newThread, setTitle, view } from "./view.js";

const PAGE_SIZE = 50;
const FRESH_MS = 10_000;

const listed = new Map(); // thread id -> { thread, node }
let pages = 1;
let listedAt = 0;

function titleOf(thread) {
  const given = thread.metadata?.title;
  if (typeof given === "string" && given.trim()) return given;
  const when = new Date(thread.created_at);
  return `Thread of ${when.toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}`;
}

/** Whether the list has the thread. */
export const isListed = (id) => listed.has(id);

/** Load one page of older threads more. */
export function loadMore() {
  pages++;
  loadThreads();
}

/** Load the list again unless it is fresh. */
export function refreshThreads() {
  if (Date.now() - listedAt > FRESH_MS) loadThreads();
}

export async function loadThreads() {
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

export function markCurrent() {
  for (const [id, entry] of listed) {
    const current = id === view.thread;
    entry.node.classList.toggle("current", current);
    if (current) entry.link.setAttribute("aria-current", "page");
    else entry.link.removeAttribute("aria-current");
  }
  const entry = listed.get(view.thread);
  if (entry) setTitle(titleOf(entry.thread));
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
