/** View "Side by side": several models on the same prompt, settings and seed. */

import { LatestRequest } from "./api.js";
import { axis, axisMaximum, barLegend, barTrack } from "./bars.js";
import { element, formatNumber, formatProbability } from "./elements.js";
import { allModels, hasSameVocabulary, modelName, modelOf, poll, reloadsOf } from "./models.js";
import { caption, paintBars, paintTexts } from "./picture.js";
import { saveButtons } from "./save.js";
import { COLUMNS, shadeLegend, ShadedText, TokenDetail } from "./shaded_text.js";
import { onChange, sampling, samplingText, state, update } from "./state.js";
import { Status } from "./status.js";
import { generateInto, lengthField } from "./text.js";
import { firstDifference, textOf, tokenNodes, tokenString } from "./tokens.js";

const MAX_MODELS = 4;
const BARS = 10; // of each model; the table has those of all models
const LOOKED_UP = 300; // tokens of each model whose probability the table can show

const columns = new Map(); // model id → {text, answer, request, status}

/** The chosen models that the server has. */
const chosenModels = () => state.models.filter(modelOf).slice(0, MAX_MODELS);

export function startCompare(panel) {
  const choice = element("fieldset", { class: "choices" });
  const textsContent = element("div", { class: "content" });
  const texts = element("div", { class: "side-by-side" });
  const difference = element("p", { class: "difference", role: "status" });
  const settings = element("p", { class: "hint" });
  const detail = new TokenDetail();
  const status = new Status(textsContent);
  const table = element("div", { class: "content scroll" });
  const tableStatus = new Status(table);
  const legend = element("div");
  const saveTable = saveButtons("next-token-side-by-side", {
    rows: distributionRows,
    paint: paintDistributions,
  });
  let controller = null;

  const generateButton = element(
    "button",
    { type: "button", class: "primary", disabled: true, onclick: generate },
    "Generate texts",
  );
  const stopButton = element(
    "button",
    { type: "button", disabled: true, onclick: () => controller?.abort() },
    "Stop",
  );

  textsContent.append(
    shadeLegend(),
    difference,
    element("div", { class: "columns" }, texts, detail.element),
    settings,
    saveButtons("texts-side-by-side", { rows: textRows, paint: paintAllTexts }),
  );
  textsContent.hidden = true;
  panel.append(
    element(
      "div",
      { class: "block" },
      choice,
      element("div", { class: "row" }, lengthField(), generateButton, stopButton, status.element),
    ),
    textsContent,
    element(
      "div",
      { class: "heading" },
      element("h2", {}, "The next token after the prompt"),
      tableStatus.element,
    ),
    legend,
    table,
    saveTable,
  );

  onChange((changed) => {
    if (changed.has("model list")) chooseDefault();
    if (changed.has("model list") || changed.has("models")) showChoice();
    generateButton.disabled = chosenModels().length === 0;
    ask();
  });

  function chooseDefault() {
    const first = allModels().slice(0, 2);
    update({ models: chosenModels().length ? chosenModels() : first.map(({ id }) => id) });
  }

  function showChoice() {
    const box = ({ id }) => {
      const isChosen = chosenModels().includes(id);
      return element(
        "label",
        { class: "choice" },
        element("input", {
          type: "checkbox",
          checked: isChosen,
          disabled: !isChosen && chosenModels().length >= MAX_MODELS,
          onchange: (event) => toggle(id, event.target.checked),
        }),
        modelName(id),
      );
    };
    const focused = [...choice.querySelectorAll("input")].indexOf(document.activeElement);
    choice.replaceChildren(
      element("legend", {}, `Models (up to ${MAX_MODELS})`),
      element("div", { class: "row" }, ...allModels().map(box)),
    );
    if (focused >= 0) choice.querySelectorAll("input")[focused]?.focus();
  }

  function toggle(id, isChosen) {
    const rest = chosenModels().filter((other) => other !== id);
    update({ models: isChosen ? [...rest, id] : rest });
  }

  // --- the distributions ---

  function ask() {
    if (state.view !== "compare") return;
    const rest = { sampling: sampling(), draws: 0, seed: state.seed, bars: LOOKED_UP };
    for (const id of chosenModels()) {
      const body = { ...inputOf(id), ...rest, include_tokens: false };
      columnOf(id).request.send(body, reloadsOf(id));
    }
    showTable();
  }

  function columnOf(id) {
    if (!columns.has(id)) {
      const column = {
        answer: null,
        text: new ShadedText(`Text of ${id}`, (entry) => detail.show(entry)),
      };
      column.request = new LatestRequest("next", tableStatus, (answer) => {
        column.answer = answer;
        showTable();
      });
      columns.set(id, column);
    }
    return columns.get(id);
  }

  function showTable() {
    const groups = distributions();
    saveTable.hidden = groups.length === 0;
    legend.replaceChildren(barLegend(false));
    if (!groups.length) {
      const said = chosenModels().length ? "" : "Choose one or more models above.";
      table.replaceChildren(element("p", { class: "hint" }, said));
      return;
    }
    const maximum = axisMaximum(groups.flatMap(({ bars }) => bars));
    table.style.setProperty("--columns", groups.length);
    table.replaceChildren(
      element(
        "table",
        { class: "distributions" },
        element(
          "thead",
          {},
          element(
            "tr",
            {},
            element("th", { scope: "col" }, "Token"),
            ...groups.map(({ id, entropy }) =>
              element(
                "th",
                { scope: "col" },
                element("span", { class: "model-name" }, modelName(id)),
                element("span", { class: "hint" }, `entropy ${formatNumber(entropy)} nats`),
                axis(maximum),
              ),
            ),
          ),
        ),
        element(
          "tbody",
          {},
          ...groups[0].bars.map((bar, row) =>
            element(
              "tr",
              {},
              element(
                "th",
                { scope: "row" },
                element("span", { class: "token" }, ...tokenNodes(bar)),
              ),
              ...groups.map(({ bars }) => distributionCell(bars[row], maximum)),
            ),
          ),
        ),
      ),
    );
  }

  function distributionCell(bar, maximum) {
    if (bar.isUnknown) return element("td", { class: "unknown" }, `rank above ${LOOKED_UP}`);
    const figure = bar.probability === 0 ? "cut off" : formatProbability(bar.probability);
    return element(
      "td",
      { class: bar.probability === 0 && "cut" },
      element(
        "div",
        { class: "cell" },
        barTrack(bar, maximum),
        element("span", { class: "figure" }, figure),
      ),
    );
  }

  // --- the texts ---

  async function generate() {
    controller?.abort();
    const own = (controller = new AbortController());
    const { prompt, path, seed, max_new_tokens } = state;
    const start = prompt + textOf(path);
    const ids = chosenModels();
    textsContent.hidden = false;
    detail.clear();
    difference.textContent = "";
    settings.textContent = `The same for all: ${samplingText()}`;
    texts.replaceChildren(
      ...ids.map((id) => {
        const { text } = columnOf(id);
        text.clear(start);
        return element(
          "section",
          { "data-model": id },
          element("h3", {}, modelName(id)),
          text.element,
        );
      }),
    );
    stopButton.disabled = false;
    status.done(); // what it said of the texts before
    status.loading();
    const results = await Promise.allSettled(
      ids.map((id) =>
        generateInto(
          columnOf(id).text,
          { ...inputOf(id), sampling: sampling(), max_new_tokens, seed },
          { signal: own.signal, onBusy: (seconds) => status.busy(seconds) },
          () => status.done("Writing …"),
          () => markDifference(ids),
        ),
      ),
    );
    if (controller !== own) return;
    stopButton.disabled = true;
    markDifference(ids);
    const failed = results.find(({ status: outcome }) => outcome === "rejected");
    if (own.signal.aborted) status.done("Stopped.");
    else if (failed) status.error(failed.reason);
    else status.done();
    poll();
  }

  function markDifference(ids) {
    const all = ids.map((id) => columnOf(id).text);
    const at = firstDifference(all.map(({ entries }) => entries.map(({ token }) => token.bytes)));
    for (const text of all) text.mark(at);
    if (all.length < 2) difference.textContent = "";
    else if (at < 0) difference.textContent = "The texts are the same so far.";
    else {
      const said = all.map(({ entries }) =>
        entries[at] ? `“${tokenString(entries[at].token)}”` : "nothing",
      );
      difference.textContent = `The texts first differ at new token ${at + 1}: ${said.join(", ")}.`;
    }
  }
}

