import assert from "node:assert/strict";
import { test } from "node:test";

import { optionsOf, pieceOf, requestOf, TEMPLATE } from "../../../../moa_serve/api/dashboard/page/ask.js";
import { wordsOf } from "../../../../moa_serve/api/dashboard/page/events.js";
import { ago, bytes, compact, duration, hasRouter, percent, weight } from "../../../../moa_serve/api/dashboard/page/format.js";
import { arrange, withRouters } from "../../../../moa_serve/api/dashboard/page/adapters.js";
import { valueOf } from "../../../../moa_serve/api/dashboard/page/pane.js";
import { align, gridOfReport, gridOfToken, keptOf, orderExperts, weightOf } from "../../../../moa_serve/api/dashboard/page/routing.js";
import { pathsOf } from "../../../../moa_serve/api/dashboard/page/sparkline.js";

const expert = (name, weightNow, selected, profile = null) => ({ name, weight: weightNow, selected, computed: 1, profile });
const REPORT = {
  adapter: "a",
  tokens: 10,
  layers: [
    { layer: 0, threshold: 0.31, experts: [expert("DOWN", 0.5, 0.75, { weight: 0.4, selected: 0.5 }), expert("Q", 0.1, 0, { weight: 0.2, selected: 0.25 })] },
    { layer: 1, threshold: null, experts: [expert("Q", 0.3, 1, { weight: 0.3, selected: 1 })] },
  ],
  dead: [{ layer: 0, expert: "Q" }],
};

test("experts stand in one order, whatever the layers", () => {
  assert.deepEqual(orderExperts([["P_ADAPTER", "Q"], ["DOWN", "PROMPT", "K"]]), ["Q", "K", "PROMPT", "DOWN", "P_ADAPTER"]);
  assert.deepEqual(orderExperts([["K/1", "Q/10", "Q/2", "K/0", "new"]]), ["Q/2", "Q/10", "K/0", "K/1", "new"]);
});

test("a report's cells are its numbers, where they belong", () => {
  const grid = gridOfReport(REPORT, "selected");
  assert.deepEqual([grid.experts, grid.layers], [["Q", "DOWN"], [0, 1]]);
  assert.deepEqual(grid.cells.map((row) => row.map((cell) => cell?.value)), [[0, 1], [0.75, undefined]]);
  assert.ok(grid.cells[0][0].isDead && !grid.cells[0][1].isDead);
  assert.equal(grid.cells[1][0].about, "weight 0.50 · kept 75 % · computed 100 % · in training 50 % · threshold 0.31");
});

test("differences are of the shares kept, or of weights where all are kept", () => {
  assert.deepEqual(gridOfReport(REPORT, "difference").cells.map((row) => row.map((cell) => cell?.value)), [[-0.25, 0], [0.25, undefined]]);
  const soft = { ...REPORT, dead: null, layers: [{ layer: 0, threshold: null, experts: [expert("Q", 0.5, 1, { weight: 0.25, selected: 1 })] }] };
  assert.equal(gridOfReport(soft, "difference").cells[0][0].value, 0.25);
  const bare = { ...REPORT, layers: [{ layer: 0, threshold: null, experts: [expert("Q", 0.5, 1)] }] };
  assert.equal(gridOfReport(bare, "difference").cells[0][0].value, null);
  const idle = { ...REPORT, layers: [{ layer: 0, threshold: null, experts: [expert("Q", null, null, { weight: 0.2, selected: 0.5 })] }] };
  assert.equal(gridOfReport(idle, "difference").cells[0][0].value, null);
});

const EXPERTS = [["Q", "DOWN"], [], ["Q"]];
const TOKEN = { id: 5, token: " a", weights: [[0.2, 0.9], [], [0.4]], selected: [[1, 0], [], [0]], threshold: [0.1, 0, 0.5] };

