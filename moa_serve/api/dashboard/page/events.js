// What happened to adapters, as the server tells it: a list that grows at the top.

import { byId, h } from "./dom.js";
import { eventsOf } from "./sse.js";

const KEPT = 30;
const WORDS = {
  available: "was found", changing: "is being written", broken: "cannot be loaded", loading: "is being loaded", loaded: "was loaded",
  reloaded: "was replaced", load_failed: "failed to load", unloaded: "was unloaded", evicted: "left memory", removed: "is gone from the folder",
  pinned: "was pinned", unpinned: "was unpinned", alias_set: "stands for", alias_removed: "is no alias any more",
};
const RETRY_SECONDS = 15; // after the server refused or ended it

/** What an event says, in words. Pure. */
export function wordsOf(kind, data) {
  const more = data.error ?? (data.targets ? Object.entries(data.targets).map(([name, share]) => `${name} (${share})`).join(", ") : "");
  const revision = data.revision ? ` as ${data.revision.slice(0, 8)}` : "";
  return `${WORDS[kind] ?? kind}${kind === "loaded" || kind === "reloaded" ? revision : ""}${more ? `: ${more}` : ""}`;
}

export class EventsPanel {
  #lastId = "0"; // so the first connection brings what the server remembers
  #controller = null;
  #retryAt = 0;

  /** `onEvent` is called after each batch: something about the adapters is another now. */
  constructor(client, onEvent) {
    this.client = client;
    this.onEvent = onEvent;
    byId("events").append(h("li", { class: "muted" }, "Nothing yet."));
  }

  /** Listens, unless it does already. */
  listen() {
    if (this.#controller || Date.now() < this.#retryAt) return;
    this.#controller = new AbortController();
    void this.#read(this.#controller.signal);
  }

  stop() {
    this.#controller?.abort();
  }

  async #read(signal) {
    try {
      const response = await this.client.send("v1/adapters/events", { headers: { "Last-Event-ID": this.#lastId }, signal });
      for await (const event of eventsOf(response.body)) this.#show(event);
    } catch {
      // Whether the server is there, other requests tell.
    } finally {
      this.#controller = null;
      this.#retryAt = signal.aborted ? 0 : Date.now() + RETRY_SECONDS * 1000;
    }
  }

  #show({ kind, data, id }) {
    if (Number(id) < Number(this.#lastId)) byId("events").replaceChildren(); // the server began anew
    this.#lastId = id;
    const told = JSON.parse(data);
    const at = new Date(told.time * 1000);
    const list = byId("events");
    list.querySelector(".muted")?.remove();
    list.prepend(
      h("li", {}, h("time", { datetime: at.toISOString() }, at.toLocaleTimeString()), h("span", {}, h("strong", {}, told.name), ` ${wordsOf(kind, told)}`)),
    );
    while (list.children.length > KEPT) list.lastChild.remove();
    this.onEvent();
  }
}
