// The first screen of a reader: a question, its short answer, and the passage with the words that it was read from.

import { $, attempt, call, make, showDocument } from "./api.js";

const EXAMPLE = {
  id: "example",
  title: "An example",
  text: "The lighthouse of Vessel Point was built in 1871 by Marta Oden. It has been lit every night since, but for the winter of 1944.",
};
const EXAMPLE_QUESTION = "Who built the lighthouse of Vessel Point?";
let canWrite = false;
let asking = null; // AbortController of the question that is answered

/** A passage, its span marked; offsets count characters as Python does, so letters outside the first plane are one. */
function passage(source, span) {
  const letters = Array.from(source.text);
  const part = (first, last) => letters.slice(first, last).join("");
  const text = span
    ? [part(0, span.start).trimStart(), make("mark", {}, part(span.start, span.end)), part(span.end)]
    : [source.text.trim()];
  const open = make("button", { type: "button", className: "link", onclick: () => attempt(() => showDocument(source.document)) },
    source.title || source.document);
  const head = make("div", { className: "neighbor-head" }, open,
    make("span", { className: "source" }, source.title ? source.document : ""),
    make("span", { className: "score", title: "score" }, source.score.toFixed(2)));
  return make("li", {}, head, make("p", { className: "neighbor-text" }, ...text));
}

function shown(found) {
  const { span, sources } = found;
  const rest = sources.filter((_, number) => number !== span?.source);
  const best = span ? make("ol", { className: "hits" }, passage(sources[span.source], span)) : null;
  const others = rest.length
    ? make("details", { open: !span && found.found }, make("summary", {}, span ? "Also read" : "Read"),
      make("ol", { className: "hits" }, ...rest.map((source) => passage(source))))
    : null;
  const note = found.note ? make("p", { className: "hint" }, found.note.replace(/^no hit: /, "")) : null;
  return make("section", { className: "card" }, make("p", { className: "answer-text" }, found.answer), note, best, others);
}

async function ask() {
  asking?.abort();
  const controller = (asking = new AbortController());
  $("answer").replaceChildren(make("p", { className: "hint working" }, "reading…"));
  try {
    const found = await call("POST", "/v1/ask", { question: $("question").value }, controller.signal);
    $("answer").replaceChildren(shown(found));
  } catch (error) {
    if (asking === controller) $("answer").replaceChildren();
    throw error;
  }
}

async function example() {
  await call("POST", "/v1/documents", EXAMPLE);
  await showAsk();
  $("question").value = EXAMPLE_QUESTION;
  await ask();
}

/** The screen as it is shown: with what helps where there is nothing to ask about. */
export async function showAsk() {
  const { statistics } = await call("GET", "/v1/documents?limit=1");
  $("ask-empty").hidden = (statistics.documents ?? 0) > 0;
  $("ask-example").hidden = !canWrite;
  $("question").focus();
}

export function startAsk(user) {
  canWrite = user.scope !== "read";
  $("question-form").onsubmit = (event) => {
    event.preventDefault();
    attempt(ask);
  };
  $("ask-example").onclick = (event) => attempt(example, event.currentTarget);
}

export function stopAsk() {
  asking?.abort();
  $("answer").replaceChildren();
  $("question").value = "";
}
