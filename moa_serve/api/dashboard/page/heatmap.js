// A table of experts by layers whose cells have colours: read as a table by who listens, walked with the arrow keys, pointed at by who looks.

import { h, setText } from "./dom.js";
import { DASH, weight } from "./format.js";
import { meanOf, targetOf } from "./routing.js";
import { paint } from "./scales.js";

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export class Heatmap {
  #shape = "";
  #cells = []; // [expert][layer], null where there is none
  #means = []; // of each expert over the layers
  #totals = []; // of each layer over the experts
  #grid = { experts: [], layers: [], cells: [] };
  #active = [0, 0];
  #hint;

  /**
   * @param label what the table is, for who listens.
   * @param hint what stands below it while no cell is pointed at.
   */
  constructor({ label, hint = "", isSmall = false }) {
    this.#hint = hint;
    this.table = h("table", { class: isSmall ? "heat heat-small" : "heat", role: "grid", "aria-label": label });
    this.readout = h("p", { class: "readout" });
    this.element = h("div", { class: "heat-box" }, h("div", { class: "heat-scroll" }, this.table), this.readout);
    this.table.addEventListener("pointerover", (event) => this.#tell(event.target.closest("td[data-at]")));
    this.table.addEventListener("pointerleave", () => this.#tell(null));
    this.table.addEventListener("focusin", (event) => this.#focus(event.target.closest("td[data-at]")));
    this.table.addEventListener("focusout", () => this.#tell(null));
    this.table.addEventListener("keydown", (event) => this.#walk(event));
    this.#tell(null);
  }

  /** Shows a grid of routing.js; `isSigned`: its values are differences. */
  draw(grid, scale, { isSigned = false } = {}) {
    this.#grid = grid;
    const shape = JSON.stringify([grid.experts, grid.layers, grid.cells.map((row) => row.map(Boolean))]);
    if (shape !== this.#shape) this.#build(grid);
    this.#shape = shape;
    grid.experts.forEach((expert, row) => {
      grid.layers.forEach((layer, column) => this.#fill(this.#cells[row][column], grid.cells[row][column], scale, `${expert}, layer ${layer}`));
      const mean = meanOf(grid.cells[row].map((cell) => cell?.value));
      setText(this.#means[row], mean === null ? DASH : weight(mean, { isSigned }));
    });
    grid.layers.forEach((_, column) => {
      const mean = meanOf(grid.cells.map((row) => row[column]?.value));
      paint(this.#totals[column], scale, mean);
      this.#totals[column].classList.toggle("unknown", mean === null);
      setText(this.#totals[column].firstChild, mean === null ? DASH : weight(mean, { isSigned }));
    });
    this.#tell(this.table.querySelector("td[data-at]:hover") ?? this.table.querySelector("td[data-at]:focus"));
  }

  #fill(td, cell, scale, where) {
    if (cell === null) return;
    paint(td, scale, cell.value);
    td.classList.toggle("unknown", cell.value === null);
    td.classList.toggle("off", cell.isOff);
    td.classList.toggle("dead", cell.isDead);
    td.dataset.value = cell.value ?? "";
    td.setAttribute("aria-label", `${where}: ${cell.about}`);
    setText(td.firstChild, cell.text);
  }

  #build({ experts, layers, cells }) {
    const isLong = layers.length > 20;
    const head = layers.map((layer) => h("th", { scope: "col", class: isLong && layer % 5 ? "minor" : null }, layer));
    this.#means = experts.map(() => h("td", { class: "mean" }));
    this.#cells = [];
    const rows = experts.map((expert, row) => {
      const isFirst = row > 0 && targetOf(expert) !== targetOf(experts[row - 1]) && experts.some((name) => name !== targetOf(name));
      const tds = layers.map((_, column) => {
        if (cells[row][column] === null) return h("td", { class: "none" });
        return h("td", { class: "cell", "data-at": `${row} ${column}`, tabindex: -1 }, h("span"));
      });
      this.#cells.push(tds);
      return h("tr", { class: isFirst ? "group" : null }, h("th", { scope: "row" }, expert), ...tds, this.#means[row]);
    });
    this.#totals = layers.map(() => h("td", { class: "cell" }, h("span")));
    this.table.classList.toggle("many", experts.length > 12);
    this.table.style.setProperty("--layers", layers.length);
    this.table.replaceChildren(
      h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "corner" }, "layer"), ...head, h("th", { scope: "col", class: "mean" }, "mean"))),
      h("tbody", {}, ...rows),
      h("tfoot", {}, h("tr", {}, h("th", { scope: "row" }, "mean"), ...this.#totals, h("td", { class: "mean" }))),
    );
    const [row, column] = this.#active;
    const first = this.#cellAt(row, column) ?? this.table.querySelector("td[data-at]");
    if (first) first.tabIndex = 0;
  }

  #cellAt(row, column) {
    const td = this.#cells[row]?.[column];
    return td?.dataset.at ? td : null;
  }

  #focus(td) {
    if (!td) return;
    for (const other of this.table.querySelectorAll('td[tabindex="0"]')) other.tabIndex = -1;
    td.tabIndex = 0;
    this.#active = td.dataset.at.split(" ").map(Number);
    this.#tell(td);
  }

  #walk(event) {
    let [row, column] = this.#active;
    const edge = { Home: 0, End: this.#grid.layers.length - 1 }[event.key];
    const [down, right] = STEPS[event.key] ?? [0, 0];
    if (edge === undefined && !down && !right) return;
    event.preventDefault();
    if (edge !== undefined) [row, column] = [row, edge];
    else [row, column] = [row + down, column + right];
    const [rowStep, columnStep] = edge === undefined ? [down, right] : [0, edge ? -1 : 1];
    while (this.#cells[row]?.[column] && !this.#cellAt(row, column)) [row, column] = [row + rowStep, column + columnStep]; // over holes
    this.#cellAt(row, column)?.focus();
  }

  #tell(td) {
    for (const other of this.table.querySelectorAll(".here")) other.classList.remove("here");
    if (!td) {
      this.readout.replaceChildren(this.#hint);
      return;
    }
    const [row, column] = td.dataset.at.split(" ").map(Number);
    td.parentElement.firstChild.classList.add("here");
    this.table.tHead.rows[0].cells[column + 1].classList.add("here");
    const cell = this.#grid.cells[row][column];
    this.readout.replaceChildren(h("strong", {}, `${this.#grid.experts[row]} · layer ${this.#grid.layers[column]}`), ` ${cell.about}`);
  }
}

/** A scale with its ends and its middle, and what stands for what has no colour. */
export class Legend {
  #bar = h("span", { class: "legend-bar" });
  #ends = [h("span"), h("span"), h("span")];

  constructor(...more) {
    const [low, middle, high] = this.#ends;
    this.element = h("div", { class: "legend", role: "img" }, h("span", { class: "legend-scale" }, this.#bar, h("span", { class: "legend-ends" }, low, middle, high)), ...more);
  }

  draw(scale, paintBar, label) {
    const { from, to, isDiverging } = scale;
    paintBar(this.#bar, scale);
    const texts = [from, (from + to) / 2, to].map((value) => weight(value, { isSigned: isDiverging }));
    this.#ends.forEach((end, index) => setText(end, texts[index]));
    this.element.setAttribute("aria-label", `${label}: colours from ${texts[0]} to ${texts[2]}`);
  }
}
