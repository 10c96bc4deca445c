/** Requests to the server: JSON, event streams, retries while the model is busy, the access token. */

const TOKEN_KEY = "gpt_lightning token";

/** The server's message about a request that failed. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let askForToken = null;
let asking = null;

/** Set the function that asks the user for the access token; it gets the token that was refused. */
export function onTokenNeeded(ask) {
  askForToken = ask;
}

/**
 * Answer of the server. Waits and retries while the model is busy (429); `onBusy` gets the seconds.
 * Asks for the access token if the server needs one (401).
 */
async function request(method, path, body, { signal, onBusy } = {}) {
  for (;;) {
    const token = sessionStorage.getItem(TOKEN_KEY);
    const headers = {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (token) headers.Authorization = `Bearer ${token}`;
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: JSON.stringify(body) });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError("The server does not answer. Check that it is still running.");
    }
    if (response.ok) return response;
    if (response.status === 401 && askForToken) {
      asking ??= askForToken(token).then((given) => {
        sessionStorage.setItem(TOKEN_KEY, given);
        asking = null;
      });
      await asking;
    } else if (response.status === 429) {
      const seconds = Number(response.headers.get("Retry-After")) || 1;
      onBusy?.(seconds);
      await pause(1000 * seconds, signal);
    } else {
      throw await errorOf(response);
    }
  }
}

async function errorOf(response) {
  let message = `The server answered ${response.status} ${response.statusText}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // the answer is not in the server's form, for example from a proxy
  }
  return new ApiError(message, response.status);
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

export async function getState() {
  return (await request("GET", "/api/state")).json();
}

export async function post(name, body, options) {
  return (await request("POST", `/api/${name}`, body, options)).json();
}

/** Events of a text/event-stream answer. Leaving the loop closes the connection. */
export async function* stream(name, body, options) {
  const response = await request("POST", `/api/${name}`, body, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      buffer += value;
      const events = buffer.split(/\r?\n\r?\n/);
      buffer = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Requests of one kind of which only the newest matters. One is under way at a time; the newest waits
 * for it, and those between are dropped. So answers come in order, and a slider cannot flood the server.
 */
export class LatestRequest {
  #last = "";
  #next = null;
  #isRunning = false;
  #isBusy = false;
  #controller = null;

  /** `show(answer, body)` runs for each answer. `completed(body)` is what is sent in place of `body`. */
  constructor(name, status, show, completed = (body) => body) {
    this.name = name;
    this.status = status;
    this.show = show;
    this.completed = completed;
  }

  /** Send `body` unless it is the last one sent. `version` distinguishes equal bodies, for example a reloaded model. */
  send(body, version = 0) {
    const key = JSON.stringify([body, version]);
    if (key === this.#last) return;
    this.#last = key;
    this.#next = body;
    if (this.#isBusy) this.#controller.abort(); // what waits for a busy model is out of date
    if (!this.#isRunning) this.#run();
  }

  /** Send the next body even if it equals the last. */
  forget() {
    this.#last = "";
  }

  async #run() {
    this.#isRunning = true;
    while (this.#next !== null) {
      const body = this.#next;
      this.#next = null;
      this.#controller = new AbortController();
      this.status.loading();
      try {
        const answer = await post(this.name, this.completed(body), {
          signal: this.#controller.signal,
          onBusy: (seconds) => {
            this.#isBusy = true;
            this.status.busy(seconds);
          },
        });
        if (this.#next !== null && !sameInput(body, this.#next)) continue;
        this.show(answer, body);
        this.status.done();
      } catch (error) {
        if (this.#next !== null) continue;
        this.forget();
        this.status.error(error, () => this.send(body));
      } finally {
        this.#isBusy = false;
      }
    }
    this.#isRunning = false;
  }
}

/** Whether two requests differ in their settings only. An answer to an old prompt is not shown. */
function sameInput(a, b) {
  const input = ({ model, prompt, path, text }) => JSON.stringify([model, prompt, path, text]);
  return input(a) === input(b);
}
