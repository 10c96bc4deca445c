/** The sampling settings: a slider and a number for each. */

import { element } from "./elements.js";
import { onChange, samplingText, state, update } from "./state.js";

const steps = (from, to, by) =>
  Array.from({ length: Math.round((to - from) / by) + 1 }, (_, i) =>
    Number((from + i * by).toFixed(4)),
  );

// the positions of each slider; null turns a setting off
const SETTINGS = [
  {
    name: "temperature",
    label: "Temperature",
    stops: steps(0, 2, 0.05),
    hint: "0 takes the most probable token. Above 1, rare tokens become more probable.",
  },
  {
    name: "top_k",
    label: "Top-k",
    stops: [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 30, 40, 50, 75, 100, 200, 500, 1000, null],
    hint: "Keeps only the k most probable tokens.",
  },
  {
    name: "top_p",
    label: "Top-p",
    stops: [...steps(0.05, 0.95, 0.05), 0.98, 0.99, null],
    hint: "Keeps the most probable tokens that together reach this probability.",
  },
  {
    name: "min_p",
    label: "Min-p",
    stops: [null, 0.001, 0.002, 0.005, ...steps(0.01, 0.1, 0.01), ...steps(0.15, 1, 0.05)],
    hint: "Keeps tokens with at least this fraction of the highest probability.",
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    stops: steps(1, 2, 0.05),
    hint: "Above 1, tokens that are already in the text become less probable.",
  },
];

export function startSettings() {
  const sliders = document.getElementById("sliders");
  for (const setting of SETTINGS) sliders.append(slider(setting));
  sliders.append(seedField());

  const summary = document.getElementById("sampling-summary");
  const showSummary = () => (summary.textContent = samplingText());
  onChange(showSummary);
  showSummary();
  // on a narrow screen the sliders would fill it
  if (matchMedia("(max-width: 640px)").matches) document.getElementById("sampling").open = false;
}

function slider({ name, label, stops, hint }) {
  const range = element("input", {
    type: "range",
    id: name,
    min: 0,
    max: stops.length - 1,
    step: 1,
    "aria-describedby": `${name}-hint`,
    oninput: () => update({ [name]: stops[range.value] }),
  });
  const number = element("input", {
    type: "number",
    step: "any",
    placeholder: "off",
    "aria-label": `${label}, as a number`,
    onchange: () => {
      const isOff = number.value === "";
      const off = stops.includes(null) ? null : 1;
      update({ [name]: isOff ? off : Number(number.value) });
      show();
    },
  });
  const show = () => {
    const value = state[name];
    range.value = nearestStop(stops, value);
    range.setAttribute("aria-valuetext", value === null ? "off" : String(value));
    if (document.activeElement !== number) number.value = value ?? "";
  };
  onChange((changed) => changed.has(name) && show());
  show();
  return element(
    "div",
    { class: "field" },
    element("div", { class: "label-row" }, element("label", { for: name }, label), number),
    range,
    element("p", { class: "hint", id: `${name}-hint` }, hint),
  );
}

function nearestStop(stops, value) {
  if (value === null) return stops.indexOf(null);
  const distance = (stop) => (stop === null ? Infinity : Math.abs(stop - value));
  return stops.reduce((best, stop, i) => (distance(stop) < distance(stops[best]) ? i : best), 0);
}

function seedField() {
  const number = element("input", {
    type: "number",
    id: "seed",
    min: 0,
    step: 1,
    "aria-describedby": "seed-hint",
    onchange: () => update({ seed: Math.trunc(Number(number.value)) }),
  });
  const show = () => (number.value = state.seed);
  onChange((changed) => changed.has("seed") && show());
  show();
  const draw = () => update({ seed: Math.floor(Math.random() * 1e6) });
  return element(
    "div",
    { class: "field" },
    element("div", { class: "label-row" }, element("label", { for: "seed" }, "Seed"), number),
    element("button", { type: "button", onclick: draw }, "New seed"),
    element(
      "p",
      { class: "hint", id: "seed-hint" },
      "Start of the random numbers. The same seed gives the same text.",
    ),
  );
}
