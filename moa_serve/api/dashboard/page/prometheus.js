// What Prometheus' text format says, and what two scrapes of it tell together. Pure.

const SAMPLE = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/;
const LABEL = /([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

/**
 * Series by the name of their samples: Map of name to a Map of the label set, as it is written, to {labels, value}.
 * Lines that are no samples are passed over.
 */
export function parseMetrics(text) {
  const families = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : SAMPLE.exec(line.trim());
    if (!match) continue;
    const [, name, written = "", value] = match;
    const labels = {};
    for (const [, label, content] of written.matchAll(LABEL)) labels[label] = content.replace(/\\[n"\\]/g, (two) => ESCAPED[two]);
    if (!families.has(name)) families.set(name, new Map());
    families.get(name).set(written, { labels, value: numberOf(value) });
  }
  return families;
}

function numberOf(word) {
  if (/^[+-]?inf$/i.test(word)) return word.startsWith("-") ? -Infinity : Infinity;
  return Number(word); // "NaN" is NaN
}

/** The sum over a family's series that `wanted` keeps; null where there are none. */
export function total(families, name, wanted = () => true) {
  let sum = null;
  for (const { labels, value } of families.get(name)?.values() ?? []) if (wanted(labels)) sum = (sum ?? 0) + value;
  return sum;
}

/**
 * How much a counter rose from one scrape to the next, over all series that `wanted` keeps; null where the family is in neither.
 * As Prometheus' increase: a series that is new, or smaller than before (the server began anew), counts whole, and one that is gone does not.
 */
export function increase(before, after, name, wanted = () => true) {
  const [old, now] = [before.get(name), after.get(name)];
  if (!old && !now) return null;
  let sum = 0;
  for (const [written, { labels, value }] of now ?? []) {
    if (!wanted(labels)) continue;
    const seen = old?.get(written)?.value ?? 0;
    sum += value >= seen ? value - seen : value;
  }
  return sum;
}

/** What a histogram counted between two scrapes, all its series together: [[upper bound, count up to it], ...], bounds rising. */
export function bucketsBetween(before, after, name) {
  const bounds = new Set();
  for (const { labels } of after.get(`${name}_bucket`)?.values() ?? []) bounds.add(labels.le);
  return [...bounds]
    .map((le) => [numberOf(le), increase(before, after, `${name}_bucket`, (labels) => labels.le === le)])
    .sort(([a], [b]) => a - b);
}

/** As PromQL's histogram_quantile: linear within a bucket; beyond the last finite bound that bound. Null where nothing was counted. */
export function quantile(buckets, q) {
  const count = buckets.at(-1)?.[1] ?? 0;
  if (!(count > 0)) return null;
  const rank = q * count;
  let [lower, below] = [0, 0];
  for (const [upper, upTo] of buckets) {
    if (upTo >= rank && upTo > below) return upper === Infinity ? lower : lower + ((upper - lower) * (rank - below)) / (upTo - below);
    [lower, below] = [upper, upTo];
  }
  return lower;
}
