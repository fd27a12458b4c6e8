// What the page shows at the moment: the open thread, its controls, its scroll position and the drawer.

import { byId } from "./dom.js";

/**
 * `run` is the one that is followed, `approval` the question that is asked, and `loading` counts the threads opened so
 * far. `open(id)` shows a thread, null a new one; main.js sets it, so that no two modules import each other.
 */
export const view = { thread: null, run: null, approval: null, loading: 0, open: null };

export function newThread() {
  history.pushState(null, "", location.pathname);
  view.open(null);
  closeDrawer();
  byId("message").focus();
}

export const firstWords = (text) => text.trim().replace(/\s+/g, " ").slice(0, 80) || "New thread";

export function setTitle(text) {
  byId("title").textContent = text;
  document.title = view.thread ? `${text} – Agent` : "Agent";
}

export function showControls() {
  const running = view.run !== null;
  byId("stop").hidden = !running;
  byId("stop").disabled = running && view.run.stopping;
  byId("send").hidden = running;
  byId("send").disabled = view.approval !== null || !byId("message").value.trim();
  byId("conversation").setAttribute("aria-busy", String(running));
}

/* ---- Scrolling: the latest stays in view unless somebody scrolled away from it ---- */

let atLatest = true;
export const keepsLatest = () => atLatest;

export function showLatest() {
  const box = byId("conversation");
  box.scrollTop = box.scrollHeight;
}

export function noteScroll() {
  const box = byId("conversation");
  atLatest = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  byId("latest").hidden = atLatest;
}

/** Whatever comes next is shown. */
export function followLatest() {
  atLatest = true;
}

/* ---- The drawer, where the window is narrow ---- */

export const drawerIsOpen = () => document.body.classList.contains("drawer");

export function openDrawer() {
  document.body.classList.add("drawer");
  byId("backdrop").hidden = false;
  byId("menu").setAttribute("aria-expanded", "true");
  byId("main").inert = true;
  byId("new").focus();
}

export function closeDrawer() {
  if (!drawerIsOpen()) return;
  document.body.classList.remove("drawer");
  byId("backdrop").hidden = true;
  byId("menu").setAttribute("aria-expanded", "false");
  byId("main").inert = false;
  byId("menu").focus();
}
