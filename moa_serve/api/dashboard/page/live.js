// The tiles of the live view, and the bar that says where a step's time goes.

import { byId, h, setText } from "./dom.js";
import { compact, DASH, duration, percent } from "./format.js";
import { KEPT_SECONDS } from "./history.js";
import { Sparkline } from "./sparkline.js";

const GAP_SECONDS = 8; // without a scrape: then the line is broken
const LEAST_SECONDS = 60; // that a line's picture spans, however short the history is

const time = (value) => duration(value).join(" ").trim();
const whole = (value) => [value === null ? DASH : String(Math.round(value)), ""];

// Of each: its series (the first is the number that is shown large), how they are written, and what stands below.
const TILES = [
  { name: "Requests", of: (m) => [m.requests], big: (v) => [compact(v), "/s"], text: (v) => `${compact(v)}/s`, least: 1, more: (m) => (m.failed ? `${compact(m.failed)}/s failed` : "none failed") },
  { name: "Tokens", of: (m) => [m.generated], big: (v) => [compact(v), "/s"], text: (v) => `${compact(v)}/s`, least: 10, more: (m) => `prompts ${compact(m.prompt)}/s` },
  { name: "Time to first token", of: (m) => m.ttft, big: duration, text: time, least: 0.01, names: ["p50", "p95"] },
  { name: "Between tokens", of: (m) => m.gap, big: duration, text: time, least: 0.002, names: ["p50", "p95"] },
  { name: "Running rows", of: (m) => [m.running, m.waiting], big: whole, text: (v) => whole(v)[0], least: 4, names: ["running", "waiting"] },
  { name: "KV cache held", of: (m) => [m.held], big: (v) => percent(v, 1).split(" "), text: (v) => percent(v, 1), least: 0.1, more: (m) => `${percent(m.kept)} more kept for reuse` },
  { name: "Experts skipped", of: (m) => [m.skipped], big: (v) => percent(v).split(" "), text: (v) => percent(v), least: 0.5, more: () => "of all evaluations" },
  { name: "Engine step", of: (m) => m.step, big: duration, text: time, least: 0.005, names: ["p50", "p95"], more: (m) => (m.rows === null ? "" : `${compact(m.rows)} rows a step`) },
];

class Tile {
  #picked = null;
  #moments = [];

  constructor(spec) {
    this.spec = spec;
    this.number = h("span", { class: "tile-number" });
    this.unit = h("span", { class: "tile-unit" });
    this.series = (spec.names ?? []).map((_, index) => h("span", { class: `series series-${index}` }));
    this.rest = h("span");
    const numSeries = spec.names?.length ?? 1;
    this.spark = new Sparkline(numSeries, (index) => {
      this.#picked = index === null ? null : this.#moments[index];
      this.#write();
    });
    this.element = h("article", { class: "tile" }, h("h3", {}, spec.name), h("p", { class: "tile-value" }, this.number, this.unit), h("p", { class: "tile-more" }, ...this.series, this.rest), this.spark.element);
  }

  draw(moments, now) {
    this.#moments = moments;
    const points = moments.map((moment) => ({ time: moment.time, values: this.spec.of(moment) }));
    const known = points.map(({ values }) => values[0]).filter((value) => value !== null);
    const label = known.length
      ? `${this.spec.name}, the last minutes: ${this.spec.text(Math.min(...known))} to ${this.spec.text(Math.max(...known))}`
      : `${this.spec.name}: nothing yet`;
    const spans = Math.min(KEPT_SECONDS, Math.max(LEAST_SECONDS, now - (moments[0]?.time ?? now)));
    this.spark.draw(points, { from: now - spans, to: now, gap: GAP_SECONDS, least: this.spec.least, label });
    this.#write();
  }

  #write() {
    const latest = this.#moments.at(-1) ?? null;
    const shown = this.#picked && this.#moments.includes(this.#picked) ? this.#picked : latest;
    if (shown === null) {
      setText(this.number, DASH);
      return;
    }
    const { spec } = this;
    const values = spec.of(shown);
    const [number, unit] = spec.big(values[0]);
    setText(this.number, number);
    setText(this.unit, number === DASH ? "" : (unit ?? ""));
    const ago = shown === latest ? null : `${Math.round(latest.time - shown.time)} s ago`;
    (spec.names ?? []).forEach((name, index) => setText(this.series[index], index ? `${name} ${spec.text(values[index])}` : name));
    const parts = [spec.more?.(shown), ago].filter(Boolean);
    setText(this.rest, (spec.names && parts.length ? " · " : "") + parts.join(" · "));
  }
}

const PARTS = ["base", "attention", "router", "experts", "head", "sampling", "other"];

export class LivePanel {
  #tiles = TILES.map((spec) => new Tile(spec));
  #parts = new Map();
  #bar = h("div", { class: "parts-bar", "aria-hidden": true });
  #list = h("dl", { class: "parts-list" });

  constructor(place) {
    place.append(...this.#tiles.map((tile) => tile.element));
    byId("parts").append(this.#bar, this.#list);
  }

  draw(history) {
    const now = history.latest?.time ?? 0;
    for (const tile of this.#tiles) tile.draw(history.moments, now);
    this.#drawParts(history.moments.findLast((moment) => moment.parts.length)?.parts ?? []);
  }

  /** What was last known of it: an idle server times no steps. */
  #drawParts(parts) {
    byId("step-panel").hidden = !parts.length;
    const shares = new Map(parts);
    for (const name of [...PARTS, ...shares.keys()]) {
      if (!this.#parts.has(name)) {
        const kind = PARTS.includes(name) ? name : "other";
        const [piece, value] = [h("span", { class: `part part-${kind}` }), h("dd")];
        this.#bar.append(piece);
        this.#list.append(h("div", {}, h("dt", {}, h("span", { class: `swatch part-${kind}` }), name), value));
        this.#parts.set(name, { piece, value });
      }
      const { piece, value } = this.#parts.get(name);
      piece.style.flexGrow = shares.get(name) ?? 0;
      setText(value, percent(shares.get(name) ?? 0, 1));
    }
  }
}
