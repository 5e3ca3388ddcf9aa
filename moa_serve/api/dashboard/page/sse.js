// Server-sent events, read from a stream that may be cut anywhere. EventSource cannot send a key, so the page reads them itself.

/** Gives the events of a text that comes in pieces, by the rules of the HTML standard, section 9.2. */
export class SseParser {
  #rest = "";
  #data = [];
  #kind = "";
  #id = "";
  #isFirst = true;

  /** The events that are complete with this piece: {kind, data, id}. */
  push(piece) {
    if (this.#isFirst && piece) {
      piece = piece.replace(/^\uFEFF/, "");
      this.#isFirst = false;
    }
    this.#rest += piece;
    const events = [];
    for (;;) {
      const end = /\r\n|\n|\r(?=[^])/.exec(this.#rest); // a \r at the very end may be half of \r\n
      if (!end) return events;
      const line = this.#rest.slice(0, end.index);
      this.#rest = this.#rest.slice(end.index + end[0].length);
      const event = this.#take(line);
      if (event) events.push(event);
    }
  }

  #take(line) {
    if (line === "") {
      const event = this.#data.length ? { kind: this.#kind || "message", data: this.#data.join("\n"), id: this.#id } : null;
      [this.#data, this.#kind] = [[], ""];
      return event;
    }
    const [, field, value] = /^([^:]*)(?:: ?([^]*))?$/.exec(line);
    if (field === "data") this.#data.push(value ?? "");
    else if (field === "event") this.#kind = value ?? "";
    else if (field === "id" && !value?.includes("\0")) this.#id = value ?? "";
    return null; // a comment, or a field that nobody knows
  }
}

/** The events of a response's body; ends with it. Leaving the loop closes the connection. */
export async function* eventsOf(body) {
  const parser = new SseParser();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    reader.cancel().catch(() => {}); // closed already, or torn
  }
}