/** Model, prompt and path of a request. In a model with another vocabulary, the path is text: its ids mean other tokens. */
function inputOf(id) {
  const { prompt, path } = state;
  if (hasSameVocabulary(state.model, id)) return { model: id, prompt, path };
  return { model: id, prompt: prompt + textOf(path), path: [] };
}

/** The bars of the chosen models, all with the tokens of all models in the same order. */
function distributions() {
  const chosen = chosenModels().filter((id) => columns.get(id)?.answer);
  const answers = chosen.map((id) => columns.get(id).answer);
  const tokens = new Map(); // bytes → the token and its highest probability
  for (const bar of answers.flatMap(({ bars }) => bars.slice(0, BARS))) {
    const highest = Math.max(
      bar.model_probability,
      bar.probability,
      tokens.get(bar.bytes)?.highest ?? 0,
    );
    tokens.set(bar.bytes, { token: bar, highest });
  }
  const order = [...tokens.values()]
    .sort((a, b) => b.highest - a.highest)
    .map(({ token }) => token);
  return chosen.map((id, i) => {
    const own = new Map(answers[i].bars.map((bar) => [bar.bytes, bar]));
    const missing = { model_probability: 0, probability: 0, isUnknown: true };
    return {
      id,
      entropy: answers[i].entropy,
      bars: order.map((token) => own.get(token.bytes) ?? { ...token, ...missing }),
    };
  });
}

function distributionRows() {
  const known = ({ isUnknown }) => !isUnknown;
  const rows = distributions().flatMap(({ id, bars }) =>
    bars
      .filter(known)
      .map((bar) => [id, bar.id, bar.text, bar.rank, bar.model_probability, bar.probability]),
  );
  return [["model", "id", "text", "rank", "model_probability", "probability"], ...rows];
}

function paintDistributions() {
  const groups = distributions().map(({ id, bars }) => ({ name: modelName(id), bars }));
  return paintBars(
    "Next token, side by side",
    caption(""),
    groups,
    axisMaximum(groups.flatMap(({ bars }) => bars)),
  );
}

const generated = () => chosenModels().filter((id) => columns.get(id)?.text.entries.length);

function textRows() {
  const rows = generated().flatMap((id) => columns.get(id).text.rows.map((row) => [id, ...row]));
  return [["model", ...COLUMNS], ...rows];
}

function paintAllTexts() {
  const texts = generated().map((id) => {
    const { text } = columns.get(id);
    return { name: modelName(id), prompt: text.prompt, entries: text.painted };
  });
  return paintTexts("Texts, side by side", caption("", { prompt: "" }), texts);
}
