// The API, asked with the key that was typed. Paths are relative to the page's, so that a proxy may put the server below a prefix.

const STORED = "moa-serve key"; // in the session storage: gone with the tab, and never in a URL

/** What the server said in its error shape, or that it said nothing. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "unreachable", param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }

  static of(content, status) {
    const { message = `the server answered ${status}`, code = "unknown", param = null } = content?.error ?? {};
    return new ApiError(message, { status, code, param });
  }
}

export class Client {
  /** Called with the server's words where it wants another key. */
  onKeyWanted = () => {};

  get key() {
    return sessionStorage.getItem(STORED) ?? "";
  }

  set key(value) {
    if (value) sessionStorage.setItem(STORED, value);
    else sessionStorage.removeItem(STORED);
  }

  /** The response, if it is one of success. Raises ApiError; AbortError where `signal` says so. */
  async send(path, { body, headers = {}, signal, timeout } = {}) {
    const sent = { ...headers };
    const key = this.key;
    if (key) sent.Authorization = `Bearer ${key}`;
    if (body !== undefined) sent["Content-Type"] = "application/json";
    const signals = [signal, timeout && AbortSignal.timeout(timeout)].filter(Boolean);
    let response;
    try {
      response = await fetch(path, {
        method: body === undefined ? "GET" : "POST",
        headers: sent,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal: signals.length ? AbortSignal.any(signals) : undefined,
        cache: "no-store",
        credentials: "omit",
        redirect: "error",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("the server cannot be reached");
    }
    if (response.ok) return response;
    const error = ApiError.of(await response.json().catch(() => null), response.status);
    if (response.status === 401 && key === this.key) this.onKeyWanted(error.message, Boolean(key));
    throw error;
  }

  async json(path) {
    return (await this.send(path, { timeout: 10_000 })).json();
  }

  async text(path) {
    return (await this.send(path, { timeout: 10_000 })).text();
  }

  /** Whether new requests are served: {isReady, message}. */
  async health() {
    try {
      await this.send("health/ready", { timeout: 5000 });
      return { isReady: true, message: "ready" };
    } catch (error) {
      return { isReady: false, message: error.message };
    }
  }
}
