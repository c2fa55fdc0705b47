// The status screen: what is served and how it does, how a program connects, and who has access.

import { $, attempt, call, confirmed, copy, make } from "./api.js";

const EVERY_MS = 5000;
let user = null;
let model = ""; // its name
let timer = null;
let changing = null; // the user whose password the form changes

function facts(title, pairs) {
  const rows = pairs.filter(([, value]) => value !== undefined && value !== null)
    .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]);
  return make("section", { className: "card" }, make("h2", {}, title), make("dl", {}, ...rows));
}

const number = (value) => value.toLocaleString("en");

async function cards() {
  const [{ data }, health] = await Promise.all([call("GET", "/v1/models"), call("GET", "/health")]);
  const about = data[0].retro;
  const found = [
    facts("Model", [["name", data[0].id], ["reader", about.reader], ["parameters", number(about.parameters)], ["vocabulary", number(about.vocab_size)],
      ["chunk", `${about.chunk_size} tokens`], ["neighbors a chunk", about.num_neighbors], ["tokens a neighbor", about.retrieved_length]]),
    facts("Engine", [["state", health.status], ...Object.entries(about.engine).map(([name, value]) => [name.replaceAll("_", " "), number(value)])]),
  ];
  if (about.library !== null) {
    const { statistics, index_version: version } = await call("GET", "/v1/documents?limit=1");
    const { documents = 0, chunks = 0, tokens = 0 } = statistics;
    found.push(facts("Documents", [["documents", number(documents)], ["chunks", number(chunks)], ["tokens", number(tokens)], ["version", version],
      ["published stores", about.stores.join(", ") || "none"], ["followed", statistics.followed.map((one) => `${one.folder}: ${number(one.files)} files, ${one.state}`).join("; ") || undefined],
      ["notes", statistics.notes.join("; ") || undefined]]));
  }
  found.push(facts("You", [["name", user.name], ["scope", user.scope]]));
  $("status-cards").replaceChildren(...found);
}

