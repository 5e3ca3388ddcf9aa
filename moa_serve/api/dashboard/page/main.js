// The page put together: what is asked of the server and when, who draws it, which view is shown.

import { AdaptersPanel } from "./adapters.js";
import { Client } from "./client.js";
import { byId, setText } from "./dom.js";
import { EventsPanel } from "./events.js";
import { ExpertsView } from "./experts.js";
import { History, QUERY } from "./history.js";
import { setUpKeyDialog } from "./key.js";
import { LivePanel } from "./live.js";
import { Playground } from "./playground.js";
import { parseMetrics } from "./prometheus.js";

const EVERY_SECONDS = 2;
const VIEWS = ["live", "experts", "playground"];

const client = new Client();
const history = new History();
const live = new LivePanel(byId("tiles"));
const adapters = new AdaptersPanel();
const experts = new ExpertsView(client);
const playground = new Playground(client);
const events = new EventsPanel(client, () => {
  if (performance.now() - refreshedAt > EVERY_SECONDS * 1000) void refresh(); // else the timer soon does: adapters may come and go all the time
});
const keyDialog = setUpKeyDialog(client, () => void refresh());

let base = null; // of /version, which does not change
let [isBusy, isWanted] = [false, false];
let refreshedAt = 0;

const view = () => {
  const [name] = location.hash.slice(1).split("/");
  return VIEWS.includes(name) ? name : "live";
};

/** Everything that the shown view needs, asked once; while that is under way, another wish is kept for after it. */
async function refresh() {
  if (isBusy) {
    isWanted = true;
    return;
  }
  isBusy = true;
  refreshedAt = performance.now();
  try {
    showHealth(await client.health());
    if (!keyDialog.isOpen) await refreshData();
  } finally {
    isBusy = false;
  }
  if (isWanted) {
    isWanted = false;
    void refresh();
  }
}

async function refreshData() {
  try {
    base ??= showBase(await client.json("version"));
    const [page, listed] = await Promise.all([client.text(`metrics?${QUERY}`), client.json("v1/adapters")]);
    history.add(parseMetrics(page), performance.now() / 1000);
    live.draw(history);
    adapters.draw(listed.data, base, history.latest);
    experts.setAdapters(listed.data);
    playground.setModels(listed.data, base.base, (await client.json("v1/models")).data);
    if (view() === "experts") await experts.refresh();
    events.listen();
    showNotice(null);
  } catch (error) {
    showNotice(error.status === 401 ? "What this server knows is behind an API key: press the key above to type one." : error.message);
  }
}

function showBase(version) {
  setText(byId("base"), `${version.base} · ${version.backend} · ${version.dtype} · ${version.max_model_len.toLocaleString("en")} tokens`);
  document.title = `${version.base} · moa_serve`;
  return version;
}

function showHealth({ isReady, message }) {
  const pill = byId("health");
  pill.className = `pill ${isReady ? "good" : "bad"}`;
  setText(pill, isReady ? "ready" : message.split(";")[0]);
  pill.title = message;
}

function showNotice(message) {
  byId("notice").hidden = message === null;
  setText(byId("notice"), message ?? "");
}

function showView() {
  const shown = view();
  for (const name of VIEWS) byId(`view-${name}`).hidden = name !== shown;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${shown}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const [, encoded] = location.hash.split("/");
  if (shown === "experts" && encoded) experts.choose(decoded(encoded));
  void refresh();
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // an address that somebody typed
  }
}

function setUpTheme() {
  const button = byId("theme");
  const isDark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const show = () => button.setAttribute("aria-label", isDark() ? "Use the light theme" : "Use the dark theme");
  button.addEventListener("click", () => {
    const chosen = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = chosen;
    try {
      localStorage.setItem("moa-serve theme", chosen);
    } catch {
      // Without storage it holds until the page is left.
    }
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}

/** Looks at the server again and again, while somebody can see it. */
async function keepLooking() {
  for (;;) {
    const started = performance.now();
    if (document.visibilityState === "visible") await refresh();
    const took = (performance.now() - started) / 1000;
    await new Promise((resolve) => setTimeout(resolve, 1000 * Math.max(EVERY_SECONDS - took, 5 * took))); // a server at its limit is left more time
  }
}

setUpTheme();
addEventListener("hashchange", showView);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // its address is no view
  byId("main").focus();
});
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible") void refresh();
  else events.stop();
});
showView();
void keepLooking();
