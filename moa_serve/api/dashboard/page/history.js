// What the last five minutes looked like, from one scrape of /metrics after another. Pure: knows no page and no clock.

import { bucketsBetween, increase, quantile, total } from "./prometheus.js";

export const KEPT_SECONDS = 300;
const WINDOW_SECONDS = 10; // that a rate or a quantile is taken over: fewer would be mostly noise

const COUNTERS = ["moa_requests_total", "moa_generated_tokens_total", "moa_prompt_tokens_total"];
const GAUGES = ["moa_requests_running", "moa_requests_waiting", "moa_kv_usage_ratio", "moa_kv_kept_ratio", "moa_adapter_slots", "moa_adapter_slots_filled", "moa_adapter_cache_bytes", "moa_adapter_cache_limit_bytes"];
const HISTOGRAMS = ["moa_time_to_first_token_seconds", "moa_inter_token_seconds", "moa_step_seconds", "moa_step_rows"];
const EVALUATIONS = ["moa_expert_evaluations_total", "moa_expert_evaluations_skipped_total"];
const PARTS = ["moa_step_part_seconds_total", "moa_steps_timed_total"];

/** What to ask /metrics for. */
export const QUERY = [...COUNTERS, ...GAUGES, ...HISTOGRAMS, ...EVALUATIONS, ...PARTS].map((name) => `name[]=${name}`).join("&");

const share = (part, whole) => (part === null || !whole ? null : part / whole);

/** One moment: numbers of what happened between two scrapes, and of how things stand at the second. Null is not known. */
export function momentOf(before, after, seconds) {
  const rose = (name, wanted) => increase(before, after, name, wanted);
  const rate = (name, wanted) => share(rose(name, wanted), seconds);
  const seen = HISTOGRAMS.map((name) => bucketsBetween(before, after, name));
  const [ttft, gap, step] = seen;
  const now = Object.fromEntries(GAUGES.map((name) => [name, total(after, name)]));
  return {
    requests: rate("moa_requests_total"),
    failed: rate("moa_requests_total", (labels) => labels.finish_reason === "error"),
    generated: rate("moa_generated_tokens_total"),
    prompt: rate("moa_prompt_tokens_total"),
    ttft: [quantile(ttft, 0.5), quantile(ttft, 0.95)],
    gap: [quantile(gap, 0.5), quantile(gap, 0.95)],
    step: [quantile(step, 0.5), quantile(step, 0.95)],
    rows: share(rose("moa_step_rows_sum"), rose("moa_step_rows_count")),
    skipped: share(rose(EVALUATIONS[1]), rose(EVALUATIONS[0])),
    running: now.moa_requests_running,
    waiting: now.moa_requests_waiting,
    held: now.moa_kv_usage_ratio,
    kept: now.moa_kv_kept_ratio,
    slots: [now.moa_adapter_slots_filled, now.moa_adapter_slots],
    cache: [now.moa_adapter_cache_bytes, now.moa_adapter_cache_limit_bytes],
    parts: partsOf(before, after),
    byAdapter: ratesByAdapter(before, after, seconds),
  };
}

/** Share of a timed step that each part took: [[part, 0 to 1], ...], the largest first; empty while no step was timed. */
function partsOf(before, after) {
  const names = new Set([...(after.get(PARTS[0])?.values() ?? [])].map(({ labels }) => labels.part));
  const found = [...names].map((part) => [part, increase(before, after, PARTS[0], (labels) => labels.part === part)]);
  const sum = found.reduce((all, [, seconds]) => all + seconds, 0);
  return sum > 0 ? found.map(([part, seconds]) => [part, seconds / sum]).sort(([, a], [, b]) => b - a) : [];
}

/** Generated tokens a second, by the adapter's (or the base's) name. */
function ratesByAdapter(before, after, seconds) {
  const rates = new Map();
  for (const [written, { labels, value }] of after.get("moa_generated_tokens_total") ?? []) {
    const seen = before.get("moa_generated_tokens_total")?.get(written)?.value ?? 0;
    rates.set(labels.adapter, (value >= seen ? value - seen : value) / seconds);
  }
  return rates;
}

export class History {
  #scrapes = []; // [{time, families}], of the last WINDOW_SECONDS and the one before
  moments = []; // [{time, ...momentOf}], of the last KEPT_SECONDS

  /** Takes a scrape made at `time`, in seconds; the newest moment is null for the first one, which there is nothing to compare with. */
  add(families, time) {
    this.#scrapes.push({ time, families });
    while (this.#scrapes.length > 2 && time - this.#scrapes[1].time >= WINDOW_SECONDS) this.#scrapes.shift();
    const [oldest] = this.#scrapes;
    if (time - oldest.time > 3 * WINDOW_SECONDS) this.#scrapes = [{ time, families }]; // nobody looked for a while: no mean over that
    else if (time > oldest.time) this.moments.push({ time, ...momentOf(oldest.families, families, time - oldest.time) });
    this.moments = this.moments.filter((moment) => time - moment.time <= KEPT_SECONDS);
  }

  get latest() {
    return this.moments.at(-1) ?? null;
  }
}
