// One turn on the page: a message, the tools that were used, and the answer.

import { el } from "./dom.js";
import { readBlock } from "./markdown.js";
import { keepsLatest, showLatest } from "./view.js";

/** Text that grows. Only the last two blocks are made again: what comes later cannot change the ones before. */
export class Answer {
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

export const pretty = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));
const brief = (value) => (typeof value === "string" ? value : JSON.stringify(value)).slice(0, 200);

export class Turn {
  constructor(id, text) {
    this.id = id;
    this.text = text;
    this.node = el("article", { className: "turn" });
    this.answer = null;
    this.thought = null;
    // What the agent said, as it wrote it.
    this.said = [];
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

  /** What the model thinks before it answers: folded, for who wants to know. */
  think(text) {
    if (!this.thought) {
      const body = el("div", { dir: "auto" });
      this.thought = { node: el("details", { className: "thought" }, el("summary", {}, "Reasoning"), body), body };
      this.#append(this.thought.node);
    }
    this.thought.body.append(text);
  }

  /** What is being written will be written anew. */
  void() {
    this.thought?.node.remove();
    this.thought = null;
    if (this.answer) cancelAnimationFrame(this.answer.frame);
    this.answer?.node.remove();
    this.answer = null;
  }

  /** What is written so far is complete; text that follows stands by itself. */
  close() {
    this.answer?.render();
    if (this.answer?.text) this.said.push(this.answer.text);
    this.answer = this.thought = null;
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
      { running: "", waiting: "waiting", done: "✓ done", failed: "✗ failed", refused: "✗ not allowed", stopped: "stopped" }[state],
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

export function textOf(message) {
  if (typeof message.content === "string") return message.content;
  return (message.content ?? []).map((part) => (typeof part === "string" ? part : part.text ?? "")).join("");
}

export const thoughtOf = (message) => message.additional_kwargs?.reasoning_content ?? "";

/** The turns that a thread's messages are. */
export function turnsOf(messages) {
  const turns = [];
  for (const message of messages) {
    if (message.type === "human" || !turns.length) {
      turns.push(new Turn(message.id, message.type === "human" ? textOf(message) : null));
    }
    const turn = turns.at(-1);
    turn.lacksAnswer = message.type !== "ai" || message.tool_calls?.length > 0;
    if (message.type === "ai") {
      const thought = thoughtOf(message);
      if (thought) turn.think(thought);
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

export function addDetails(turn, message) {
  for (const call of message.type === "ai" ? message.tool_calls ?? [] : []) {
    turn.detail(turn.step(call.id, call.name), "Arguments", call.args);
  }
  if (message.type !== "tool") return;
  const step = turn.step(message.tool_call_id, message.name ?? "tool");
  const refused = message.additional_kwargs?.refused === true;
  turn.setStep(step, refused ? "refused" : message.status === "error" ? "failed" : "done");
  turn.detail(step, "Result", textOf(message));
}
