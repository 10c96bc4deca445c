/** What the user has chosen. It is kept in the address, so a link restores it. */

const DEFAULTS = {
  view: "next", // next, text, compare, inside
  model: "",
  prompt: "",
  path: [], // ids of the tokens taken after the prompt
  paths: [], // the ends of all branches taken so far
  temperature: 1,
  top_k: null,
  top_p: null,
  min_p: null,
  repetition_penalty: 1,
  seed: 123,
  draws: 0,
  bars: 20,
  max_new_tokens: 60,
  mode: "generate", // of the view Text: generate, score
  text: "", // the text to score
  models: [], // of the view Side by side
  positions: 12,
  layer: 0,
  head: null, // null: the mean of all heads
};

export const state = structuredClone(DEFAULTS);

const VIEWS = ["next", "text", "compare", "inside"];
const MAX_TEXT_IN_LINK = 4000; // characters; browsers refuse very long addresses
const listeners = [];
let timer = 0;

/** Call `listener` with the names of the changed values, after every change. */
export function onChange(listener) {
  listeners.push(listener);
}

/** Change values of the state. Listeners run once, and the address follows. */
export function update(changes) {
  const changed = Object.keys(changes).filter(
    (name) => JSON.stringify(state[name]) !== JSON.stringify(changes[name]),
  );
  if (changed.length === 0) return;
  Object.assign(state, changes);
  notify(changed);
  clearTimeout(timer);
  timer = setTimeout(() => history.replaceState(null, "", toHash()), 200);
}

/** Tell the listeners that something outside the state has changed, for example a model. */
export function notify(names) {
  for (const listener of listeners) listener(new Set(names));
}

/** The fields of a request that choose the next token's probabilities. */
export function sampling() {
  const { temperature, top_k, top_p, min_p, repetition_penalty } = state;
  return { temperature, top_k, top_p, min_p, repetition_penalty };
}

/** The settings in one line, as captions show them. */
export function samplingText() {
  const parts = [
    `temperature ${state.temperature}`,
    state.top_k !== null && `top-k ${state.top_k}`,
    state.top_p !== null && `top-p ${state.top_p}`,
    state.min_p !== null && `min-p ${state.min_p}`,
    state.repetition_penalty !== 1 && `repetition penalty ${state.repetition_penalty}`,
    `seed ${state.seed}`,
  ];
  return parts.filter(Boolean).join(", ");
}

const isTooLong = (name) => state[name].length > MAX_TEXT_IN_LINK;

/** Whether the address holds all of the state. */
export const isLinkComplete = () => !isTooLong("prompt") && !isTooLong("text");

/** The state as the part of the address after "#". A long text is left out, and the path after a long prompt. */
export function toHash() {
  const fields = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (JSON.stringify(value) === JSON.stringify(DEFAULTS[name])) continue;
    if (name === "text" && isTooLong("text")) continue;
    if (["prompt", "path", "paths"].includes(name) && isTooLong("prompt")) continue;
    if (name === "paths") fields.set(name, value.map((path) => path.join(".")).join("_"));
    else if (name === "path") fields.set(name, value.join("."));
    else if (name === "models") for (const model of value) fields.append(name, model);
    else fields.set(name, value === null ? "" : value);
  }
  return `#${fields}`;
}

/** The values in a permanent link. What is missing or damaged has its default. */
export function fromHash(hash) {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  const values = structuredClone(DEFAULTS);
  for (const name of Object.keys(DEFAULTS)) {
    if (!fields.has(name)) continue;
    const text = fields.get(name);
    if (name === "paths")
      values.paths = text
        .split("_")
        .map(toIds)
        .filter((ids) => ids.length);
    else if (name === "path") values.path = toIds(text);
    else if (name === "models") values.models = fields.getAll(name);
    else if (typeof DEFAULTS[name] === "string") values[name] = text;
    else if (text === "") values[name] = DEFAULTS[name] === null ? null : DEFAULTS[name];
    else if (Number.isFinite(Number(text))) values[name] = Number(text);
  }
  if (!VIEWS.includes(values.view)) values.view = "next";
  if (values.mode !== "score") values.mode = "generate";
  return values;
}

function toIds(text) {
  return text
    .split(".")
    .filter((part) => /^\d+$/.test(part))
    .map(Number);
}
