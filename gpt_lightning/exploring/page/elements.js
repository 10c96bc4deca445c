/** Small helpers for the page's elements and numbers. Text is always inserted as text, never as HTML. */

/**
 * A new element. Functions become event listeners, `false`, `null` and `undefined` leave an attribute
 * out, and strings among the children become text nodes.
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined)
      made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

let lastId = 0;

/** An id that no other element of the page has. */
export function newId(prefix) {
  lastId += 1;
  return `${prefix}-${lastId}`;
}

/** What stands for a number that does not exist. */
const NONE = "–";

/** A probability: four decimals, or a power of ten where four decimals would be too few. */
export function formatProbability(p) {
  if (p === null) return NONE;
  if (p === 0) return "0";
  if (p >= 0.0001) return p.toFixed(4);
  const [digits, power] = p.toExponential(1).split("e");
  return `${digits}·10${superscript(power)}`;
}

function superscript(power) {
  return [...String(Number(power))].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");
}

export function formatNumber(value, decimals = 2) {
  if (value === null || !Number.isFinite(value)) return NONE;
  return value.toLocaleString("en", {
    minimumFractionDigits: decimals,
    maximumFractionDigits: decimals,
  });
}

export const formatCount = (count) => count.toLocaleString("en");

/** "1 token", "2 tokens". */
export const plural = (count, noun) => `${formatCount(count)} ${noun}${count === 1 ? "" : "s"}`;

/** A list of facts: name, value and an explanation in one line. */
export function facts(list) {
  return element(
    "dl",
    { class: "facts" },
    ...list.map(({ name, value, hint }) =>
      element(
        "div",
        {},
        element("dt", {}, name),
        element("dd", {}, value),
        element("dd", { class: "hint" }, hint),
      ),
    ),
  );
}

/** A select whose options are `[value, text]`; the text is the value where it is missing. */
export function select(attributes, options) {
  return element(
    "select",
    attributes,
    ...options.map(([value, text = String(value)]) => element("option", { value }, text)),
  );
}
