// The page: who is signed in, which screen is shown, what the server says of itself.

import { $, attempt, call, notice, setLibrary } from "./api.js";
import { showAsk, startAsk, stopAsk } from "./ask.js";
import { showChat, startChat, stopChat } from "./chat.js";
import { list, startLibrary } from "./library.js";
import { startPlayground, stopPlayground } from "./playground.js";
import { hideStatus, showApi, showStatus, startStatus, stopStatus } from "./status.js";

const SCREENS = ["ask", "chat", "playground", "documents", "retrieve", "status", "api"];
let model = null;
let user = null;
let setup = null; // the secret of a set-up link

function show(name) {
  for (const screen of ["sign-in", ...SCREENS]) $(`screen-${screen}`).hidden = screen !== name;
  for (const link of $("tabs").children) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${$(`${name}-title`).textContent} · retro-engine`;
}

/** A screen that this server has nothing for is not shown. */
function isThere(screen) {
  if (screen === "ask") return Boolean(model.retro.reader);
  if (screen === "chat") return model.retro.chat;
  return model.retro.library !== null || !["documents", "retrieve"].includes(screen);
}

function route() {
  notice("");
  hideStatus();
  if (!user) return show("sign-in");
  const asked = location.hash.slice(1);
  const first = SCREENS.find(isThere);
  const name = SCREENS.includes(asked) && isThere(asked) ? asked : first;
  show(name);
  window.scrollTo(0, 0);
  if (name === "ask") attempt(showAsk);
  if (name === "chat") showChat();
  if (name === "documents") attempt(() => list());
  if (name === "status") showStatus();
  if (name === "api") attempt(showApi);
  return undefined;
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
  if (isThere("chat")) startChat(model, user);
  startPlayground(model);
  startLibrary(user, model.retro.modes);
  startStatus(model, user);
  route();
  $("main").focus();
}

function leave() {
  user = null;
  stopPlayground();
  stopAsk();
  stopChat();
  stopStatus();
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
