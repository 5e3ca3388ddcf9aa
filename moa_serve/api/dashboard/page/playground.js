// The playground: one prompt to two models at once, their answers side by side, and what routers did with each token.

import { ask, optionsOf } from "./ask.js";
import { byId, h, setOptions, setText } from "./dom.js";
import { hasRouter, variantName } from "./format.js";
import { Heatmap, Legend } from "./heatmap.js";
import { Pane } from "./pane.js";
import { gridOfToken, orderExperts } from "./routing.js";
import { paintLegend, scaleOf, spanOf } from "./scales.js";

const HELP = {
  instruction: "Put into the template that moa-serve train uses, and so most adapters know.",
  completion: "Sent as it is; the model writes on.",
  chat: "Sent as one user message, in the base’s chat template.",
};
const FIRST_PROMPT = "Tom had 12 apples and ate 5 of them . How many apples are left ?";
const NO_EXPERTS = [["mean", "all experts: mean weight"], ["share", "all experts: share kept"]];

export class Playground {
  #panes = [0, 1].map(() => new Pane({ onToken: (...found) => this.#inspect(...found), onDraw: () => this.#colour() }));
  #legend = new Legend();
  #tokenLegend = new Legend(h("span", { class: "legend-key" }, h("span", { class: "swatch off" }), "left out"));
  #map = new Heatmap({ label: "Experts of the token by layers", hint: "Point at a cell, or walk with the arrow keys.", isSmall: true });
  #routed = new Map(); // by model: whether it has a router, as far as that is known
  #names = new Map();
  #running = null; // the AbortController of the answers under way
  #shown = null; // {pane, index, isPinned}: the token in the inspector

