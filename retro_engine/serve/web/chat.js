// Chat: turns of a conversation with a model that has a template; each part of an answer with what it could read.

import { $, attempt, copy, make, stream } from "./api.js";
import { Chunks } from "./playground.js";

const KEPT = "retro-chats"; // in this tab's storage: gone with the tab, and at signing out
const MOST_KEPT = 20;
const ENDS = { length: "stopped at the number of tokens", stopped: "stopped", failed: "failed" };
let model = null;
let chats = []; // {title, turns: [{role, content, chunks, reason}]}, newest first
let chat = null; // the one that is shown
let running = null; // AbortController of the answer that comes

function keep() {
  chats = [chat, ...chats.filter((one) => one !== chat)].filter((one) => one.turns.length).slice(0, MOST_KEPT);
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(chats));
  } catch {
    chats.pop(); // no room: the oldest is not kept
    sessionStorage.removeItem(KEPT);
  }
}

function kept() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT)) ?? [];
  } catch {
    return [];
  }
}

function button(name, work) {
  return make("button", { type: "button", className: "quiet", onclick: (event) => attempt(work, event.currentTarget) }, name);
}

/** What can be done with an answer; only the last one can be made anew or gone on with. */
function actions(turn, isLast) {
  const row = make("div", { className: "row actions" }, button("Copy", () => copy(turn.content)));
  if (isLast && !running) {
    row.append(button("Regenerate", regenerate));
    if (turn.content && (turn.reason === "length" || turn.reason === "stopped")) row.append(button("Go on", () => answer(turn)));
  }
  if (ENDS[turn.reason]) row.append(make("span", { className: "hint" }, ENDS[turn.reason]));
  return row;
}

/** A turn as it is read; `chunks` gets what is still to come. */
function shown(turn, isLast) {
  const name = turn.role === "user" ? "You" : model.id;
  const element = make("article", { className: `turn ${turn.role}` }, make("h2", {}, name));
  element.setAttribute("aria-label", `${name} said`);
  if (turn.role === "user") element.append(make("p", { className: "text" }, turn.content));
  else {
    const chunks = new Chunks(model.retro.library !== null, true);
    for (const [text, hits] of turn.chunks) chunks.begin(hits, text);
    chunks.end();
    element.append(chunks.element, actions(turn, isLast));
  }
  return element;
}

function show() {
  $("turns").replaceChildren(...chat.turns.map((turn, number) => shown(turn, number === chat.turns.length - 1)));
  $("chat-empty").hidden = chat.turns.length > 0;
  $("chat-stop").disabled = !running;
  const others = chats.filter((one) => one !== chat);
  $("chat-earlier").hidden = !others.length;
  $("chat-list").replaceChildren(...others.map((one) => make("li", {},
    make("button", { type: "button", className: "link", onclick: () => open(one) }, one.title))));
}

/** Where a conversation is gone on with: at its end. */
export function showChat() {
  if (chat.turns.length) $("chat-form").scrollIntoView({ block: "end" });
}

function open(one) {
  running?.abort();
  chat = one ?? { title: "", turns: [] };
  show();
  showChat();
  $("message").focus();
}

function asked(turns, goesOn) {
  const messages = turns.filter((turn) => turn.content).map(({ role, content }) => ({ role, content }));
  if ($("system").value.trim()) messages.unshift({ role: "system", content: $("system").value });
  const body = { model: model.id, messages, max_tokens: Number($("chat-tokens").value), stream_options: { include_usage: true } };
  if (goesOn) body.continue_final_message = true;
  if ($("chat-temperature").value !== "") body.temperature = Number($("chat-temperature").value);
  if (model.retro.library !== null && !$("chat-reads").checked) body.retro = { neighbors: [] };
  return body;
}

/** The model's next turn, or (`turn`) what follows of its last one. */
async function answer(turn) {
  running?.abort();
  const controller = (running = new AbortController());
  const mine = chat;
  const body = asked(mine.turns, Boolean(turn));
  const said = turn ?? { role: "assistant", content: "", chunks: [], reason: "" };
  if (!turn) mine.turns.push(said);
  said.reason = "";
  show();
  const element = $("turns").lastElementChild;
  const chunks = new Chunks(model.retro.library !== null, true);
  for (const [text, hits] of said.chunks) chunks.begin(hits, text);
  element.querySelector(".chunks").replaceWith(chunks.element);
  chunks.wait();
  $("chat-form").scrollIntoView({ block: "end" });
  try {
    for await (const event of stream("/v1/chat/completions", body, controller.signal)) {
      const choice = event.choices[0];
      const isAtEnd = $("chat-form").getBoundingClientRect().top < window.innerHeight; // who reads above stays there
      chunks.take(event, choice?.delta.content ?? "");
      if (isAtEnd && chat === mine) $("chat-form").scrollIntoView({ block: "end" });
      if (choice?.finish_reason) said.reason = choice.finish_reason;
    }
  } catch (error) {
    said.reason = error.name === "AbortError" ? "stopped" : "failed";
    throw error;
  } finally {
    chunks.end();
    said.chunks = chunks.parts;
    said.content = chunks.parts.map(([text]) => text).join("");
    if (said.reason === "failed" && !said.content) takeBack(mine, said);
    if (running === controller) running = null;
    if (user) keep();
    if (chat === mine) show();
  }
}

/** What could not be answered is in the field again, to be sent once more. */
function takeBack(mine, said) {
  mine.turns.splice(mine.turns.indexOf(said), 1);
  const last = mine.turns.at(-1);
  if (last?.role === "user" && !$("message").value) $("message").value = mine.turns.pop().content;
}

async function regenerate() {
  if (chat.turns.at(-1)?.role === "assistant") chat.turns.pop();
  await answer();
}

async function send() {
  const content = $("message").value.trim();
  if (!content || running) return;
  chat.title ||= content.slice(0, 60);
  chat.turns.push({ role: "user", content });
  $("message").value = "";
  await answer();
  $("message").focus();
}

let user = null;

export function startChat(served, who) {
  model = served;
  user = who;
  chats = kept();
  $("chat-reads").closest("label").hidden = model.retro.library === null;
  $("chat-tokens").max = model.retro.max_new_tokens;
  $("chat-form").onsubmit = (event) => {
    event.preventDefault();
    attempt(send);
  };
  $("message").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("chat-form").requestSubmit();
  };
  $("chat-stop").onclick = () => running?.abort();
  $("chat-new").onclick = () => open();
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  chat = chats[0] ?? { title: "", turns: [] };
  show();
}

export function stopChat() {
  user = null;
  running?.abort();
  sessionStorage.removeItem(KEPT);
  chats = [];
  chat = { title: "", turns: [] };
  for (const id of ["turns", "chat-list"]) $(id).replaceChildren();
  for (const id of ["message", "system"]) $(id).value = "";
}
