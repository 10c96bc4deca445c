/** Start of the page: the address, the tabs, the theme, the prompt, then the four views. */

import { onTokenNeeded } from "./api.js";
import { startCompare } from "./compare.js";
import { startInside } from "./inside.js";
import { availableModel, hasSameVocabulary, startModels } from "./models.js";
import { startNextToken } from "./next_token.js";
import { startSettings } from "./settings.js";
import { fromHash, isLinkComplete, notify, onChange, state, toHash, update } from "./state.js";
import { startText } from "./text.js";
import { knownTokens, tokenNodes, tokenOf } from "./tokens.js";

const VIEWS = ["next", "text", "compare", "inside"];
const THEME_KEY = "gpt_lightning theme";

const byId = (id) => document.getElementById(id);

Object.assign(state, fromHash(location.hash));
startTabs();
startTheme();
startPrompt();
startLink();
startAccess();
startSettings();
startNextToken(byId("view-next"));
startText(byId("view-text"));
startCompare(byId("view-compare"));
startInside(byId("view-inside"));
onChange(showInputs);
showInputs();
await connect();

async function connect() {
  try {
    await startModels();
    notify(["start"]);
  } catch (error) {
    byId("model-facts").textContent = error.message;
    setTimeout(connect, 3000);
  }
}

function startTabs() {
  const tabs = VIEWS.map((view) => byId(`tab-${view}`));
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => update({ view: VIEWS[i] }));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = (i + step + VIEWS.length) % VIEWS.length;
      tabs[next].focus();
      update({ view: VIEWS[next] });
    });
  });
  const show = () => {
    VIEWS.forEach((view, i) => {
      const isShown = state.view === view;
      tabs[i].setAttribute("aria-selected", isShown);
      tabs[i].tabIndex = isShown ? 0 : -1;
      byId(`view-${view}`).hidden = !isShown;
    });
  };
  onChange((changed) => changed.has("view") && show());
  show();
}

/** Hide what the view does not use. */
function showInputs() {
  const isScore = state.view === "text" && state.mode === "score";
  byId("prompt-field").hidden = isScore;
  byId("sampling").hidden = isScore || state.view === "inside";
  byId("model-field").hidden = state.view === "compare";
  byId("path-note").hidden = state.view === "next" || state.path.length === 0;
  byId("path-text").replaceChildren(...state.path.flatMap((id) => tokenNodes(tokenOf(id))));
}

function startTheme() {
  const list = byId("theme");
  list.value = document.documentElement.dataset.theme;
  list.addEventListener("change", () => {
    localStorage.setItem(THEME_KEY, list.value);
    document.documentElement.dataset.theme = list.value;
    window.dispatchEvent(new Event("theme"));
  });
}

function startPrompt() {
  const area = byId("prompt");
  // the tokens of the path were taken after another text
  area.addEventListener("input", () => update({ prompt: area.value, path: [], paths: [] }));
  const show = () => area.value === state.prompt || (area.value = state.prompt);
  onChange((changed) => changed.has("prompt") && show());
  show();
  byId("leave-path").addEventListener("click", () => update({ path: [] }));
}

function startLink() {
  const button = byId("copy-link");
  button.addEventListener("click", async () => {
    history.replaceState(null, "", toHash());
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = isLinkComplete() ? "Link copied" : "Copied without the long text";
    } catch {
      button.textContent = "Copy it from the address bar"; // the browser allows no clipboard here
    }
    setTimeout(() => (button.textContent = "Copy link"), 2000);
  });
  window.addEventListener("hashchange", () => {
    const values = fromHash(location.hash);
    const model = availableModel(values.model || state.model);
    if (!hasSameVocabulary(state.model, model)) knownTokens.clear();
    update({
      ...values,
      model,
      prompt: values.prompt || state.prompt,
      models: values.models.length ? values.models : state.models,
    });
  });
}

function startAccess() {
  const form = byId("access");
  onTokenNeeded((refused) => {
    form.hidden = false;
    if (refused) byId("access-message").textContent = "The server has refused this token.";
    byId("access-token").focus();
    return new Promise((resolve) => {
      form.onsubmit = (event) => {
        event.preventDefault();
        form.hidden = true;
        resolve(byId("access-token").value);
      };
    });
  });
}
