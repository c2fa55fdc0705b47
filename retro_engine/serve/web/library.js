// The documents and retrieve screens.

import { $, attempt, call, confirmed, isLive, make, neighbor, showDocument } from "./api.js";

const PAGE = 20;
const SHOWN = 5; // faults of an upload
let canWrite = false;
let after = "";
let faults = 0; // of the upload
let uploading = null; // its AbortController

function bytes(count) {
  return count < 1024 ? `${count} B` : count < 1 << 20 ? `${(count / 1024).toFixed(1)} kB` : `${(count / (1 << 20)).toFixed(1)} MB`;
}

async function remove(id) {
  if (!(await confirmed("Delete this document?", id, "Delete"))) return;
  await call("DELETE", `/v1/documents/${encodeURIComponent(id)}`);
  await list(after);
}

function row(entry) {
  const open = make("button", { type: "button", className: "link", onclick: () => attempt(() => showDocument(entry.id)) }, entry.id);
  const cells = [make("td", {}, open), make("td", { className: "title" }, entry.title), make("td", { className: "number wide" }, String(entry.chunks)),
    make("td", { className: "number wide" }, bytes(entry.bytes))];
  if (canWrite) {
    const button = make("button", { type: "button", className: "danger quiet", onclick: () => attempt(() => remove(entry.id)) }, "Delete");
    button.setAttribute("aria-label", `Delete ${entry.id}`);
    cells.push(make("td", { className: "number" }, button));
  }
  return make("tr", {}, ...cells);
}

export async function list(from = "") {
  after = from;
  const page = await call("GET", `/v1/documents?limit=${PAGE}&after=${encodeURIComponent(from)}`);
  const { documents = 0, chunks = 0, notes = [] } = page.statistics;
  $("counts").textContent = [`${documents} document${documents === 1 ? "" : "s"}, ${chunks} chunks, version ${page.index_version}`, ...notes].join("; ");
  const heads = ["Id", "Title"].map((name) => make("th", { scope: "col" }, name));
  heads.push(make("th", { scope: "col", className: "number wide" }, "Chunks"), make("th", { scope: "col", className: "number wide" }, "Size"));
  if (canWrite) heads.push(make("th", {}, make("span", { className: "hidden" }, "Actions")));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...page.data.map(row)));
  const empty = make("p", { className: "hint" }, from ? "No more documents." : "There are no documents yet.");
  $("doc-list").replaceChildren(page.data.length ? table : empty);
  $("next-page").disabled = !page.has_more;
  $("next-page").onclick = () => attempt(() => list(page.data.at(-1).id));
  $("first-page").disabled = !from;
}

async function search(query) {
  if (!query.trim()) return list();
  const found = await call("POST", "/v1/retrieve", { query, k: PAGE });
  const hits = found.data.filter((hit) => isLive(hit));
  const shown = hits.length ? make("ol", { className: "hits" }, ...hits.map((hit) => neighbor(hit, true, query)))
    : make("p", { className: "hint" }, found.note ?? "No document has any of these words.");
  $("doc-list").replaceChildren(shown);
  $("next-page").disabled = true;
  $("first-page").disabled = false;
  return undefined;
}

async function add() {
  const body = { text: $("doc-text").value, title: $("doc-title").value };
  if ($("doc-id").value) body.id = $("doc-id").value;
  await call("POST", "/v1/documents", body);
  $("add").reset();
  await list();
}

/** A file as documents; how many. `path`: from the folder that was chosen, its id. */
async function uploaded({ file, path }, say, signal) {
  if (!file.name.toLowerCase().endsWith(".jsonl")) {
    const form = new FormData();
    form.append("file", file);
    if (path !== file.name) form.append("id", path);
    await call("POST", "/v1/documents", form, signal);
    return 1;
  }
  let job = await call("POST", "/v1/documents/import", file, signal);
  while (job.state === "running") {
    await new Promise((resolve) => setTimeout(resolve, 300));
    job = await call("GET", `/v1/jobs/${job.id}`);
    say(`${file.name}: ${job.added} added, ${job.failed} not used`);
  }
  if (job.failed) fault(`${file.name}: ${job.failed} rows not used: ${job.errors[0]?.reason ?? ""}`);
  if (job.state !== "done") throw new Error(`${job.state} ${job.reason}`);
  return job.added;
}

/** What went wrong with a file; of many the first are shown. */
function fault(text) {
  faults += 1;
  if (faults <= SHOWN) $("upload-faults").append(make("li", {}, text));
}

const isRead = ({ file }) => $("files").accept.split(",").some((suffix) => file.name.toLowerCase().endsWith(suffix));

/** Files of all that was dropped, those in folders too: {file, path}. */
async function* inside(entries) {
  for (const entry of entries) {
    if (entry.isFile) {
      yield { file: await new Promise((found, failed) => entry.file(found, failed)), path: entry.fullPath.slice(1) };
      continue;
    }
    const reader = entry.createReader();
    for (;;) {
      const part = await new Promise((found, failed) => reader.readEntries(found, failed)); // a hundred at a time
      if (!part.length) break;
      yield* inside(part);
    }
  }
}

