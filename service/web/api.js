// Requests: with the API key where there is one, refusals in the server's own words, and a job's events as they come.

const KEY_NAME = "fastlightgen-key";
const RETRY_MS = { first: 2_000, most: 15_000 };
const SILENCE_MS = 45_000; // the server says something every 15 s; without that the connection is dead

export class RequestError extends Error {
  constructor(message, { param = null, code = null, status = 0, retryAfter = 0 } = {}) {
    super(message);
    Object.assign(this, { param, code, status, retryAfter });
  }

  /** Whether a key would help; then the page is asking for one. */
  get isLocked() {
    return this.status === 401 && ["missing_key", "wrong_key"].includes(this.code);
  }
}

/** The API key: in this tab only, and gone with it. */
class Key {
  #memory = null; // where the browser allows no storage

  get value() {
    try {
      return sessionStorage.getItem(KEY_NAME);
    } catch {
      return this.#memory;
    }
  }

  set value(text) {
    this.#memory = text;
    try {
      if (text) sessionStorage.setItem(KEY_NAME, text);
      else sessionStorage.removeItem(KEY_NAME);
    } catch {
      // it stays in memory
    }
  }
}

export const key = new Key();

const listeners = new Set();

/** Have `listener` called with each refusal that a key would have prevented. */
export const onLocked = (listener) => listeners.add(listener);

/** JSON of a successful answer; everything else is a RequestError with the server's own sentence. */
export async function request(path, options) {
  const response = await send(path, options);
  return response.json().catch(() => null);
}

/** Send `body` as JSON. */
export const post = (path, body = {}) =>
  request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** A file that a link cannot open, as it takes the key. */
export async function fetchBlob(path) {
  return (await send(path)).blob();
}

async function send(path, { headers, ...options } = {}) {
  const used = key.value;
  const identity = used ? { Authorization: `Bearer ${used}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...identity } });
  } catch {
    throw new RequestError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const error = await refusal(response);
  // A request that was sent with an earlier key says nothing about this one.
  if (error.isLocked && used === key.value) for (const listener of listeners) listener(error);
  throw error;
}

async function refusal(response) {
  const { status, statusText } = response;
  const { error } = (await response.json().catch(() => null)) ?? {};
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  const message = error?.message ?? `The server answered ${status} ${statusText}.`;
  return new RequestError(message, { param: error?.param, code: error?.code, status, retryAfter });
}

/** The server may be reached under another name than the one it puts in its URLs: stay on the page's origin. */
export function here(url) {
  const { pathname, search } = new URL(url, location.href);
  return pathname + search;
}

// --- events ----------------------------------------------------------------------------------------------------------
// By `fetch`: EventSource cannot send the key.

/**
 * Follow a stream of server-sent events until `onEvent` returns true or `signal` is aborted. A connection that ends, or is
 * silent for too long, is made anew after the last event that came, each time after a longer wait.
 *
 * Throws a RequestError where asking again is no use: 401, 403, 404.
 */
export async function follow(path, { signal, onEvent, onLost }) {
  const stream = { lastId: null, retryMs: RETRY_MS.first };
  for (let failures = 0; !signal.aborted; failures++) {
    let waitMs = 0;
    try {
      for await (const { event, data } of messages(path, stream, signal)) {
        failures = 0;
        if (onEvent(event, data)) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if ([401, 403, 404].includes(error.status)) throw error;
      waitMs = 1000 * (error.retryAfter ?? 0);
    }
    if (signal.aborted) return;
    onLost();
    const backOffMs = Math.min(RETRY_MS.most, stream.retryMs * 2 ** failures) * (0.75 + Math.random() / 2);
    await pause(Math.max(waitMs, backOffMs), signal);
  }
}

/** The messages of one connection. `stream` remembers between connections. */
async function* messages(path, stream, signal) {
  const silence = new AbortController();
  const either = new AbortController();
  const abort = () => either.abort();
  for (const one of [signal, silence.signal]) one.addEventListener("abort", abort);
  let timer = setTimeout(() => silence.abort(), SILENCE_MS);
  try {
    const headers = { Accept: "text/event-stream", ...(stream.lastId && { "Last-Event-ID": stream.lastId }) };
    const response = await send(path, { headers, signal: either.signal, cache: "no-store" });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const parser = new EventParser();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENCE_MS);
      for (const message of parser.feed(value)) {
        stream.lastId = message.id ?? stream.lastId;
        stream.retryMs = message.retry ?? stream.retryMs;
        if (message.data !== undefined) yield message;
      }
    }
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", abort);
    abort(); // whoever stops reading closes the connection
  }
}

/** Server-sent events from text that comes in pieces. */
export class EventParser {
  #rest = "";
  #message = { event: "message" };

  /** The messages that `text` completes: {event, data, id, retry}. */
  *feed(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/); // a CR at the end may be half of a CRLF
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line) this.#field(line);
      else {
        yield this.#message;
        this.#message = { event: "message" };
      }
    }
  }

  #field(line) {
    const [, name, value] = /^([^:]*):? ?([^]*)$/.exec(line);
    const message = this.#message;
    if (name === "data") message.data = message.data === undefined ? value : `${message.data}\n${value}`;
    else if (name === "event" || name === "id") message[name] = value;
    else if (name === "retry" && /^\d+$/.test(value)) message.retry = Number(value);
  }
}

/** Do it now, and from then on again and again until `signal` is aborted; what goes wrong is thrown this first time only. */
export async function poll(act, ms, signal) {
  await act();
  repeat(act, ms, signal);
}

async function repeat(act, ms, signal) {
  for (;;) {
    await pause(ms, signal);
    if (signal.aborted) return;
    if (document.hidden) continue;
    await act().catch((error) => {
      if (!(error instanceof RequestError)) throw error;
    });
  }
}

/** Wait, or until `signal` is aborted. */
function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
  });
}
