// A run, started or joined, and followed until it ends; and the approval that it may wait for.

import { ask, events, explain, pause, Refusal, request, threadPath, uuid } from "./api.js";
import { announce, button, byId, el, store, stored } from "./dom.js";
import { loadThreads, markCurrent } from "./threads.js";
import { addDetails, pretty, textOf, thoughtOf, Turn } from "./turn.js";
import { firstWords, followLatest, keepsLatest, setTitle, showControls, showLatest, view } from "./view.js";

const TURN = "agent-turn";
const MAX_FAILURES = 12;
const TURN_KEPT_MS = 3_600_000;

/** What was sent and not yet answered is kept over a reload, so that it can be sent again under the same id. */
function keepTurn(turn) {
  store("sessionStorage", TURN, turn && JSON.stringify({ ...turn, at: Date.now() }));
}

export function keptTurn(thread) {
  try {
    const kept = JSON.parse(stored("sessionStorage", TURN));
    return kept?.thread === thread && Date.now() - kept.at < TURN_KEPT_MS ? kept : null;
  } catch {
    return null;
  }
}

export const reuse = (turn) =>
  button("Edit and send again", () => {
    byId("message").value = turn.text;
    byId("message").focus();
    showControls();
  });

export function followRun(run) {
  view.run = run;
  showControls();
  run.follow();
}

/** Starts a run, or joins one (runId), and writes what it tells into a turn. */
export class Run {
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
    this.turn.acts?.remove();
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
      case "reasoning":
        turn.think(data.text);
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
    const thought = message.type === "AIMessageChunk" ? thoughtOf(message) : "";
    if (thought) turn.think(thought);
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
    offerActs(turn, this.thread);
    if (answer) announce(`The agent says: ${answer}`);
    if (this.reload && !this.left) return view.open(this.thread);
    if (!turn.steps.size && answer) return;
    try {
      const state = await this.detailsOf();
      if (!this.left && view.thread === this.thread && !view.run) showApproval(turn, state);
    } catch (error) {
      if (!this.left && !answer) turn.note(explain(error), { actions: [button("Load again", () => view.open(this.thread))] });
    }
  }

  #failed(code, message = "") {
    this.turn.end("stopped");
    this.turn.node.classList.add("lost");
    const stopped = code === "cancelled";
    const actions = this.turn.text === null ? [] : [this.#again(), reuse(this.turn)];
    const text = stopped ? "Stopped." : message || "The answer failed.";
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
    return button("Try again", () => sendInstead(this.turn, this.thread, this.turn.text));
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

/** Take a turn and all that came after it out of the thread, and say something in its place. */
async function sendInstead(turn, thread, text) {
  if (view.run || view.approval || view.thread !== thread) return;
  // Nothing else is sent until that is done.
  const replacing = { stopping: true, stop() {}, leave() {} };
  view.run = replacing;
  showControls();
  turn.clearNotes();
  turn.progress("Thinking…");
  try {
    const state = await ask("GET", threadPath(thread, "/state")).catch((error) => {
      if (error.status === 404) return null; // its first message did not arrive
      throw error;
    });
    const messages = state?.values?.messages ?? [];
    const from = turn.id === null ? -1 : messages.findIndex((message) => message.id === turn.id);
    if (from >= 0) {
      const gone = messages.slice(from).map((message) => ({ type: "remove", id: message.id }));
      await ask("POST", threadPath(thread, "/state"), { values: { messages: gone }, as_node: "model" });
    }
  } catch (error) {
    turn.progress(null);
    turn.note(explain(error), { actions: [button("Try again", () => sendInstead(turn, thread, text))] });
    text = null;
  }
  if (view.run !== replacing) return; // another thread is shown by now
  view.run = null;
  showControls();
  if (text === null) return;
  while (turn.node.nextElementSibling) turn.node.nextElementSibling.remove();
  turn.node.remove();
  send(text);
}

/** What can be done with a turn that is over: copied, asked again, asked in other words. */
export function offerActs(turn, thread) {
  turn.acts?.remove();
  const acts = [];
  if (navigator.clipboard && turn.said.length) {
    acts.push(
      button("Copy", async () => {
        await navigator.clipboard.writeText(turn.said.join("\n\n"));
        announce("Copied");
      }),
    );
  }
  if (turn.text !== null && turn.id !== null) {
    acts.push(button("Answer anew", () => sendInstead(turn, thread, turn.text)), button("Edit", () => edit(turn, thread)));
  }
  if (!acts.length) return;
  turn.acts = el("div", { className: "acts" }, ...acts);
  turn.node.append(turn.acts);
}

/** Write a question anew in its place. What came after it goes once the new one is sent. */
function edit(turn, thread) {
  if (view.run || view.approval || turn.node.querySelector(".edit")) return;
  const shown = turn.node.querySelector(".mine");
  const field = el("textarea", { value: turn.text, rows: 3, dir: "auto", "aria-label": "Question" });
  const close = () => {
    form.replaceWith(shown);
    byId("message").focus();
  };
  const form = el(
    "form",
    {
      className: "edit",
      onsubmit: (event) => {
        event.preventDefault();
        if (field.value.trim()) sendInstead(turn, thread, field.value);
      },
    },
    field,
    el("div", { className: "choices" }, el("button", { type: "submit", className: "approve" }, "Send"), button("Cancel", close)),
  );
  shown.replaceWith(form);
  field.focus();
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

/** Show what the thread waits for, if it does. Questions come one by one. */
export function showApproval(turn, state) {
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

export function send(text) {
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
  followLatest();
  followRun(new Run(turn, { thread: view.thread, turnId }));
  showLatest();
}
