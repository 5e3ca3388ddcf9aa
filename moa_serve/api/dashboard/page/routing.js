// What routers did, as grids of experts by layers. Pure. A grid is {experts, layers, cells}, cells[expert][layer] null where a layer has not
// that expert, else {value, isOff, isDead, text, about}.

import { DASH, percent, weight } from "./format.js";

const ORDER = ["Q", "K", "V", "PROMPT", "O", "UP", "GATE", "DOWN", "P_ADAPTER"];

/** The part of an expert's name that says where it works: Q of Q/3 and of Q.3. */
export function targetOf(expert) {
  return expert.split(/[/.]/)[0];
}

/** All names of layers' experts in the canonical order, each once. */
export function orderExperts(layers) {
  const names = [...new Set(layers.flat())];
  const rank = (name) => (ORDER.indexOf(targetOf(name)) + ORDER.length + 1) % (ORDER.length + 1); // what is not known comes last
  const number = (name) => Number(/\d+$/.exec(name)?.[0] ?? -1);
  return names.map((name, index) => [name, index]).sort(([a, i], [b, j]) => rank(a) - rank(b) || number(a) - number(b) || i - j).map(([name]) => name);
}

export const MEASURES = {
  weight: "Mean weight",
  selected: "Share of tokens that kept it",
  computed: "Share of tokens it was computed for",
  difference: "Live minus training",
};

/** Which of a profile's two numbers tells experts apart: the share kept, or the weight where every token keeps every expert. */
export function comparedBy(report) {
  const profiles = report.layers.flatMap((layer) => layer.experts.map((expert) => expert.profile)).filter(Boolean);
  if (!profiles.length) return null;
  return profiles.every((profile) => profile.selected >= 1) ? "weight" : "selected";
}

/** The grid of GET /v1/adapters/{name}/experts by one of MEASURES. */
export function gridOfReport(report, measure) {
  const dead = new Set((report.dead ?? []).map(({ layer, expert }) => `${layer} ${expert}`));
  const compared = comparedBy(report);
  const cellOf = (layer, expert) => {
    const trained = expert.profile?.[compared] ?? null;
    const difference = trained === null || expert[compared] === null ? null : expert[compared] - trained;
    const value = measure === "difference" ? difference : expert[measure];
    const about = [
      `weight ${weight(expert.weight)}`,
      `kept ${percent(expert.selected, 1)}`,
      `computed ${percent(expert.computed, 1)}`,
      trained === null ? null : `in training ${compared === "weight" ? weight(trained) : percent(trained, 1)}`,
      layer.threshold === null ? null : `threshold ${weight(layer.threshold)}`,
    ];
    const isDead = dead.has(`${layer.layer} ${expert.name}`);
    if (isDead) about.push("no token kept it yet");
    return { value, isOff: false, isDead, text: weight(value, { isSigned: measure === "difference" }), about: about.filter(Boolean).join(" · ") };
  };
  return gridOf(
    orderExperts(report.layers.map((layer) => layer.experts.map((expert) => expert.name))),
    report.layers.map((layer) => [layer.layer, new Map(layer.experts.map((expert) => [expert.name, cellOf(layer, expert)]))]),
  );
}

/** The grid of one token of `moa.routing`. */
export function gridOfToken(experts, token) {
  const layers = experts.map((names, layer) => {
    const threshold = token.threshold?.[layer] ?? null;
    const cells = names.map((name, column) => {
      const [value, isKept] = [token.weights[layer][column], Boolean(token.selected[layer][column])];
      const about = [`weight ${value === null ? DASH : value.toFixed(4)}`, threshold === null ? null : `threshold ${threshold.toFixed(4)}`, isKept ? "kept" : "left out"];
      return [name, { value, isOff: !isKept, isDead: false, text: weight(value), about: about.filter(Boolean).join(" · ") }];
    });
    return [layer, new Map(cells)];
  });
  return gridOf(orderExperts(experts), layers);
}

function gridOf(experts, layers) {
  return {
    experts,
    layers: layers.map(([layer]) => layer),
    cells: experts.map((name) => layers.map(([, cells]) => cells.get(name) ?? null)),
  };
}

export function meanOf(values) {
  const found = values.filter((value) => value !== null && value !== undefined);
  return found.length ? found.reduce((sum, value) => sum + value, 0) / found.length : null;
}

/**
 * What a token is coloured by: an expert's weight in a layer, or its mean over the layers that have it.
 * @param expert a name, or null for the mean over all experts.
 * @param layer an index, or null for all.
 * @returns {{value: number, isKept: boolean} | null} null where there is no such expert; kept: in any of the layers.
 */
export function weightOf(experts, token, expert, layer) {
  const [weights, kept] = [[], []];
  experts.forEach((names, index) => {
    if (layer !== null && layer !== index) return;
    names.forEach((name, column) => {
      if (expert !== null && expert !== name) return;
      weights.push(token.weights[index][column]);
      kept.push(token.selected[index][column]);
    });
  });
  const value = meanOf(weights); // null too where a router overflowed everywhere
  return value === null ? null : { value, isKept: kept.some(Boolean) };
}

/** How many of a token's experts were kept, of how many. */
export function keptOf(token) {
  const flags = token.selected.flat();
  return { kept: flags.filter(Boolean).length, of: flags.length };
}

/**
 * Which piece of a text each token made. Texts of single tokens do not always add up to the text: a character may be made of several tokens,
 * an end-of-text token makes none, and a stop string is cut off. The pieces, with `rest`, always do.
 * @returns {{pieces: string[], rest: string}} `rest` is what no token is known for yet.
 */
export function align(text, tokens) {
  const pieces = tokens.map(() => "");
  let [place, open] = [0, -1]; // `open`: the first token in a row whose own text is not to be found
  tokens.forEach((token, index) => {
    let part = token.token ?? "";
    if (open < 0 && text.startsWith(` ${part}`, place)) part = ` ${part}`; // some tokenizers leave the space before a word to the decoder
    if (!part || part.includes("\uFFFD")) {
      open = open < 0 ? index : open;
      return;
    }
    const at = open < 0 ? (text.startsWith(part, place) ? place : -1) : text.indexOf(part, place);
    if (at < 0) {
      open = open < 0 ? index : open;
      return;
    }
    if (open >= 0) pieces[open] = text.slice(place, at);
    pieces[index] = part;
    [place, open] = [at + part.length, -1];
  });
  if (open >= 0) {
    pieces[open] = text.slice(place);
    place = text.length;
  }
  return { pieces, rest: text.slice(place) };
}

