// A line of the last minutes, drawn as SVG.

import { s } from "./dom.js";

const [WIDTH, HEIGHT, PAD] = [200, 44, 3];

/**
 * SVG paths of a series: broken where a value is missing or two points are further apart than `gap` seconds. Pure.
 * @param points [{time, value}], times rising.
 * @returns {{line: string, area: string}}
 */
export function pathsOf(points, { from, to, most, gap, width = WIDTH, height = HEIGHT, pad = PAD }) {
  const runs = [];
  let last = null;
  for (const { time, value } of points) {
    if (value === null || !Number.isFinite(value) || time < from) {
      last = null;
      continue;
    }
    const x = (width * (time - from)) / (to - from);
    const y = height - pad - ((height - 2 * pad) * Math.min(value, most)) / (most || 1);
    if (last === null || time - last > gap) runs.push([]);
    runs.at(-1).push(`${x.toFixed(1)} ${y.toFixed(1)}`);
    last = time;
  }
  const line = runs.map((run) => `M${run.join("L")}${run.length === 1 ? "h0.1" : ""}`).join("");
  const foot = (run) => `M${run[0].split(" ")[0]} ${height}L${run.join("L")}L${run.at(-1).split(" ")[0]} ${height}Z`;
  return { line, area: runs.filter((run) => run.length > 1).map(foot).join("") };
}

/** One to three series in one picture; the first is filled. `onPick` gets the index of the point under the pointer, or null. */
export class Sparkline {
  #lines;
  #area = s("path", { class: "spark-area" });
  #cursor = s("line", { class: "spark-cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
  #shown = { points: [], from: 0, to: 1 };

  constructor(numSeries, onPick = () => {}) {
    this.#lines = Array.from({ length: numSeries }, (_, index) => s("path", { class: `spark-line spark-${index}` }));
    this.element = s(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "spark", role: "img" },
      this.#area,
      ...[...this.#lines].reverse(),
      this.#cursor,
    );
    this.element.addEventListener("pointermove", (event) => onPick(this.#pick(event)));
    this.element.addEventListener("pointerleave", () => {
      this.#cursor.setAttribute("visibility", "hidden");
      onPick(null);
    });
  }

  /** `points`: [{time, values: [one of each series]}]. `most` is the top where values do not go beyond it. */
  draw(points, { from, to, gap, least, label }) {
    this.#shown = { points, from, to };
    const known = points.flatMap(({ values }) => values.filter((value) => value !== null));
    const most = Math.max(least, ...known);
    this.#lines.forEach((line, index) => {
      const series = points.map(({ time, values }) => ({ time, value: values[index] }));
      const paths = pathsOf(series, { from, to, most, gap });
      line.setAttribute("d", paths.line);
      if (index === 0) this.#area.setAttribute("d", paths.area);
    });
    this.element.setAttribute("aria-label", label);
  }

  #pick(event) {
    const { points, from, to } = this.#shown;
    if (!points.length) return null;
    const box = this.element.getBoundingClientRect();
    const time = from + ((to - from) * (event.clientX - box.left)) / box.width;
    const distances = points.map((point) => Math.abs(point.time - time));
    const index = distances.indexOf(Math.min(...distances));
    const x = (WIDTH * (points[index].time - from)) / (to - from);
    for (const end of ["x1", "x2"]) this.#cursor.setAttribute(end, x);
    this.#cursor.setAttribute("visibility", "visible");
    return index;
  }
}
