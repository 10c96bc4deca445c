/** The line that says that a view computes, waits for a busy model, or has failed. */

import { element } from "./elements.js";

const DELAY = 250; // milliseconds; a shorter wait needs no word

export class Status {
  #timer = 0;

  /** `content` is dimmed while it does not show what the user has asked for. */
  constructor(content) {
    this.content = content;
    this.element = element("div", { class: "status", role: "status" });
  }

  loading(message = "Computing …") {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#say("loading", message);
      this.content.classList.add("stale");
    }, DELAY);
  }

  busy(seconds) {
    const wait = seconds === 1 ? "1 second" : `${seconds} seconds`;
    this.#say("busy", `The model is busy with other requests. The page tries again in ${wait}.`);
    this.content.classList.add("stale");
  }

  error(error, retry) {
    const again = retry && element("button", { type: "button", onclick: retry }, "Try again");
    this.#say("error", error.message, ...(again ? [again] : []));
    this.content.classList.add("stale");
  }

  done(message = "") {
    this.#say("", message);
    this.content.classList.remove("stale");
  }

  #say(kind, ...parts) {
    clearTimeout(this.#timer);
    this.element.dataset.kind = kind;
    this.element.replaceChildren(
      ...parts.map((part) => (typeof part === "string" ? element("span", {}, part) : part)),
    );
  }
}
