// Numbers as people read them. Pure. What is not known is a dash.

export const DASH = "–";

const digits = (value, most) => value.toLocaleString("en", { maximumFractionDigits: most, useGrouping: false });

/** A rate or a count, short: 0.25, 3.4, 128, 1.2k, 3.4M. */
export function compact(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return DASH;
  const size = Math.abs(value);
  if (size >= 999_500) return `${digits(value / 1e6, size < 1e7 ? 1 : 0)}M`;
  if (size >= 999.5) return `${digits(value / 1e3, size < 1e4 ? 1 : 0)}k`;
  return digits(value, size >= 99.5 ? 0 : size >= 9.95 || value === 0 ? 1 : 2);
}

/** A number of things, whole. */
export function count(value) {
  return value === null || value === undefined ? DASH : Math.round(value).toLocaleString("en");
}

/** A span of time given in seconds, as [number, unit]. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return [DASH, ""];
  if (seconds < 0.9995) {
    const ms = seconds * 1e3;
    return [digits(ms, ms < 9.95 ? 1 : 0), "ms"];
  }
  return seconds < 99.5 ? [digits(seconds, seconds < 9.95 ? 2 : 1), "s"] : [digits(seconds / 60, 1), "min"];
}

/** A share of one, in percent. */
export function percent(share, most = 0) {
  return share === null || share === undefined || !Number.isFinite(share) ? DASH : `${digits(share * 100, most)} %`;
}

/** A number from 0 to 1 to two digits; a difference gets its sign. */
export function weight(value, { isSigned = false } = {}) {
  if (value === null || value === undefined) return DASH;
  const text = Math.abs(value).toFixed(2);
  const sign = value < 0 ? "−" : "+";
  return isSigned && text !== "0.00" ? sign + text : text;
}

export function bytes(number) {
  if (number === null || number === undefined) return DASH;
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (number >= size * 0.9995) return `${digits(number / size, number < size * 9.95 ? 1 : 0)} ${unit}`;
  }
  return `${number} B`;
}

/** How long ago, from two Unix times in seconds. */
export function ago(then, now) {
  if (then === null || then === undefined) return "never";
  const seconds = Math.max(0, now - then);
  if (seconds < 3) return "now";
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${unit} ago`;
  }
  return `${Math.floor(seconds)} s ago`;
}

/** The words of a variant, as the paper writes them. */
export function variantName(variant) {
  const names = {
    soft_moa: "Soft MoA", sparse_moa: "Sparse MoA", soft_moa_instance: "Soft MoA, instance", unipeft: "UniPEFT", molora: "MoLoRA",
    hydralora: "HydraLoRA", mola: "MoLA", adamole: "AdaMoLE", lora: "LoRA", prompt: "Prompt", parallel_adapter: "Parallel adapter",
    composition: "Composition",
  };
  return variant === null || variant === undefined ? DASH : (names[variant] ?? variant);
}

const WITHOUT_ROUTER = new Set(["lora", "prompt", "parallel_adapter", "composition"]);

/** Whether adapters of this variant have a router; null where the variant is not known. */
export function hasRouter(variant) {
  return variant === null || variant === undefined ? null : !WITHOUT_ROUTER.has(variant);
}
