/** The models of the server: which one is chosen, what is known of it, and when its file has changed. */

import { getState, post } from "./api.js";
import { element, formatCount, plural } from "./elements.js";
import { notify, onChange, state, update } from "./state.js";
import { knownTokens } from "./tokens.js";

const POLL_INTERVAL = 2000; // milliseconds
const FOLLOW_KEY = "gpt_lightning follow";

let models = [];
const revisions = new Map(); // the revision of each model that was last seen in memory
const reloads = new Map(); // how often the weights of a model have changed while the page was open
const loading = new Set();
const failures = new Map(); // of each model that could not be loaded: the revision of its file, and the cause
let pollMessage = ""; // why the models are not known
let choiceMessage = ""; // why another model is shown than the one that was chosen

const byId = (id) => document.getElementById(id);

export const allModels = () => models;
export const modelOf = (id) => models.find((model) => model.id === id);
export const reloadsOf = (id) => reloads.get(id) ?? 0;

/** "quickstart, step 120": the model and the step of its weights in memory, or else on disk. */
export function modelName(id) {
  const model = modelOf(id);
  const step = model?.loaded_step ?? model?.step ?? null;
  return step === null ? id : `${id}, step ${formatCount(step)}`;
}

/** Read the models, show them, and look for new checkpoints from now on. */
export async function startModels() {
  const answer = await getState();
  update({ prompt: state.prompt || answer.default_prompt });
  accept(answer.models);
  byId("model").addEventListener("change", (event) => choose(event.target.value));
  byId("follow").checked = localStorage.getItem(FOLLOW_KEY) === "true";
  byId("follow").addEventListener("change", (event) => {
    localStorage.setItem(FOLLOW_KEY, event.target.checked);
    showNotices();
  });
  onChange((changed) => {
    if (changed.has("model")) showModel();
    if (changed.has("model") || changed.has("models")) showNotices();
  });
  setInterval(poll, POLL_INTERVAL);
  showModel();
  showNotices();
}

/** Choose a model. The path stays if its ids mean the same tokens. */
function choose(id) {
  const isSame = hasSameVocabulary(state.model, id);
  if (!isSame) knownTokens.clear();
  choiceMessage = "";
  update({ model: id, ...(isSame ? {} : { path: [], paths: [] }) });
}

/** `id`, or the id of the first model if the server has no such model; then a notice says so. */
export function availableModel(id) {
  if (models.length === 0) return id; // they are not known yet
  const isAvailable = modelOf(id) !== undefined;
  const first = models[0].id;
  choiceMessage = isAvailable ? "" : `The server has no model “${id}”. The page shows ${first}.`;
  showNotices();
  return isAvailable ? id : first;
}

/** Whether two models are known to have the same tokens; of a model that is not loaded, only the source is known. */
export function hasSameVocabulary(id, other) {
  return haveSameVocabulary(modelOf(id), modelOf(other));
}

function haveSameVocabulary(a, b) {
  if (!a || !b) return false;
  return a.source === b.source || (a.vocab_size !== null && a.vocab_size === b.vocab_size);
}

/** Ask again for the models, for example after one has been loaded by its first request. */
export async function poll() {
  if (document.hidden) return;
  try {
    accept((await getState()).models);
    pollMessage = "";
  } catch (error) {
    pollMessage = error.message;
  }
  showModel();
  showNotices();
}

function accept(newModels) {
  const loaded = newModels.filter((model) => model.loaded_revision !== null);
  const changed = loaded.filter(({ id, loaded_revision }) => {
    return revisions.has(id) && revisions.get(id) !== loaded_revision;
  });
  for (const { id, loaded_revision } of loaded) revisions.set(id, loaded_revision);
  const chosen = modelOf(state.model);
  models = newModels;
  for (const { id } of changed) reloads.set(id, reloadsOf(id) + 1);
  if (state.model === "") update({ model: models[0].id });
  else if (!modelOf(state.model)) replaceChosen(chosen);
  if (changed.length) notify(["reloaded"]);
  showOptions();
}

/** Choose another model than the one that the server does not have any more, or never had. */
function replaceChosen(chosen) {
  const model = availableModel(state.model);
  const isSame = !chosen || haveSameVocabulary(chosen, modelOf(model)); // a link brings its own path
  if (!isSame) knownTokens.clear();
  update({ model, ...(isSame ? {} : { path: [], paths: [] }) });
}

function showOptions() {
  const list = byId("model");
  const wanted = models.map(({ id }) => [id, modelName(id)]);
  const shown = [...list.options].map((option) => [option.value, option.text]);
  if (JSON.stringify(wanted) !== JSON.stringify(shown)) {
    list.replaceChildren(...wanted.map(([value, text]) => element("option", { value }, text)));
    notify(["model list"]);
  }
  list.value = state.model;
  byId("follow-field").hidden = models.every((model) => model.checkpoint === null);
}

function showModel() {
  byId("model").value = state.model;
  const model = modelOf(state.model);
  byId("model-facts").textContent = model?.is_loaded
    ? [
        `${formatCount(model.num_parameters)} parameters`,
        plural(model.n_layers, "layer"),
        plural(model.n_heads, "head"),
        `context of ${plural(model.context_length, "token")}`,
      ].join(", ")
    : "The model is loaded at its first use.";
}

/** Whether the file of a loaded model is newer than its weights in memory. */
const isOutdated = (model) => model.is_loaded && model.revision > model.loaded_revision;

function showNotices() {
  const used = new Set([state.model, ...(state.view === "compare" ? state.models : [])]);
  const outdated = models.filter((model) => used.has(model.id) && isOutdated(model));
  if (byId("follow").checked)
    for (const model of outdated) if (!failureOf(model)) load(model.id);
  const messages = [pollMessage, choiceMessage].filter(Boolean);
  const shown = JSON.stringify([
    outdated.map((model) => [newerText(model.id), failureOf(model), loading.has(model.id)]),
    messages,
  ]);
  const notices = byId("notices");
  if (notices.dataset.shown === shown) return;
  notices.dataset.shown = shown;
  notices.replaceChildren(
    ...outdated.map((model) =>
      element(
        "div",
        { class: "notice" },
        element("p", {}, [newerText(model.id), failureOf(model)].filter(Boolean).join(" ")),
        element(
          "button",
          { type: "button", disabled: loading.has(model.id), onclick: () => load(model.id) },
          loading.has(model.id) ? "Loading …" : "Load it",
        ),
      ),
    ),
    ...messages.map((message) => element("p", { class: "notice" }, message)),
  );
}

/** Why the newest file of a model could not be loaded; empty if that is not known. */
function failureOf({ id, revision }) {
  const failure = failures.get(id);
  return failure?.revision === revision ? failure.message : "";
}

function newerText(id) {
  const { step, loaded_step } = modelOf(id);
  if (step === null || step === loaded_step) return `The file of ${id} has changed.`;
  return `${id} has a new checkpoint: step ${formatCount(step)}. The page shows step ${formatCount(loaded_step)}.`;
}

async function load(id) {
  if (loading.has(id)) return;
  loading.add(id);
  failures.delete(id);
  showNotices();
  const { revision } = modelOf(id);
  try {
    await post("load", { model: id });
  } catch (error) {
    failures.set(id, { revision, message: error.message });
  }
  loading.delete(id);
  await poll();
}
