// One question to one model, and its answer as it comes.

import { ApiError } from "./client.js";
import { eventsOf } from "./sse.js";

/** What `moa-serve train` puts around an instruction, and so what most adapters here were trained on. */
export const TEMPLATE = [
  "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n",
  "\n\n### Response:",
];

/** Routing options as they were typed: an object, {} for nothing. Throws an Error that says what they must be. Pure. */
export function optionsOf(text) {
  if (text.trim() === "") return {};
  let options = null;
  try {
    options = JSON.parse(text);
  } catch {
    // told below
  }
  if (options === null || typeof options !== "object" || Array.isArray(options)) {
    throw new Error('Routing options must be a JSON object, such as {"mode": "soft"} or {"disable": ["Q@3-9"]}.');
  }
  return options;
}

/** The path and body of a request. Pure. `settings`: {mode, prompt, maxTokens, temperature, seed (null for none), options}. */
export function requestOf(settings, model, withRouting) {
  const { mode, prompt, maxTokens, temperature, seed } = settings;
  const body = { model, max_tokens: maxTokens, temperature, stream: true, stream_options: { include_usage: true } };
  if (seed !== null) body.seed = seed;
  const moa = { ...settings.options, ...(withRouting ? { return_routing: true } : {}) };
  if (Object.keys(moa).length) body.moa = moa;
  if (mode === "chat") return { path: "v1/chat/completions", body: { ...body, messages: [{ role: "user", content: prompt }] } };
  return { path: "v1/completions", body: { ...body, prompt: mode === "instruction" ? TEMPLATE.join(prompt) : prompt } };
}

/** What one event of a stream adds: {text, routing, finish, usage, moa}, null for what it has not. Pure. */
export function pieceOf(content) {
  const choice = content.choices?.[0];
  return {
    text: choice?.text ?? choice?.delta?.content ?? "",
    routing: choice?.moa?.routing ?? null,
    finish: choice?.finish_reason ?? null,
    usage: content.usage ?? null,
    moa: content.moa ?? null,
  };
}

/**
 * The pieces of an answer.
 * @param isRouted whether the model has a router; null is not known: then routing is asked for, and done without where there is none.
 */
export async function* ask(client, settings, model, isRouted, signal) {
  const response = await begin(client, settings, model, isRouted, signal);
  for await (const { data } of eventsOf(response.body)) {
    if (data === "[DONE]") return;
    const content = JSON.parse(data);
    if (content.error) throw ApiError.of(content, response.status);
    yield pieceOf(content);
  }
  throw new ApiError("the connection ended before the answer did");
}

async function begin(client, settings, model, isRouted, signal) {
  const send = (withRouting) => {
    const { path, body } = requestOf(settings, model, withRouting);
    return client.send(path, { body, signal });
  };
  try {
    return await send(isRouted !== false);
  } catch (error) {
    if (isRouted === null && error.param === "moa.return_routing") return send(false);
    throw error;
  }
}