  constructor(client) {
    this.client = client;
    byId("panes").append(...this.#panes.map((pane) => pane.element));
    byId("colour-legend").append(this.#legend.element);
    byId("inspector-map").append(this.#map.element);
    byId("inspector-legend").append(this.#tokenLegend.element);
    byId("prompt").value = FIRST_PROMPT;
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      void this.#run();
    });
    byId("ask").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
    });
    byId("stop").addEventListener("click", () => this.#running?.abort());
    byId("ask-mode").addEventListener("change", () => this.#help());
    for (const id of ["colour-expert", "colour-layer", "colour-stretch"]) byId(id).addEventListener("change", () => this.#colour());
    byId("inspector-close").addEventListener("click", () => this.#close());
    byId("view-playground").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.#shown) this.#close();
    });
    this.#help();
    this.#colour();
  }

  /** What can be asked: the base, the adapters that are not broken, and aliases, which only the list of models has. */
  setModels(adapters, base, models) {
    const variants = new Map(adapters.map((item) => [item.id, item.variant]));
    this.#routed = new Map(models.map(({ id }) => [id, id === base ? false : hasRouter(variants.get(id))]));
    this.#names = new Map(models.map(({ id }) => [id, id === base ? "base model" : variants.has(id) ? variantName(variants.get(id)) : "alias"]));
    const entries = models.map(({ id }) => [id, `${id} · ${this.#names.get(id)}`]);
    const isFirst = !byId("model-0").options.length;
    for (const index of [0, 1]) setOptions(byId(`model-${index}`), entries);
    if (!isFirst) return;
    const routed = models.filter(({ id }) => this.#routed.get(id)).map(({ id }) => id);
    byId("model-0").value = routed[0] ?? models.at(-1).id;
    byId("model-1").value = routed[1] ?? base;
  }

  #help() {
    setText(byId("mode-help"), HELP[document.querySelector('input[name="mode"]:checked').value]);
  }

  // -- asking

  async #run() {
    this.#running?.abort();
    const controller = (this.#running = new AbortController());
    const settings = {
      mode: document.querySelector('input[name="mode"]:checked').value,
      prompt: byId("prompt").value,
      maxTokens: byId("max-tokens").valueAsNumber,
      temperature: byId("temperature").valueAsNumber,
      seed: byId("seed").value === "" ? null : byId("seed").valueAsNumber,
    };
    this.#close();
    byId("stop").disabled = false;
    await Promise.all(this.#panes.map((pane, index) => this.#answer(pane, index, settings, controller.signal)));
    if (this.#running === controller) {
      byId("stop").disabled = true;
      this.#running = null;
    }
  }

  async #answer(pane, index, settings, signal) {
    const started = performance.now();
    const found = { finish: "stop", usage: null, moa: null, seconds: { first: null } };
    const model = byId(`model-${index}`).value;
    const typed = byId(`options-${index}`).value.trim();
    pane.begin(model, [this.#names.get(model), typed].filter(Boolean).join(" · "));
    try {
      const own = { ...settings, options: optionsOf(typed) };
      for await (const piece of ask(this.client, own, model, this.#routed.get(model) ?? null, signal)) {
        if (signal !== this.#running?.signal) return; // another question has the pane now
        found.seconds.first ??= (performance.now() - started) / 1000;
        found.finish = piece.finish ?? found.finish;
        found.usage = piece.usage ?? found.usage;
        found.moa = piece.moa ?? found.moa;
        pane.add(piece);
      }
    } catch (error) {
      if (this.#running !== null && signal !== this.#running.signal) return;
      found.finish = signal.aborted ? "aborted" : "error";
      if (!signal.aborted) pane.fail(error);
    }
    pane.end(found);
  }

  // -- colours

  #choice() {
    const chosen = byId("colour-expert").value;
    const layer = byId("colour-layer").value;
    return {
      expert: chosen.startsWith("expert ") ? chosen.slice("expert ".length) : null,
      isShare: chosen === "share",
      layer: layer === "" || layer === "all" ? null : Number(layer),
    };
  }

  #colour() {
    const known = this.#panes.map((pane) => pane.experts).filter(Boolean);
    const names = orderExperts(known.flat());
    const numLayers = Math.max(0, ...known.map((layers) => layers.length));
    setOptions(byId("colour-expert"), [...NO_EXPERTS, ...names.map((name) => [`expert ${name}`, name])]);
    setOptions(byId("colour-layer"), [["all", "all layers, mean"], ...Array.from({ length: numLayers }, (_, layer) => [layer, `layer ${layer}`])]);
    const choice = this.#choice();
    const values = this.#panes.flatMap((pane) => pane.measure(choice));
    const scale = scaleOf(byId("colour-stretch").checked ? spanOf(values) : { from: 0, to: 1 });
    const what = choice.isShare ? "share kept" : (choice.expert ?? "mean weight");
    for (const pane of this.#panes) pane.paint(scale, what);
    this.#legend.draw(scale, paintLegend, what);
    if (this.#shown) this.#drawToken();
  }

  // -- one token

  #inspect(pane, index, isClick) {
    if (pane.experts === null || !pane.tokens[index]) return;
    if (this.#shown?.isPinned && !isClick) return;
    this.#shown?.pane.select(null);
    this.#shown = { pane, index, isPinned: isClick };
    pane.select(index);
    byId("inspector").hidden = false;
    this.#drawToken();
  }

  #drawToken() {
    const { pane, index, isPinned } = this.#shown;
    const token = pane.tokens[index];
    const grid = gridOfToken(pane.experts, token);
    const span = byId("colour-stretch").checked ? spanOf(grid.cells.flat().map((cell) => cell?.value ?? null)) : { from: 0, to: 1 };
    const scale = scaleOf(span);
    this.#map.draw(grid, scale);
    this.#tokenLegend.draw(scale, paintLegend, "weights of this token");
    const { kept, of } = pane.keptOf(index);
    setText(byId("inspector-title"), quoted(pane.pieceAt(index) || token.token));
    setText(byId("inspector-about"), `${pane.title.textContent} · token ${index + 1} of ${pane.tokens.length}, id ${token.id} · ${kept} of ${of} experts kept${isPinned ? " · held" : ""}`);
  }

  #close() {
    if (this.#shown === null) return;
    const { pane, index } = this.#shown;
    pane.select(null);
    this.#shown = null;
    if (byId("inspector").contains(document.activeElement)) pane.focusAt(index);
    byId("inspector").hidden = true;
  }
}

/** A token's text where its spaces and ends of lines must be seen. */
function quoted(text) {
  return text ? `“${text.replaceAll("\n", "↵").replaceAll("\t", "⇥")}”` : "(no text)";
}
