// The page: who is signed in, which screen is shown, what the server says of itself.

import { $, attempt, call, make, notice, setLibrary } from "./api.js";
import { showAsk, startAsk, stopAsk } from "./ask.js";
import { list, startLibrary } from "./library.js";
import { startPlayground, stopPlayground } from "./playground.js";

const SCREENS = ["ask", "playground", "documents", "retrieve", "status"];
let model = null;
let user = null;
let setup = null; // the secret of a set-up link
let timer = null;

function show(name) {
  for (const screen of ["sign-in", ...SCREENS]) $(`screen-${screen}`).hidden = screen !== name;
  for (const link of $("tabs").children) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = name === "sign-in" ? "Sign in · retro-engine" : `${name[0].toUpperCase()}${name.slice(1)} · retro-engine`;
}

/** A screen that this server has nothing for is not shown. */
function isThere(screen) {
  if (screen === "ask") return Boolean(model.retro.reader);
  return model.retro.library !== null || !["documents", "retrieve"].includes(screen);
}

function route() {
  notice("");
  clearInterval(timer);
  if (!user) return show("sign-in");
  const asked = location.hash.slice(1);
  const first = model.retro.reader ? "ask" : "playground";
  const name = SCREENS.includes(asked) && isThere(asked) ? asked : first;
  show(name);
  if (name === "ask") attempt(showAsk);
  if (name === "documents") attempt(() => list());
  if (name === "status") {
    attempt(status);
    timer = setInterval(() => attempt(status), 5000);
  }
  return undefined;
}

function facts(title, pairs) {
  const rows = pairs.filter(([, value]) => value !== undefined && value !== null)
    .flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]);
  return make("section", { className: "card" }, make("h2", {}, title), make("dl", {}, ...rows));
}

/** How a program reaches this server. */
function connect(name) {
  const base = new URL("v1", location.href.replace(/#.*/, "")).href;
  const code = `from openai import OpenAI\n\nclient = OpenAI(base_url="${base}", api_key="rk_...")\nout = client.chat.completions.create(model="${name}",\n    messages=[{"role": "user", "content": "Hello"}])\nprint(out.choices[0].message.content)`;
  return make("section", { className: "card" }, make("h2", {}, "Connect"),
    make("p", { className: "hint" }, "Any client of OpenAI's form. A key is made where the server runs: retro keys add NAME --scope read"),
    make("pre", { tabIndex: 0 }, code));
}

async function status() {
  const [{ data }, health] = await Promise.all([call("GET", "/v1/models"), call("GET", "/health")]);
  const about = data[0].retro;
  const cards = [
    facts("Model", [["name", data[0].id], ["reader", about.reader], ["parameters", about.parameters.toLocaleString("en")], ["vocabulary", about.vocab_size.toLocaleString("en")],
      ["chunk", `${about.chunk_size} tokens`], ["neighbors a chunk", about.num_neighbors], ["tokens a neighbor", about.retrieved_length]]),
    facts("Engine", [["state", health.status], ...Object.entries(about.engine).map(([name, value]) => [name.replaceAll("_", " "), value.toLocaleString("en")])]),
  ];
  if (about.library !== null) {
    const { statistics, index_version: version } = await call("GET", "/v1/documents?limit=1");
    const { documents = 0, chunks = 0, tokens = 0 } = statistics;
    cards.push(facts("Documents", [["documents", documents.toLocaleString("en")], ["chunks", chunks.toLocaleString("en")],
      ["tokens", tokens.toLocaleString("en")], ["version", version], ["published stores", about.stores.join(", ") || "none"],
      ["notes", statistics.notes.join("; ") || undefined]]));
  }
  cards.push(facts("You", [["name", user.name], ["scope", user.scope]]), connect(data[0].id));
  $("status-cards").replaceChildren(...cards);
}

async function enter(found) {
  user = found;
  $("who-name").textContent = user.name;
  try {
    model = (await call("GET", "/v1/models")).data[0];
  } catch (error) {
    if (error.status !== 503) throw error;
    notice("The model is loading…");
    setTimeout(() => attempt(() => enter(found)), 1000);
    return;
  }
  for (const id of ["tabs", "who"]) $(id).hidden = false;
  setLibrary(model.retro.library);
  for (const link of $("tabs").children) link.hidden = !isThere(link.hash.slice(1));
  startAsk(user);
  startPlayground(model);
  startLibrary(user, model.retro.modes);
  route();
  $("main").focus();
}

function leave() {
  user = null;
  stopPlayground();
  stopAsk();
  for (const id of ["tabs", "who"]) $(id).hidden = true;
  route();
  $("name").focus();
}

async function signIn() {
  $("sign-in-error").hidden = true;
  const body = { name: $("name").value, password: $("password").value };
  if (setup) body.setup = setup;
  try {
    const { user: found } = await call("POST", "/auth/login", body);
    $("sign-in").reset();
    asFirst(null);
    await enter(found);
  } catch (error) {
    $("sign-in-error").textContent = error.message;
    $("sign-in-error").hidden = false;
    $("password").select();
  }
}

/** With the secret of a set-up link the form makes the first user. */
function asFirst(secret) {
  setup = secret;
  $("sign-in-title").textContent = secret ? "Make the first user" : "Sign in";
  $("password").autocomplete = secret ? "new-password" : "current-password";
  $("password").minLength = secret ? 10 : 1;
  $("sign-in-hint").hidden = !secret;
  $("sign-in-hint").textContent = secret ? "This link works once. Take a password of ten characters or more." : "";
}

async function start() {
  const link = /^#setup=([\w-]+)$/.exec(location.hash);
  if (link) {
    asFirst(link[1]);
    history.replaceState(null, "", location.pathname);
  }
  $("sign-in").onsubmit = (event) => {
    event.preventDefault();
    attempt(signIn, event.submitter);
  };
  $("sign-out").onclick = () => attempt(async () => {
    await call("POST", "/auth/logout");
    leave();
  });
  window.addEventListener("hashchange", route);
  document.addEventListener("signed-out", () => {
    if (user) leave();
  });
  const me = await call("GET", "/auth/me");
  if (me.user && me.user.kind === "user" && !setup) return enter(me.user);
  if (me.needs_setup && !setup) {
    $("sign-in-hint").hidden = false;
    $("sign-in-hint").textContent = "Nobody has access yet: open the set-up link that the server printed when it started.";
  }
  show("sign-in");
  $("name").focus();
  return undefined;
}

attempt(start);