test("a token's value is an expert's weight in a layer, or its mean over those that have it", () => {
  assert.deepEqual(weightOf(EXPERTS, TOKEN, "Q", 0), { value: 0.2, isKept: true });
  assert.deepEqual(weightOf(EXPERTS, TOKEN, "DOWN", 0), { value: 0.9, isKept: false });
  assert.ok(Math.abs(weightOf(EXPERTS, TOKEN, "Q", null).value - 0.3) < 1e-12);
  assert.ok(Math.abs(weightOf(EXPERTS, TOKEN, null, null).value - 0.5) < 1e-12);
  assert.equal(weightOf(EXPERTS, TOKEN, "K", null), null);
  assert.equal(weightOf(EXPERTS, TOKEN, "Q", 1), null);
  assert.deepEqual(keptOf(TOKEN), { kept: 1, of: 3 });
  assert.deepEqual(valueOf(EXPERTS, TOKEN, { isShare: true, expert: null, layer: 0 }), { value: 0.5, isKept: true });
  assert.equal(valueOf(EXPERTS, TOKEN, { isShare: true, expert: null, layer: 1 }), null);
});

test("a router that overflowed leaves a gap, and not the page without colours", () => {
  const token = { ...TOKEN, weights: TOKEN.weights.map((row) => row.map(() => null)) };
  assert.equal(weightOf(EXPERTS, token, null, null), null);
  assert.match(gridOfToken(EXPERTS, token).cells[0][0].about, /^weight –/);
});

test("a token's grid has every expert of every layer", () => {
  const grid = gridOfToken(EXPERTS, TOKEN);
  assert.deepEqual([grid.experts, grid.layers], [["Q", "DOWN"], [0, 1, 2]]);
  assert.deepEqual(grid.cells.map((row) => row.map((cell) => cell && [cell.value, cell.isOff])), [[[0.2, false], null, [0.4, true]], [[0.9, true], null, null]]);
  assert.equal(grid.cells[0][2].about, "weight 0.4000 · threshold 0.5000 · left out");
});

test("pieces of a text and what is left always make the text", () => {
  const cases = [
    ["x = 7", ["x", " =", " 7"], ["x", " =", " 7"], ""],
    ["né!", ["n", "\uFFFD", "\uFFFD", "!"], ["n", "é", "", "!"], ""],
    ["done", ["done", "<|im_end|>"], ["done", ""], ""],
    ["done", ["done", ""], ["done", ""], ""],
    ["a b", ["a", "b"], ["a", " b"], ""],
    ["cut", ["cut", " off"], ["cut", ""], ""],
    ["more text", ["more"], ["more"], " text"],
    ["", ["late"], [""], ""],
    ["plain", [], [], "plain"],
    ["é", ["\uFFFD"], ["é"], ""],
  ];
  for (const [text, tokens, pieces, rest] of cases) {
    const found = align(text, tokens.map((each) => ({ token: each })));
    assert.deepEqual(found, { pieces, rest }, text);
    assert.equal(found.pieces.join("") + found.rest, text);
  }
});

test("a request is what was chosen, and nothing else", () => {
  const settings = { mode: "completion", prompt: "p", maxTokens: 3, temperature: 0, seed: null };
  const stream = { stream: true, stream_options: { include_usage: true } };
  assert.deepEqual(requestOf(settings, "m", false), { path: "v1/completions", body: { model: "m", prompt: "p", max_tokens: 3, temperature: 0, ...stream } });
  const chat = requestOf({ ...settings, mode: "chat", seed: 7 }, "m", true);
  assert.equal(chat.path, "v1/chat/completions");
  assert.deepEqual(chat.body.messages, [{ role: "user", content: "p" }]);
  assert.deepEqual([chat.body.seed, chat.body.moa, chat.body.prompt], [7, { return_routing: true }, undefined]);
  assert.equal(requestOf({ ...settings, mode: "instruction" }, "m", false).body.prompt, TEMPLATE.join("p"));
  assert.equal(pieceOf({ choices: [{ delta: { content: "c" }, finish_reason: null }] }).text, "c");
  assert.deepEqual(pieceOf({ choices: [], usage: { completion_tokens: 1 } }), { text: "", routing: null, finish: null, usage: { completion_tokens: 1 }, moa: null });
});

