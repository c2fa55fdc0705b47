// The playground: one prompt, with retrieval and without, side by side; the output is split where it retrieved.

import { $, attempt, make, neighbor, stream } from "./api.js";

let running = null; // AbortController of what is being generated

class Output {
  constructor(title, prompt, isReading) {
    this.isReading = isReading;
    this.tokens = 0;
    this.start = performance.now();
    this.state = make("p", { className: "state", role: "status" }, "waiting…");
    this.chunks = make("div");
    this.element = make("section", { className: "output card" }, make("h2", {}, title), this.state,
      make("p", { className: "given" }, prompt), this.chunks);
    this.element.setAttribute("aria-label", title);
    this.chunk = null;
  }

  begin(hits) {
    this.chunk?.text.classList.remove("working");
    const text = make("p", { className: "text working" });
    const element = make("div", { className: "chunk" }, text);
    if (hits?.length) {
      const list = make("ol", { className: "neighbors" }, ...hits.map((hit) => neighbor(hit)));
      list.setAttribute("aria-label", "Neighbors that this chunk could read");
      element.append(list);
    } else if (this.isReading) {
      element.append(make("p", { className: "hint none" }, "no neighbor was found"));
    }
    this.chunks.append(element);
    this.chunk = { text };
  }

  take(event) {
    const found = event.retro?.neighbors;
    if (found && (found.length || this.isReading)) this.begin(found);
    for (const note of event.retro?.notes ?? []) this.chunks.append(make("p", { className: "hint" }, `note: ${note}`));
    if (event.usage) this.tokens = event.usage.completion_tokens;
    const choice = event.choices[0];
    if (!choice) return;
    if (!this.chunk) this.begin(null);
    this.chunk.text.append(choice.text);
    if (choice.finish_reason) this.reason = choice.finish_reason;
    this.state.textContent = "generating…";
  }

  end(reason) {
    this.chunk?.text.classList.remove("working");
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
