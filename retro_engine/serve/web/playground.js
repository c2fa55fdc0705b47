// The playground: one prompt, with retrieval and without, side by side; the output is split where it retrieved.

import { $, attempt, make, neighbor, stream } from "./api.js";

let running = null; // AbortController of what is being generated

/** A text that is being made, in the parts that it was read for: each with its neighbors; `isFolded`: those are opened by a click. */
export class Chunks {
  constructor(isReading, isFolded = false) {
    Object.assign(this, { isReading, isFolded, parts: [], last: null, waiting: null });
    this.element = make("div", { className: "chunks" });
  }

  /** Something is on its way. */
  wait() {
    this.waiting = make("p", { className: "hint working" }, "waiting…");
    this.element.append(this.waiting);
  }

  begin(hits, text = "") {
    this.end();
    this.last = make("p", { className: "text working" }, text);
    const element = make("div", { className: "chunk" }, this.last);
    if (hits?.length) element.append(this.sources(hits));
    else if (this.isReading && hits && !this.isFolded) element.append(make("p", { className: "hint none" }, "no neighbor was found"));
    this.element.append(element);
    this.parts.push([text, hits]);
  }

  sources(hits) {
    const list = make("ol", { className: "neighbors" }, ...hits.map((hit) => neighbor(hit)));
    list.setAttribute("aria-label", "Neighbors that this chunk could read");
    const name = `${hits.length} source${hits.length === 1 ? "" : "s"} of this part`;
    return this.isFolded ? make("details", { className: "sources" }, make("summary", {}, name), list) : list;
  }

  /** An event of a stream, and the text in it. */
  take(event, text) {
    this.waiting?.remove();
    const found = event.retro?.neighbors;
    if (found && (found.length || this.isReading)) this.begin(found);
    for (const note of event.retro?.notes ?? []) this.element.append(make("p", { className: "hint" }, `note: ${note}`));
    if (!event.choices[0]) return;
    if (!this.last) this.begin(null);
    this.last.append(text);
    this.parts.at(-1)[0] += text;
  }

  end() {
    this.waiting?.remove();
    this.last?.classList.remove("working");
  }
}

class Output {
  constructor(title, prompt, isReading) {
    this.tokens = 0;
    this.start = performance.now();
    this.state = make("p", { className: "state", role: "status" }, "waiting…");
    this.chunks = new Chunks(isReading);
    this.element = make("section", { className: "output card" }, make("h2", {}, title), this.state,
      make("p", { className: "given" }, prompt), this.chunks.element);
    this.element.setAttribute("aria-label", title);
  }

  take(event) {
    const choice = event.choices[0];
    this.chunks.take(event, choice?.text ?? "");
    if (event.usage) this.tokens = event.usage.completion_tokens;
    if (!choice) return;
    if (choice.finish_reason) this.reason = choice.finish_reason;
    this.state.textContent = "generating…";
  }

  end(reason) {
    this.chunks.end();
    const seconds = (performance.now() - this.start) / 1000;
    const speed = this.tokens ? `${this.tokens} tokens in ${seconds.toFixed(1)} s; ` : "";
    this.state.textContent = `${speed}${reason}`;
  }
}

function settings(model) {
  const body = {
    model, prompt: $("prompt").value, max_tokens: Number($("max-tokens").value),
    temperature: Number($("temperature").value), seed: Number($("seed").value), stream_options: { include_usage: true },
    retro: { refresh: $("refresh").value },
  };
  if (body.temperature > 0) body.top_p = Number($("top-p").value);
  if ($("stop-text").value) body.stop = [$("stop-text").value];
  if ($("k").value) body.retro.k = Number($("k").value);
  return body;
}

async function run(output, body, signal) {
  const ends = { length: "stopped at the number of tokens", stop: "ended by itself" };
  try {
    for await (const event of stream("/v1/completions", body, signal)) output.take(event);
    output.end(ends[output.reason] ?? "ended");
  } catch (error) {
    output.end(error.name === "AbortError" ? "stopped" : "failed");
    throw error;
  }
}

async function generate(model, readsNeighbors) {
  running?.abort();
  const controller = (running = new AbortController());
  const body = settings(model);
  const pairs = [[new Output(readsNeighbors ? "With retrieval" : "Output", body.prompt, readsNeighbors), body]];
  if (readsNeighbors && $("compare").checked) {
    pairs.push([new Output("Without retrieval", body.prompt, false), { ...body, retro: { neighbors: [] } }]);
  }
  $("outputs").replaceChildren(...pairs.map(([output]) => output.element));
  $("stop").disabled = false;
  try {
    const ends = await Promise.allSettled(pairs.map(([output, one]) => run(output, one, controller.signal)));
    const failed = ends.find((end) => end.status === "rejected");
    if (failed) throw failed.reason;
  } finally {
    if (running === controller) {
      running = null;
      $("stop").disabled = true;
    }
  }
}

export function startPlayground(model) {
  const readsNeighbors = model.retro.library !== null;
  $("compare").closest("label").hidden = !readsNeighbors;
  $("max-tokens").max = model.retro.max_new_tokens;
  $("playground-form").onsubmit = (event) => {
    event.preventDefault();
    attempt(() => generate(model.id, readsNeighbors));
  };
  $("stop").onclick = () => running?.abort();
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("playground-form").requestSubmit();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
}

export function stopPlayground() {
  running?.abort();
  $("outputs").replaceChildren();
}
