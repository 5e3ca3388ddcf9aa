// One answer of the playground: its tokens in colours as they come, and what it took.

import { h, setText } from "./dom.js";
import { compact, count, duration, percent } from "./format.js";
import { align, keptOf, meanOf, weightOf } from "./routing.js";
import { paint } from "./scales.js";

const FINISHES = { stop: "by itself", length: "at its limit", aborted: "stopped here", error: "with an error" };

/** What a token is coloured by. `choice`: {expert: a name or null for all, isShare: the share of experts kept, layer: an index or null}. Pure. */
export function valueOf(experts, token, { expert, isShare, layer }) {
  if (!isShare) return weightOf(experts, token, expert, layer);
  const flags = (layer === null ? token.selected : [token.selected[layer]]).flat();
  return flags.length ? { value: meanOf(flags.map(Number)), isKept: true } : null;
}

export class Pane {
  experts = null; // names by layer, once the answer brings them
  tokens = [];
  values = []; // of each token by the last choice: {value, isKept} or null
  #text = "";
  #spans = [];
  #isDue = false;

  /** `onToken(pane, index, isClick)`: a token is pointed at, walked to or clicked. `onDraw`: there are new tokens to colour. */
  constructor({ onToken, onDraw }) {
    this.onDraw = onDraw;
    this.title = h("h3", {}, "–");
    this.kind = h("span", { class: "muted" });
    this.state = h("p", { class: "pane-state", role: "status" });
    this.list = h("span", { class: "tokens" });
    this.rest = h("span", { class: "rest" });
    this.answer = h("div", { class: "answer", tabindex: 0, role: "group", "aria-label": "Answer", "data-empty": "The answer comes here." }, this.list, this.rest);
    this.problem = h("p", { class: "problem", role: "alert", hidden: true });
    this.facts = h("dl", { class: "pane-facts" });
    this.element = h("article", { class: "panel pane" }, h("div", { class: "panel-head" }, this.title, this.kind, this.state), this.answer, this.problem, this.facts);
    const indexOf = (event) => this.#spans.indexOf(event.target.closest(".token"));
    const tell = (isClick) => (event) => {
      const index = indexOf(event);
      if (index >= 0) onToken(this, index, isClick);
    };
    this.list.addEventListener("pointerover", tell(false));
    this.list.addEventListener("focusin", (event) => {
      this.#roam(indexOf(event));
      tell(false)(event);
    });
    this.list.addEventListener("click", tell(true));
    this.list.addEventListener("keydown", (event) => this.#walk(event, indexOf(event), onToken));
  }

  /** Name it, and forget the answer before. */
  begin(model, kind) {
    setText(this.title, model);
    setText(this.kind, kind);
    [this.experts, this.tokens, this.values, this.#text, this.#spans] = [null, [], [], "", []];
    this.list.replaceChildren();
    this.list.removeAttribute("role");
    this.list.removeAttribute("aria-label");
    setText(this.rest, "");
    this.fail(null);
    this.facts.replaceChildren();
    setText(this.state, "waiting");
    this.element.classList.add("running");
  }

  /** Take a piece of ask.js. */
  add({ text, routing }) {
    if (routing?.experts) this.experts = routing.experts;
    if (routing) this.tokens.push(...routing.tokens);
    this.#text += text;
    setText(this.state, "running");
    if (this.#isDue) return;
    this.#isDue = true;
    requestAnimationFrame(() => this.#show());
  }

  end({ finish, usage, moa, seconds }) {
    this.#show();
    this.element.classList.remove("running");
    setText(this.state, `ended ${FINISHES[finish] ?? finish}`);
    const timings = moa?.timings ?? {};
    const done = usage?.moa?.evaluations_done;
    const skipped = usage?.moa?.evaluations_skipped;
    const facts = [
      ["First token", duration(timings.first_token ?? seconds.first).join(" ")],
      ["Tokens/s", timings.tokens_per_second ? compact(timings.tokens_per_second) : null],
      ["Tokens", usage ? count(usage.completion_tokens) : this.tokens.length ? count(this.tokens.length) : null],
      ["Experts skipped", done === undefined ? null : percent(done + skipped ? skipped / (done + skipped) : 0)],
    ];
    this.facts.replaceChildren(...facts.filter(([, value]) => value !== null).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  }

  fail(error) {
    this.problem.hidden = error === null;
    setText(this.problem, error === null ? "" : error.message);
  }

  #show() {
    this.#isDue = false;
    const { pieces, rest } = align(this.#text, this.tokens);
    pieces.forEach((piece, index) => {
      if (!this.#spans[index]) {
        this.#spans.push(h("span", { class: "token", role: "option", "aria-selected": "false", tabindex: index === 0 ? 0 : -1 }));
        this.list.append(this.#spans[index]);
      }
      const span = this.#spans[index];
      setText(span, piece);
      span.classList.toggle("empty", piece === "");
      span.classList.toggle("break", /^\s*\n\s*$/.test(piece));
    });
    if (pieces.length && !this.list.hasAttribute("role")) {
      this.list.setAttribute("role", "listbox");
      this.list.setAttribute("aria-orientation", "horizontal");
      this.list.setAttribute("aria-label", `Tokens of the answer of ${this.title.textContent}`);
    }
    setText(this.rest, rest);
    this.onDraw();
  }

  /** The values that `choice` gives the tokens, which `paint` then shows. */
  measure(choice) {
    this.values = this.experts === null ? [] : this.tokens.map((token) => valueOf(this.experts, token, choice));
    return this.values.map((found) => found?.value ?? null);
  }

  paint(scale, what) {
    this.#spans.forEach((span, index) => {
      const found = this.values[index] ?? null;
      paint(span, scale, found?.value ?? null);
      span.classList.toggle("off", found !== null && !found.isKept);
      span.dataset.weight = found === null ? "" : found.value.toFixed(4);
      const name = span.textContent.trim() || "no text";
      const word = found === null ? "" : `, ${what} ${found.value.toFixed(2)}${found.isKept ? "" : ", left out"}`;
      span.setAttribute("aria-label", name + word);
    });
  }

  keptOf(index) {
    return keptOf(this.tokens[index]);
  }

  pieceAt(index) {
    return this.#spans[index].textContent;
  }

  select(index) {
    this.#spans.forEach((span, at) => span.setAttribute("aria-selected", String(at === index)));
  }

  focusAt(index) {
    this.#spans[index]?.focus();
  }

  #roam(index) {
    if (index < 0) return;
    this.#spans.forEach((span, at) => (span.tabIndex = at === index ? 0 : -1));
  }

  #walk(event, index, onToken) {
    if (index < 0) return;
    const last = this.#spans.length - 1;
    const next = { ArrowRight: index + 1, ArrowLeft: index - 1, ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: last }[event.key];
    if (next !== undefined) {
      event.preventDefault();
      this.focusAt(Math.min(Math.max(next, 0), last));
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      onToken(this, index, true);
    }
  }
}

