// The heat map of one adapter: what its routers did with live traffic, layer by layer and expert by expert.

import { withRouters } from "./adapters.js";
import { byId, h, setOptions, setText } from "./dom.js";
import { compact, count, DASH, percent } from "./format.js";
import { Heatmap, Legend } from "./heatmap.js";
import { comparedBy, gridOfReport } from "./routing.js";
import { paintLegend, scaleOf, spanOf } from "./scales.js";

const CAPTIONS = {
  weight: "The router’s mean weight for each expert; tokens that did not keep it count as 0.",
  selected: "Share of tokens that kept each expert.",
  computed: "Share of tokens that each expert was computed for.",
};
const COMPARED = { weight: "Mean weight", selected: "Share of tokens that kept each expert" };

export class ExpertsView {
  #map = new Heatmap({ label: "Experts by layers", hint: "Point at a cell, or walk with the arrow keys." });
  #legend = new Legend(
    h("span", { class: "legend-key" }, h("span", { class: "swatch dead" }), "dead: no token kept it"),
    h("span", { class: "legend-key" }, h("span", { class: "swatch unknown" }), "not known"),
  );
  #report = null;
  #wanted = null;

  constructor(client) {
    this.client = client;
    byId("experts-map").append(this.#map.element);
    byId("experts-legend").append(this.#legend.element);
    byId("experts-adapter").addEventListener("change", (event) => {
      location.hash = `#experts/${encodeURIComponent(event.target.value)}`; // which shows it
    });
    for (const id of ["experts-measure", "experts-stretch"]) byId(id).addEventListener("change", () => this.#draw());
    byId("experts-numbers").addEventListener("change", (event) => this.#map.element.classList.toggle("with-numbers", event.target.checked));
  }

  /** Of which adapter; its report comes with the next refresh. */
  choose(name) {
    this.#wanted = name;
    const select = byId("experts-adapter");
    if ([...select.options].some((option) => option.value === name)) select.value = name;
  }

  setAdapters(items) {
    const routed = withRouters(items).sort((a, b) => (b.last_used ?? 0) - (a.last_used ?? 0)).map((item) => item.id);
    const names = items.map((item) => item.id);
    const select = byId("experts-adapter");
    this.#wanted ??= routed[0] ?? names[0] ?? null; // who was used last, to begin with
    const rest = names.filter((name) => !routed.includes(name)).sort();
    const entries = routed.toSorted().map((name) => [name, name]);
    setOptions(select, rest.length ? [...entries, { group: "without a router, or broken", options: rest.map((name) => [name, name]) }] : entries);
    if (this.#wanted !== null && names.includes(this.#wanted)) select.value = this.#wanted;
  }

  async refresh() {
    const name = this.#wanted;
    if (name === null) {
      this.#fail("There is no adapter yet: put a folder into the adapters directory.");
      return;
    }
    try {
      const report = await this.client.json(`v1/adapters/${encodeURIComponent(name)}/experts`);
      if (name !== this.#wanted) return;
      this.#report = report;
      this.#fail(null);
      this.#draw();
    } catch (error) {
      if (error.status === 401) throw error;
      if (name === this.#wanted) this.#fail(error.message);
    }
  }

  #fail(message) {
    byId("experts-error").hidden = message === null;
    setText(byId("experts-error"), message ?? "");
    byId("experts-report").hidden = message !== null;
  }

  #draw() {
    const report = this.#report;
    if (report === null) return;
    const measure = document.querySelector('input[name="measure"]:checked').value;
    const isSigned = measure === "difference";
    const grid = gridOfReport(report, measure);
    const isStretched = byId("experts-stretch").checked;
    const values = grid.cells.flat().map((cell) => cell?.value ?? null);
    const span = isStretched ? spanOf(values, { isDiverging: isSigned }) : { from: isSigned ? -1 : 0, to: 1 };
    const scale = scaleOf({ ...span, isDiverging: isSigned });
    this.#map.draw(grid, scale, { isSigned });
    this.#legend.draw(scale, paintLegend, caption(report, measure));
    setText(byId("experts-caption"), caption(report, measure));
    this.#drawFacts(report);
    this.#drawDead(report);
  }

  #drawFacts(report) {
    const facts = [
      ["Tokens", compact(report.tokens), "since this revision was loaded"],
      ["Experts skipped", percent(report.skipped, 1), "of evaluations of experts"],
      ["Drift", report.drift === null ? DASH : report.drift.toFixed(3), report.drift === null ? "no training profile, or too few tokens" : "from training; 0 is none, 1 is all"],
      ["Dead experts", report.dead === null ? DASH : count(report.dead.length), report.dead === null ? "known from 1,000 tokens on" : "that no token kept"],
      ["Revision", report.revision.slice(0, 12), ""],
    ];
    byId("experts-facts").replaceChildren(
      ...facts.map(([name, value, about]) => h("div", {}, h("dt", {}, name), h("dd", { class: name === "Revision" ? "revision" : null }, value), about ? h("dd", { class: "muted" }, about) : null)),
    );
  }

  #drawDead(report) {
    const place = byId("experts-dead");
    if (!report.dead?.length) {
      place.replaceChildren();
      return;
    }
    const byExpert = Map.groupBy(report.dead, ({ expert }) => expert);
    const items = [...byExpert].map(([expert, found]) => h("li", {}, h("strong", {}, expert), ` in layer ${found.map(({ layer }) => layer).join(", ")}`));
    const isOpen = place.querySelector("details")?.open ?? false;
    place.replaceChildren(h("details", { open: isOpen }, h("summary", {}, `${count(report.dead.length)} dead experts`), h("ul", {}, ...items)));
  }
}

function caption(report, measure) {
  if (measure !== "difference") return CAPTIONS[measure];
  const compared = comparedBy(report);
  if (compared === null) return "This adapter has no profile of its training to compare with.";
  return `${COMPARED[compared]}, less what it was in training: violet is more than in training, orange is less.`;
}