async function dropped(entries) {
  const files = [];
  for await (const one of inside(entries)) {
    files.push(one);
    if (files.length % 500 === 0) $("upload-state").textContent = `${files.length.toLocaleString("en")} files found…`;
  }
  await upload(files, entries.some((entry) => entry.isDirectory));
}

function chosen() {
  const files = [...$("files").files].map((file) => ({ file, path: file.name }));
  const folder = [...$("folder").files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
  if (!files.length && !folder.length) throw new Error("Choose files or a folder first, or drop them on this card.");
  return upload([...files, ...folder], folder.length > 0);
}

/** One after the other: a file that cannot be used is said, and the others go on. Of a folder what is of no kind that is read
 * is left out. */
async function upload(all, isFolder) {
  const say = (text) => ($("upload-state").textContent = text);
  const bar = $("upload-progress");
  const files = isFolder ? all.filter(isRead) : all;
  const controller = (uploading = new AbortController());
  let added = 0;
  faults = 0;
  $("upload-faults").replaceChildren();
  bar.hidden = false;
  bar.max = Math.max(1, files.length);
  $("upload-stop").disabled = false;
  try {
    for (const [number, one] of files.entries()) {
      bar.value = number;
      say(`${(number + 1).toLocaleString("en")} of ${files.length.toLocaleString("en")}: ${one.path}`);
      try {
        added += await uploaded(one, say, controller.signal);
      } catch (error) {
        if (error.name === "AbortError" || error.status === 0 || error.status === 401) {
          say(`${added.toLocaleString("en")} documents added, then it ended at ${one.path}.`);
          throw error; // stopped, or nobody is there, or nobody is signed in: no other file would do better
        }
        fault(`${one.path}: ${error.message}`);
      }
    }
  } finally {
    bar.hidden = true;
    $("upload-stop").disabled = true;
  }
  $("upload").reset();
  const named = faults > SHOWN ? ` (the first ${SHOWN} are named)` : "";
  const others = all.length - files.length;
  const left = others ? ` ${others.toLocaleString("en")} files of other kinds were left out.` : "";
  say(`${added.toLocaleString("en")} documents added${faults ? `, ${faults.toLocaleString("en")} not used${named}:` : "."}${left}`);
  await list();
}

function startDropping() {
  const card = $("upload");
  const isOver = (event, is) => {
    event.preventDefault();
    card.classList.toggle("dropping", is);
  };
  card.ondragover = (event) => isOver(event, true);
  card.ondragleave = (event) => isOver(event, false);
  card.ondrop = (event) => {
    isOver(event, false);
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    if (entries.length) attempt(() => dropped(entries), card.querySelector("button"));
  };
}

async function reset() {
  if (!(await confirmed("Delete every document?", "There is no way back.", "Delete all"))) return;
  await call("POST", "/v1/documents/reset", { confirm: true });
  await list();
}

async function retrieve() {
  const start = performance.now();
  const weights = [Number($("weight-lexical").value), Number($("weight-dense").value)];
  const body = { query: $("query").value, k: Number($("query-k").value), mode: $("query-mode").value, weights };
  const found = await call("POST", "/v1/retrieve", body);
  const ms = Math.round(performance.now() - start);
  $("query-state").textContent = `${found.data.length} chunks in ${ms} ms, version ${found.index_version}${found.note ? `: ${found.note}` : ""}`;
  $("hits").replaceChildren(...found.data.map((hit) => neighbor(hit, true, body.query)));
}

function onSubmit(id, work) {
  $(id).onsubmit = (event) => {
    event.preventDefault();
    attempt(work, event.submitter);
  };
}

/** Weights are of hybrid mode alone; a library without vectors has one mode. */
function startModes(modes) {
  $("query-mode").replaceChildren(...modes.map((mode) => make("option", {}, mode)));
  const shown = () => document.querySelectorAll(".of-hybrid").forEach((part) => (part.hidden = $("query-mode").value !== "hybrid"));
  $("query-mode").onchange = shown;
  shown();
}

export function startLibrary(user, modes) {
  canWrite = user.scope !== "read";
  startModes(modes);
  startDropping();
  $("writing").hidden = !canWrite;
  document.querySelector(".split").classList.toggle("single", !canWrite);
  $("reset").hidden = user.scope !== "admin";
  onSubmit("add", add);
  onSubmit("upload", chosen);
  $("upload-stop").onclick = () => uploading?.abort();
  onSubmit("doc-search", () => search($("doc-query").value));
  onSubmit("query-form", retrieve);
  $("first-page").onclick = () => attempt(() => list());
  $("reset").onclick = () => attempt(reset);
}
