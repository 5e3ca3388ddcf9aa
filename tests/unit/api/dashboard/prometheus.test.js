import assert from "node:assert/strict";
import { test } from "node:test";

import { History, momentOf } from "../../../../moa_serve/api/dashboard/page/history.js";
import { bucketsBetween, increase, parseMetrics, quantile, total } from "../../../../moa_serve/api/dashboard/page/prometheus.js";

const PAGE = `# HELP a_total Things.
# TYPE a_total counter
a_total{adapter="x",finish_reason="stop"} 3.0
a_total{adapter="with \\"quotes\\", a \\\\ and a\\nline }",finish_reason="stop"} 1e3 1700000000
b 0.5
b_bucket{le="0.1"} 2
b_bucket{le="+Inf"} 4
c NaN

this is no sample
`;

test("the text format is read with labels, escapes, times and numbers of every form", () => {
  const families = parseMetrics(PAGE);
  assert.deepEqual([...families.keys()], ["a_total", "b", "b_bucket", "c"]);
  const series = [...families.get("a_total").values()];
  assert.deepEqual(series[0], { labels: { adapter: "x", finish_reason: "stop" }, value: 3 });
  assert.deepEqual(series[1].labels.adapter, 'with "quotes", a \\ and a\nline }');
  assert.equal(series[1].value, 1000);
  assert.equal(total(families, "a_total"), 1003);
  assert.equal(total(families, "a_total", (labels) => labels.adapter === "x"), 3);
  assert.equal(total(families, "unheard_of"), null);
  assert.ok(Number.isNaN(total(families, "c")));
});

test("a counter's rise counts new series and restarts whole, and series that are gone not at all", () => {
  const before = parseMetrics('n{a="1"} 10\nn{a="2"} 5\nn{a="gone"} 99');
  const after = parseMetrics('n{a="1"} 14\nn{a="2"} 2\nn{a="new"} 7');
  assert.equal(increase(before, after, "n"), 4 + 2 + 7);
  assert.equal(increase(before, after, "unheard_of"), null);
  assert.equal(increase(before, new Map(), "n"), 0);
});

test("quantiles are those of histogram_quantile", () => {
  const buckets = [[0.1, 10], [0.2, 30], [0.5, 40], [Infinity, 40]];
  for (const [q, seconds] of [[0.5, 0.15], [0.95, 0.44]]) assert.ok(Math.abs(quantile(buckets, q) - seconds) < 1e-12);
  assert.equal(quantile([[0.1, 0], [Infinity, 5]], 0.5), 0.1); // beyond the last bound
  assert.equal(quantile([[0.1, 0], [Infinity, 0]], 0.5), null);
  assert.equal(quantile([], 0.5), null);
});

test("buckets are of what came between two scrapes, over all series", () => {
  const before = parseMetrics('h_bucket{adapter="a",le="0.1"} 1\nh_bucket{adapter="a",le="+Inf"} 5');
  const after = parseMetrics(
    'h_bucket{adapter="a",le="0.1"} 2\nh_bucket{adapter="a",le="+Inf"} 7\nh_bucket{adapter="b",le="0.1"} 3\nh_bucket{adapter="b",le="+Inf"} 3',
  );
  assert.deepEqual(bucketsBetween(before, after, "h"), [[0.1, 4], [Infinity, 5]]);
});

const scrape = (requests, tokens) =>
  parseMetrics(`moa_requests_total{adapter="a",finish_reason="stop"} ${requests}
moa_requests_total{adapter="a",finish_reason="error"} ${requests / 2}
moa_generated_tokens_total{adapter="a"} ${tokens}
moa_requests_running 3
moa_step_part_seconds_total{part="base"} ${tokens}
moa_step_part_seconds_total{part="experts"} ${tokens / 3}`);

test("a moment is rates of counters and the state of gauges; what is not told is null", () => {
  const moment = momentOf(scrape(0, 0), scrape(4, 120), 2);
  assert.equal(moment.requests, 3);
  assert.equal(moment.failed, 1);
  assert.equal(moment.generated, 60);
  assert.equal(moment.running, 3);
  assert.equal(moment.held, null);
  assert.deepEqual(moment.ttft, [null, null]);
  assert.deepEqual(moment.parts, [["base", 0.75], ["experts", 0.25]]);
  assert.equal(moment.byAdapter.get("a"), 60);
});

test("the history takes rates over the last ten seconds, keeps five minutes, and takes none over a pause", () => {
  const history = new History();
  for (let time = 0; time <= 400; time += 2) history.add(scrape(time, time * 10), time);
  assert.equal(history.moments[0].time, 100);
  assert.equal(history.latest.time, 400);
  assert.equal(history.latest.generated, 10);
  history.add(scrape(402, 402 * 10 + 100), 402);
  assert.equal(history.latest.generated, 20); // a burst of 100 in one scrape, spread over ten seconds
  history.add(scrape(1000, 1e6), 1000);
  assert.equal(history.latest, null);
  history.add(scrape(1002, 1e6 + 20), 1002);
  assert.equal(history.latest.generated, 10);
});
