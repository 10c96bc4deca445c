/** Bars of a distribution: the model's probability as an outline, the one after the settings as a fill. */

import { element, formatProbability } from "./elements.js";

/** A track with an outline, a fill and, below it, the share of the draws. `maximum` is the full width. */
export function barTrack({ model_probability, probability, drawn = 0 }, maximum, draws = 0) {
  const track = element(
    "span",
    { class: "track" },
    element("span", { class: "fill" }),
    element("span", { class: "outline" }),
    element("span", { class: "drawn" }),
  );
  setBar(track, { model_probability, probability, drawn }, maximum, draws);
  return track;
}

export function setBar(track, { model_probability, probability, drawn = 0 }, maximum, draws = 0) {
  const [fill, outline, share] = track.children;
  const width = (p) => `${(100 * p) / maximum}%`;
  fill.style.width = width(probability);
  outline.style.width = width(model_probability);
  share.style.width = draws ? width(drawn / draws) : "0";
}

/** The largest probability among the bars, rounded up to a value that is easy to read. */
export function axisMaximum(bars, draws = 0) {
  const largest = Math.max(
    1e-6,
    ...bars.flatMap((bar) => [
      bar.model_probability,
      bar.probability,
      draws ? bar.drawn / draws : 0,
    ]),
  );
  const power = 10 ** Math.floor(Math.log10(largest));
  return Math.min(
    1,
    [1, 2, 5, 10].map((step) => step * power).find((value) => value >= largest - 1e-9),
  );
}

/** The ends and the middle of the axis. */
export function axis(maximum) {
  return element(
    "span",
    { class: "axis", "aria-hidden": "true" },
    ...[0, maximum / 2, maximum].map((value) => element("span", {}, axisLabel(value))),
  );
}

export function axisLabel(value) {
  return value !== 0 && value < 0.0001
    ? formatProbability(value)
    : String(Number(value.toPrecision(2)));
}

/** What the parts of a bar mean. */
export function barLegend(hasDraws) {
  const entry = (kind, text) =>
    element("li", {}, element("span", { class: `key ${kind}`, "aria-hidden": "true" }), text);
  return element(
    "ul",
    { class: "legend" },
    entry("outline", "probability of the model"),
    entry("fill", "probability after your settings"),
    ...(hasDraws ? [entry("drawn", "share of the draws")] : []),
  );
}
