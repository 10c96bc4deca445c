/** A text whose tokens are shaded by surprisal; each shows its rank and the candidates it was chosen from. */

import { barTrack } from "./bars.js";
import { element, formatCount, formatNumber, formatProbability, newId } from "./elements.js";
import { makeNavigable } from "./navigation.js";
import { describe, TokenDecoder, tokenNodes } from "./tokens.js";

const FULL_SHADE = 10; // nats; e^-10 is 1 in 22,026

const shadeOf = (surprisal) => Math.min(1, (surprisal ?? 0) / FULL_SHADE);

export class ShadedText {
  entries = [];
  prompt = "";
  #decoder = new TokenDecoder();
  #texts = [];
  #marked = -1;

  /** `onActive(entry)` runs when a token is pointed at or reached by the arrow keys. */
  constructor(label, onActive) {
    this.element = element("div", { class: "shaded", role: "listbox", "aria-label": label });
    this.clear("");
    makeNavigable(this.element, "[role=option]", {
      onActive: (item) => onActive(this.entries[item.dataset.index]),
    });
  }

  clear(prompt) {
    this.prompt = prompt;
    this.entries = [];
    this.#texts = [];
    this.#marked = -1;
    this.#decoder = new TokenDecoder();
    this.element.replaceChildren(element("span", { class: "prompt" }, prompt));
    this.element.removeAttribute("aria-activedescendant");
  }

  /** Add tokens: `{token, surprisal, rank, candidates}`. */
  append(entries) {
    const spans = entries.map((entry) => {
      const text = this.#decoder.text(entry.token);
      this.#texts.push(text);
      this.entries.push(entry);
      const span = element(
        "span",
        {
          role: "option",
          class: "shade",
          "data-index": this.entries.length - 1,
          id: newId("token"),
        },
        ...withLineBreaks(text),
      );
      span.style.setProperty("--share", `${100 * shadeOf(entry.surprisal)}%`);
      return span;
    });
    this.element.append(...spans);
  }

  /** Show what is left of an incomplete character at the end of the text. */
  end() {
    const rest = this.#decoder.end();
    if (!rest) return;
    this.#texts[this.#texts.length - 1] += rest;
    this.element.lastElementChild.append(rest);
  }

  /** Mark the token at which this text first differs from others; -1: none. */
  mark(index) {
    if (index === this.#marked) return;
    const spans = this.element.querySelectorAll("[role=option]");
    spans[this.#marked]?.classList.remove("differs");
    spans[index]?.classList.add("differs");
    this.#marked = spans[index] ? index : -1;
  }

  /** The mean of the known surprisals in nats; NaN without any. */
  get meanSurprisal() {
    const known = this.entries.filter(({ surprisal }) => surprisal !== null);
    return known.reduce((sum, { surprisal }) => sum + surprisal, 0) / known.length;
  }

  /** The text as picture.js paints it. */
  get painted() {
    return this.entries.map(({ surprisal }, i) => ({
      text: this.#texts[i],
      shade: shadeOf(surprisal),
      isMarked: i === this.#marked,
    }));
  }

  /** The rows of a table, without a header. */
  get rows() {
    return this.entries.map(({ token, surprisal, rank, candidates }, i) => [
      i + 1,
      token.id,
      token.text,
      surprisal,
      rank,
      ...candidates.flatMap(({ text, probability }) => [text, probability]),
    ]);
  }
}

/** Nodes of a text in which line breaks have a sign, so a token that is one can be seen and pointed at. */
function withLineBreaks(text) {
  const parts = text.split(/(\n)/).filter((part) => part !== "");
  return parts.flatMap((part) =>
    part === "\n" ? [element("span", { class: "sign" }, "↵"), part] : [part],
  );
}

/** The header of `ShadedText.rows`. */
export const COLUMNS = [
  "token",
  "id",
  "text",
  "surprisal",
  "rank",
  ...[1, 2, 3, 4, 5].flatMap((i) => [`candidate_${i}`, `probability_${i}`]),
];

/** The scale of the shades. */
export function shadeLegend() {
  return element(
    "div",
    { class: "scale" },
    element(
      "div",
      {},
      element("span", { class: "ramp surprise", "aria-hidden": "true" }),
      element(
        "span",
        { class: "axis" },
        element("span", {}, "0"),
        element("span", {}, `${FULL_SHADE} nats or more`),
      ),
    ),
    element(
      "span",
      { class: "hint" },
      "Surprisal: minus the natural logarithm of the model's probability; its unit is the nat. A token that the model is sure of has 0.",
    ),
  );
}

/** The panel beside a text that shows one token. */
export class TokenDetail {
  constructor() {
    this.element = element("aside", { class: "detail", "aria-live": "polite" });
    this.clear();
  }

  clear() {
    this.element.replaceChildren(
      element("h2", {}, "One token"),
      element(
        "p",
        { class: "hint" },
        "Point at a token, or move with the arrow keys, to see its rank and the five tokens it was chosen from.",
      ),
    );
  }

  show({ token, surprisal, rank, candidates }) {
    const maximum = Math.max(
      1e-6,
      ...candidates.flatMap((candidate) => [candidate.probability, candidate.model_probability]),
    );
    const fact = (name, value) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value));
    const isFirst = candidates.length === 0;
    this.element.replaceChildren(
      element("h2", {}, element("span", { class: "token" }, ...tokenNodes(token))),
      element("p", { class: "hint" }, describe(token)),
      ...(!isFirst
        ? [
            element(
              "dl",
              { class: "pairs" },
              fact("Rank", rank === 1 ? "1, the most probable" : formatCount(rank)),
              fact(
                "Probability of the model",
                formatProbability(surprisal === null ? 0 : Math.exp(-surprisal)),
              ),
              fact("Surprisal", `${formatNumber(surprisal)} nats`),
            ),
          ]
        : [
            element(
              "p",
              { class: "hint" },
              "The first token has nothing before it, so it has no probability.",
            ),
          ]),
      ...(!isFirst
        ? [
            element(
              "p",
              { class: "hint" },
              "The five most probable tokens here. Outline: of the model. Fill: after the settings.",
            ),
          ]
        : []),
      element(
        "ol",
        { class: "candidates" },
        ...candidates.map((candidate) =>
          element(
            "li",
            { class: candidate.id === token.id && "chosen" },
            element("span", { class: "token" }, ...tokenNodes(candidate)),
            barTrack(candidate, maximum),
            element("span", { class: "figure" }, formatProbability(candidate.probability)),
          ),
        ),
      ),
    );
  }
}