/** How a program reaches this server, with a key that was made just now. */
function connect(key = "rk_...") {
  const base = new URL("v1", location.href.replace(/#.*/, "")).href;
  $("connect-code").textContent = `from openai import OpenAI\n\nclient = OpenAI(base_url="${base}", api_key="${key}")\nout = client.chat.completions.create(model="${model}",\n    messages=[{"role": "user", "content": "Hello"}])\nprint(out.choices[0].message.content)`;
  const made = user.scope === "admin" ? "A key is made below." : "An admin makes the key.";
  $("connect-hint").textContent = key === "rk_..." ? `Any client of OpenAI’s form, at ${base}. ${made}` : "This key is shown this once: copy it now.";
  $("connect-copy").onclick = (event) => attempt(() => copy($("connect-code").textContent), event.currentTarget);
}

function table(heads, rows) {
  const head = [...heads.map((name) => make("th", { scope: "col" }, name)), make("th", {}, make("span", { className: "hidden" }, "Actions"))];
  return make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

function action(name, label, isDanger, work) {
  const found = make("button", { type: "button", className: isDanger ? "danger quiet" : "quiet", onclick: (event) => attempt(work, event.currentTarget) }, name);
  found.setAttribute("aria-label", label);
  return found;
}

async function remove(kind, name, path) {
  if (!(await confirmed(`Remove this ${kind}?`, name, "Remove"))) return;
  await call("DELETE", path);
  await access();
}

function cell(...content) {
  return make("td", {}, ...content);
}

function keyRow(key) {
  const until = key.expires === null ? "for ever" : new Date(1000 * key.expires).toISOString().slice(0, 10);
  const drop = action("Remove", `Remove the key ${key.name}`, true, () => remove("key", key.name, `/auth/keys/${encodeURIComponent(key.id)}`));
  return make("tr", {}, cell(key.name), cell(key.scope), cell(until), make("td", { className: "number" }, drop));
}

function userRow(one) {
  const change = action("New password", `New password for ${one.name}`, false, () => edit(one));
  const drop = one.name === user.name ? null
    : action("Remove", `Remove the user ${one.name}`, true, () => remove("user", one.name, `/auth/users/${encodeURIComponent(one.name)}`));
  return make("tr", {}, cell(one.name), cell(one.scope), make("td", { className: "number" }, change, " ", drop));
}

/** The form makes a user, or (`one`) gives one a new password. */
function edit(one) {
  changing = one?.name ?? null;
  $("user-title").textContent = one ? `New password for ${one.name}` : "Add a user";
  $("user-name").value = one?.name ?? "";
  $("user-name").readOnly = Boolean(one);
  $("user-scope").value = one?.scope ?? "read";
  $("user-scope").disabled = one?.name === user.name;
  $("user-cancel").hidden = !one;
  $("user-submit").textContent = one ? "Change" : "Add";
  $("user-password").value = "";
  if (one) $("user-password").focus();
}

async function access() {
  const [keys, users] = await Promise.all([call("GET", "/auth/keys"), call("GET", "/auth/users")]);
  const none = make("p", { className: "hint" }, "There are no keys yet.");
  $("key-list").replaceChildren(keys.data.length ? table(["Name", "Scope", "Valid"], keys.data.map(keyRow)) : none);
  $("user-list").replaceChildren(table(["Name", "Scope"], users.data.map(userRow)));
}

async function makeKey() {
  const body = { name: $("key-name").value, scope: $("key-scope").value };
  if ($("key-days").value) body.days = Number($("key-days").value);
  const { key } = await call("POST", "/auth/keys", body);
  $("key-form").reset();
  connect(key);
  $("connect").scrollIntoView({ block: "nearest" });
  await access();
}

async function saveUser() {
  const body = { password: $("user-password").value, scope: $("user-scope").value };
  if (changing === null) await call("POST", "/auth/users", { name: $("user-name").value, ...body });
  else await call("POST", `/auth/users/${encodeURIComponent(changing)}`, body);
  const isOwn = changing === user.name;
  edit(null);
  if (isOwn) document.dispatchEvent(new CustomEvent("signed-out")); // the session has ended with the old password
  else await access();
}

/** What a field may be, in a few words. */
function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return [...new Set(several.map((one) => kind(one)))].join(" | ");
  return schema.type === "array" ? `list of ${kind(schema.items ?? {})}` : schema.type ?? "any";
}

function fields(schema, known) {
  const forms = (schema.anyOf ?? [schema]).map((one) => (one.$ref ? known[one.$ref.split("/").at(-1)] : one));
  const rows = forms.flatMap((form) => Object.entries(form.properties ?? {}).map(([name, one]) => make("tr", {},
    make("td", {}, form.required?.includes(name) ? make("strong", {}, name) : name), make("td", { className: "title" }, kind(one)))));
  return rows.length ? make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Field (bold: needed)"),
    make("th", { scope: "col" }, "Is"))), make("tbody", {}, ...rows)) : null;
}

/** Every route, as the server describes them. */
export async function showApi() {
  const about = await call("GET", "/openapi.json");
  const known = about.components.schemas;
  const found = Object.entries(about.paths).flatMap(([path, methods]) => Object.entries(methods).map(([method, one]) => {
    const body = Object.values(one.requestBody?.content ?? {})[0]?.schema;
    const head = make("summary", {}, make("code", {}, `${method.toUpperCase()} ${path}`), ` ${one.summary}`);
    return make("details", {}, head, make("p", { className: "hint" }, one.description), body ? fields(body, known) : null);
  }));
  $("routes").replaceChildren(...found);
}

export function showStatus() {
  connect();
  attempt(cards);
  timer = setInterval(() => attempt(cards), EVERY_MS);
  if (user.scope === "admin") attempt(access);
}

export function hideStatus() {
  clearInterval(timer);
}

export function startStatus(served, who) {
  user = who;
  model = served.id;
  $("access").hidden = user.scope !== "admin";
  edit(null);
  for (const [id, work] of [["key-form", makeKey], ["user-form", saveUser]]) {
    $(id).onsubmit = (event) => {
      event.preventDefault();
      attempt(work, event.submitter);
    };
  }
  $("user-cancel").onclick = () => edit(null);
}

export function stopStatus() {
  hideStatus();
  for (const id of ["status-cards", "key-list", "user-list", "connect-code", "routes"]) $(id).replaceChildren();
}
