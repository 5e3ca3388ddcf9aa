// The table of adapters: state, where each one is, what it does.

import { byId, h, setText } from "./dom.js";
import { ago, bytes, compact, count, hasRouter, variantName } from "./format.js";

const SHOWN = 100; // rows: thousands of adapters may lie in the folder
const TIERS = ["disk", "host", "slot"];
const TIER_WORDS = { disk: "on disk", host: "in host memory", slot: "in a slot of the engine" };
const RANK = { unloading: 0, loading: 0, loaded: 0, broken: 1, changing: 1, available: 2 };

class Row {
  constructor(name, isBase) {
    this.isBase = isBase;
    const tag = isBase ? h("strong", {}, name) : h("a", { href: `#experts/${encodeURIComponent(name)}` }, name);
    this.name = h("span", { class: "adapter-name" }, tag);
    this.variant = h("span", { class: "muted" });
    this.marks = h("span", { class: "marks" });
    this.state = h("span", { class: "pill" });
    this.tiers = h("span", { class: "tiers" }, ...TIERS.map((tier) => h("span", { class: "tier", "data-tier": tier }, tier)));
    this.tierWords = h("span", { class: "visually-hidden" });
    this.trouble = h("p", { class: "problem", hidden: true });
    const cells = ["bytes", "rate", "hits", "used"].map((kind) => (this[kind] = h("td", { class: `number cell-${kind}` })));
    this.element = h(
      "tr",
      {},
      h("th", { scope: "row" }, this.name, this.variant, this.marks, this.trouble),
      h("td", { class: "cell-state" }, this.state),
      h("td", { class: "cell-tiers" }, this.tiers, this.tierWords),
      ...cells,
    );
    this.tiers.setAttribute("aria-hidden", "true");
  }

  draw(item, rate, now) {
    setText(this.variant, this.isBase ? "Base model" : item.variant === null ? "" : variantName(item.variant));
    setText(this.state, item.state);
    this.state.className = `pill ${{ loaded: "good", broken: "bad", available: "" }[item.state] ?? "busy"}`;
    for (const tier of this.tiers.children) tier.classList.toggle("on", item.tiers.includes(tier.dataset.tier));
    this.tiers.hidden = this.isBase;
    setText(this.tierWords, this.isBase ? "" : item.tiers.map((tier) => TIER_WORDS[tier]).join(", "));
    setText(this.bytes, item.bytes ? bytes(item.bytes) : "");
    setText(this.rate, rate === undefined ? "" : compact(rate));
    setText(this.hits, this.isBase ? "" : count(item.hits));
    setText(this.used, this.isBase ? "" : ago(item.last_used, now));
    this.used.title = item.last_used ? new Date(item.last_used * 1000).toLocaleString() : "";
    const marks = [item.is_pinned && "pinned", item.is_changed && "files changed", item.old_revisions?.length && "old revision in use"].filter(Boolean);
    setText(this.marks, marks.join(" · "));
    const trouble = [item.error, ...(item.warnings ?? [])].filter(Boolean).join("\n");
    this.trouble.hidden = !trouble;
    setText(this.trouble, trouble);
  }
}

/** Adapters in the order that they are shown in: what is loaded first, then by name; only those that hold the filter's text. Pure. */
export function arrange(items, filter) {
  const wanted = items.filter((item) => item.id.toLowerCase().includes(filter.trim().toLowerCase()));
  return wanted.sort((a, b) => RANK[a.state] - RANK[b.state] || (a.id < b.id ? -1 : 1));
}

export class AdaptersPanel {
  #rows = new Map();
  #last = null;

  constructor() {
    byId("adapters-filter").addEventListener("input", () => this.#last && this.draw(...this.#last));
  }

  draw(items, version, latest) {
    this.#last = [items, version, latest];
    const now = Date.now() / 1000;
    const rates = latest?.byAdapter ?? new Map();
    const found = arrange([...items], byId("adapters-filter").value);
    const base = { id: version.base, state: "loaded", tiers: [], isBase: true };
    const shown = [base, ...found.slice(0, SHOWN)];
    const rows = shown.map((item) => {
      const key = item.isBase ? "base" : `adapter ${item.id}`;
      if (!this.#rows.has(key)) this.#rows.set(key, new Row(item.id, Boolean(item.isBase)));
      const row = this.#rows.get(key);
      row.draw(item, rates.get(item.id), now);
      return row;
    });
    this.#place(rows.map((row) => row.element));
    for (const [key, row] of this.#rows) if (!rows.includes(row)) this.#rows.delete(key);
    this.#summarise(items, latest);
    const rest = found.length - SHOWN;
    byId("adapters-more").hidden = rest <= 0;
    setText(byId("adapters-more"), rest > 0 ? `and ${count(rest)} more: filter by name to see them` : "");
  }

  /** The rows in order, moving none that stands where it should, for one of its links may have the focus. */
  #place(elements) {
    const body = byId("adapters");
    elements.forEach((element, index) => {
      if (body.children[index] !== element) body.insertBefore(element, body.children[index] ?? null);
    });
    while (body.children.length > elements.length) body.lastChild.remove();
  }

  #summarise(items, latest) {
    const loaded = items.filter((item) => item.state === "loaded").length;
    const parts = [`${count(loaded)} of ${count(items.length)} loaded`];
    const [filled, slots] = latest?.slots ?? [null, null];
    if (slots !== null) parts.push(`${filled} of ${slots} slots filled`);
    const [used, limit] = latest?.cache ?? [null, null];
    if (used !== null) parts.push(limit === null ? `${bytes(used)} cached` : `${bytes(used)} of ${bytes(limit)} cached`);
    setText(byId("adapters-summary"), parts.join(" · "));
  }
}

/** Adapters whose experts can be looked at. */
export function withRouters(items) {
  return items.filter((item) => item.state !== "broken" && hasRouter(item.variant) !== false);
}
