import assert from "node:assert/strict";
import { test } from "node:test";

import { eventsOf, SseParser } from "../../../../moa_serve/api/dashboard/page/sse.js";

const TEXT = ": listening\n\nid: 7\nevent: loaded\ndata: {\"a\":1}\n\ndata: one\r\ndata: two\r\n\r\ndata\rdata:  x\r\rretry: 5\nunknown: y\n\ndata: \u{1F600}\n\n";
const EVENTS = [
  { kind: "loaded", data: '{"a":1}', id: "7" },
  { kind: "message", data: "one\ntwo", id: "7" },
  { kind: "message", data: "\n x", id: "7" },
  { kind: "message", data: "\u{1F600}", id: "7" },
];

test("events are read by the standard's rules", () => {
  assert.deepEqual(new SseParser().push(TEXT), EVENTS);
  assert.deepEqual(new SseParser().push(`\uFEFF${TEXT}`), EVENTS);
});

test("events are the same wherever the stream is cut", () => {
  for (let size = 1; size <= TEXT.length; size += 1) {
    const parser = new SseParser();
    const found = [];
    for (let at = 0; at < TEXT.length; at += size) found.push(...parser.push(TEXT.slice(at, at + size)));
    assert.deepEqual(found, EVENTS, `pieces of ${size}`);
  }
});

test("an event that does not end is none", () => {
  assert.deepEqual(new SseParser().push("data: half"), []);
  assert.deepEqual(new SseParser().push("data: half\n"), []);
});

test("a body is read through characters that are cut, and closed when nobody wants more", async () => {
  const bytes = new TextEncoder().encode(TEXT);
  let isCancelled = false;
  const body = () =>
    new ReadableStream({
      start(controller) {
        for (const byte of bytes) controller.enqueue(Uint8Array.of(byte));
      },
      cancel() {
        isCancelled = true;
      },
    });
  const found = [];
  for await (const event of eventsOf(body())) {
    found.push(event);
    if (found.length === EVENTS.length) break;
  }
  assert.deepEqual(found, EVENTS);
  await new Promise((resolve) => setTimeout(resolve, 0));
  assert.ok(isCancelled);
});
