// Calls of the service, and the few helpers that make elements. Text goes into the page as text, never as HTML.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings become text. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

async function failure(answer) {
  let message = `${answer.status} ${answer.statusText}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // not of the service: a proxy's page
  }
  if (answer.status === 401) document.dispatchEvent(new CustomEvent("signed-out"));
  return new ApiError(answer.status, message);
}

/** A request; where nobody answers, that in words. */
async function send(path, options) {
  try {
    return await fetch(here(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer: it was stopped, or the connection is gone. What you wrote is still here; try again.");
  }
}

/** The page may lie below a prefix: paths go from where it is. */
const here = (path) => path.replace(/^\//, "");

/** A call with JSON both ways. Throws ApiError. */
export async function call(method, path, body, signal) {
  const options = { method, signal, headers: {}, credentials: "same-origin" };
  if (body instanceof Blob || body instanceof FormData) options.body = body;
  else if (body !== undefined) {
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await send(path, options);
  if (!answer.ok) throw await failure(answer);
  return answer.json();
}

/** The events of a streamed answer, as they come. */
export async function* stream(path, body, signal) {
  const answer = await send(path, {
    method: "POST", signal, credentials: "same-origin",
    headers: { "content-type": "application/json" }, body: JSON.stringify({ ...body, stream: true }),
  });
  if (!answer.ok) throw await failure(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new ApiError(0, "The connection was lost before the answer was whole.");
    waiting += value;
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const content = JSON.parse(data);
      if (content.error) throw new ApiError(500, content.error.message);
      yield content;
    }
  }
}

/** A line above the screen that stays until the next one; nothing hides it. */
export function notice(text) {
  $("notice").textContent = text || "";
  $("notice").hidden = !text;
}

/** Runs work for an event of the page; what goes wrong is shown. */
export async function attempt(work, button) {
  notice("");
  if (button) button.disabled = true;
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError" && error.status !== 401) notice(error.message);
    return undefined;
  } finally {
    if (button) button.disabled = false;
  }
}

/** Into the clipboard; where browsers give none (a page that is not https), marked text is copied. */
export async function copy(text) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    const area = make("textarea", { value: text, readOnly: true, className: "hidden" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  $("said").textContent = "Copied.";
}

export function confirmed(title, text, yes) {
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = yes;
  const dialog = $("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

export async function showDocument(id) {
  const found = await call("GET", `/v1/documents/${encodeURIComponent(id)}`);
  $("document-title").textContent = found.title || found.id;
  $("document-id").textContent = `id ${found.id}`;
  $("document-text").textContent = found.text;
  $("document").showModal();
}

let library = null;

/** The name of the live library, whose documents can be opened. */
export function setLibrary(name) {
  library = name;
}

export const isLive = (hit) => hit.source === library;

/** A text as parts, the words of a question marked. */
function marked(text, question) {
  const words = (question.match(/[\p{L}\p{N}]{2,}/gu) ?? []).map((word) => word.toLowerCase());
  if (!words.length) return [text];
  return text.split(/([\p{L}\p{N}]+)/u).map((part) => (words.includes(part.toLowerCase()) ? make("mark", {}, part) : part));
}

/** A neighbor: its document (a link where the library has it), its score and text; `question`: whose words are marked. */
export function neighbor(hit, isOpen = false, question = "") {
  const name = hit.title || hit.document;
  const title = isLive(hit)
    ? make("button", { type: "button", className: "link", onclick: () => attempt(() => showDocument(hit.document)) }, name)
    : make("span", {}, name);
  const where = hit.source ? `${hit.source} / ${hit.document}, chunk ${hit.chunk}` : "given";
  const head = make("div", { className: "neighbor-head" }, title,
    make("span", { className: "score", title: "score" }, hit.score ? hit.score.toFixed(3) : ""));
  const text = make("p", { className: "neighbor-text" }, ...marked(hit.text, question),
    make("span", { className: "continuation" }, ...marked(hit.continuation || "", question)));
  const more = make("details", { open: isOpen }, make("summary", {}, make("span", { className: "source" }, where)), text);
  return make("li", {}, head, more, isOpen ? null : make("p", { className: "snippet" }, hit.text + (hit.continuation || "")));
}
