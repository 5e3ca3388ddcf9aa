import assert from "node:assert/strict";
import { test } from "node:test";

import { contrast, inkOn, luminance, scaleOf, spanOf } from "../../../../moa_serve/api/dashboard/page/scales.js";

const steps = Array.from({ length: 101 }, (_, index) => index / 100);

test("contrast is WCAG's", () => {
  assert.equal(Math.round(contrast("#000000", "#ffffff")), 21);
  assert.ok(Math.abs(contrast("#777777", "#ffffff") - 4.48) < 0.01);
});

for (const theme of ["light", "dark"]) {
  test(`${theme}: a greater value always looks further from the surface, to every eye`, () => {
    const scale = scaleOf({ from: 0, to: 1 });
    const seen = steps.map((value) => luminance(scale.at(value)[theme]));
    const sign = theme === "light" ? -1 : 1;
    seen.slice(1).forEach((each, index) => assert.ok(sign * (each - seen[index]) > 0, `at ${steps[index + 1]}`));
  });

  test(`${theme}: differences look the same distance from nothing on both sides`, () => {
    const scale = scaleOf({ from: -1, to: 1, isDiverging: true });
    const middle = luminance(scale.at(0)[theme]);
    const sign = theme === "light" ? -1 : 1;
    for (const side of [-1, 1]) {
      const seen = steps.map((value) => luminance(scale.at(side * value)[theme]));
      seen.slice(1).forEach((each, index) => assert.ok(sign * (each - seen[index]) > 0));
      assert.ok(sign * (seen[50] - middle) > 0);
    }
  });

  test(`${theme}: text can be read on every colour`, () => {
    for (const scale of [scaleOf({ from: 0, to: 1 }), scaleOf({ from: -1, to: 1, isDiverging: true })]) {
      for (const value of steps) {
        const colour = scale.at(value * (scale.to - scale.from) + scale.from)[theme];
        assert.ok(contrast(colour, inkOn(colour)) >= 4.5, `${colour}: ${contrast(colour, inkOn(colour))}`);
      }
    }
  });
}

test("what is beyond a scale has the colour of its end", () => {
  const scale = scaleOf({ from: 0.2, to: 0.4 });
  assert.deepEqual(scale.at(-5), scale.at(0.2));
  assert.deepEqual(scale.at(7), scale.at(0.4));
  assert.notDeepEqual(scale.at(0.2), scale.at(0.4));
});

test("a span holds its values, is rounded, and is never nothing", () => {
  assert.deepEqual(spanOf([0.313, 0.487, null]), { from: 0.3, to: 0.5 });
  assert.deepEqual(spanOf([]), { from: 0, to: 1 });
  assert.deepEqual(spanOf([null, NaN]), { from: 0, to: 1 });
  for (const value of [0, 0.5, 1]) {
    const { from, to } = spanOf([value]);
    assert.ok(from <= value && value <= to && to - from >= 0.049, `${value}: ${from} to ${to}`);
  }
  assert.deepEqual(spanOf([-0.1, 0.31], { isDiverging: true }), { from: -0.32, to: 0.32 });
  assert.deepEqual(spanOf([0, 0], { isDiverging: true }), { from: -0.02, to: 0.02 });
});