test("routing options are an object, or what is wrong is said", () => {
  const settings = { mode: "completion", prompt: "p", maxTokens: 3, temperature: 0, seed: null, options: optionsOf('{"mode": "soft"}') };
  assert.deepEqual(requestOf(settings, "m", true).body.moa, { mode: "soft", return_routing: true });
  assert.deepEqual(requestOf(settings, "m", false).body.moa, { mode: "soft" });
  assert.deepEqual(optionsOf("  "), {});
  for (const wrong of ["soft", "[]", "null", "3", '{"mode"']) assert.throws(() => optionsOf(wrong), /must be a JSON object/, wrong);
});

test("numbers are short and say what is not known", () => {
  assert.deepEqual([0, 0.254, 3.42, 128.4, 1234, 99_999, 2.5e6, null, NaN].map(compact), ["0", "0.25", "3.42", "128", "1.2k", "100k", "2.5M", "–", "–"]);
  assert.deepEqual([0.00042, 0.0234, 1.234, 42, 600, null].map((each) => duration(each).join(" ").trim()), ["0.4 ms", "23 ms", "1.23 s", "42 s", "10 min", "–"]);
  assert.deepEqual([percent(0.385), percent(0.3856, 1), percent(null)], ["39 %", "38.6 %", "–"]);
  assert.deepEqual([weight(0.415), weight(-0.2, { isSigned: true }), weight(0.2, { isSigned: true }), weight(-0.001, { isSigned: true })], ["0.41", "−0.20", "+0.20", "0.00"]);
  assert.deepEqual([512, 2048, 5.5 * 2 ** 20, 3 * 2 ** 30].map(bytes), ["512 B", "2 KiB", "5.5 MiB", "3 GiB"]);
  assert.deepEqual([ago(null, 9), ago(98, 100), ago(60, 100), ago(0, 7300), ago(0, 200_000)], ["never", "now", "40 s ago", "2 h ago", "2 d ago"]);
});

test("adapters stand in one order, filtered by name; those without a router are told apart", () => {
  const items = [["b", "available", "lora"], ["a", "available", null], ["z", "loaded", "soft_moa"], ["x", "broken", null]].map(([id, state, variant]) => ({ id, state, variant }));
  assert.deepEqual(arrange(items, "").map(({ id }) => id), ["z", "x", "a", "b"]);
  assert.deepEqual(arrange(items, " B").map(({ id }) => id), ["b"]);
  assert.deepEqual(withRouters(items).map(({ id }) => id), ["a", "z"]);
  assert.deepEqual([hasRouter("lora"), hasRouter("mola"), hasRouter(null)], [false, true, null]);
  assert.equal(wordsOf("loaded", { revision: "0123456789" }), "was loaded as 01234567");
  assert.equal(wordsOf("load_failed", { error: "too big" }), "failed to load: too big");
  assert.equal(wordsOf("alias_set", { targets: { a: 9, b: 1 } }), "stands for: a (9), b (1)");
});

test("a line is broken where a value is missing or nobody looked", () => {
  const box = { from: 0, to: 100, most: 10, gap: 8, width: 100, height: 10, pad: 0 };
  const at = (time, value) => ({ time, value });
  assert.deepEqual(pathsOf([at(0, 0), at(2, 10), at(4, null), at(6, 5), at(50, 5), at(52, 20)], box), {
    line: "M0.0 10.0L2.0 0.0M6.0 5.0h0.1M50.0 5.0L52.0 0.0",
    area: "M0.0 10L0.0 10.0L2.0 0.0L2.0 10ZM50.0 10L50.0 5.0L52.0 0.0L52.0 10Z",
  });
  assert.deepEqual(pathsOf([], box), { line: "", area: "" });
});
