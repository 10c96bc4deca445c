/** Start of the page: the address, the tabs, the theme, the prompt, then the four views. */

import { onTokenNeeded } from "./api.js";
import { startCompare } from "./compare.js";
import { startInside } from "./inside.js";
import { startModels } from "./models.js";
import { startNextToken } from "./next_token.js";
import { startSettings } from "./settings.js";
import { fromHash, notify, onChange, state, toHash, update } from "./state.js";
import { startText } from "./text.js";
import { tokenNodes, tokenOf } from "./tokens.js";

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
  area.addEventListener("input", () => update({ prompt: area.value }));
  const show = () => document.activeElement === area || (area.value = state.prompt);
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
      button.textContent = "Link copied";
    } catch {
      button.textContent = "Copy it from the address bar"; // the browser allows no clipboard here
    }
    setTimeout(() => (button.textContent = "Copy link"), 2000);
  });
  window.addEventListener("hashchange", () => {
    const values = fromHash(location.hash);
    update({
      ...values,
      prompt: values.prompt || state.prompt,
      model: values.model || state.model,
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
