/** View "Text": generated or given text, each token shaded by its surprisal. */

import { post, stream } from "./api.js";
import { element, facts, formatCount, formatNumber, plural } from "./elements.js";
import { modelName, modelOf, poll } from "./models.js";
import { caption, paintTexts } from "./picture.js";
import { saveButtons } from "./save.js";
import { COLUMNS, shadeLegend, ShadedText, TokenDetail } from "./shaded_text.js";
import { onChange, sampling, samplingText, state, update } from "./state.js";
import { Status } from "./status.js";
import { textOf } from "./tokens.js";

export function startText(panel) {
  const detail = new TokenDetail();
  const text = new ShadedText("Text, one item per token", (entry) => detail.show(entry));
  const figures = element("div", { class: "wide" });
  const settings = element("p", { class: "hint" });
  const content = element("div", { class: "content" });
  const status = new Status(content);
  const controls = element("div", { class: "block" });
  let running = null; // the AbortController of the generation or scoring under way
  let shown = { model: "", settings: "" };

  const generateButton = element(
    "button",
    { type: "button", class: "primary", disabled: true, onclick: generate },
    "Generate",
  );
  const scoreButton = element(
    "button",
    { type: "button", class: "primary", disabled: true, onclick: score },
    "Score",
  );
  const stopButton = element("button", { type: "button", disabled: true, onclick: stop }, "Stop");
  const length = lengthField();
  const given = textField();

  controls.append(
    modeField(),
    given,
    element(
      "div",
      { class: "row" },
      length,
      generateButton,
      scoreButton,
      stopButton,
      status.element,
    ),
  );
  content.append(
    figures,
    element(
      "div",
      { class: "columns" },
      element("div", {}, shadeLegend(), text.element, settings),
      detail.element,
    ),
    saveButtons("text", {
      rows: () => [COLUMNS, ...text.rows],
      paint: () =>
        paintTexts(
          "Text, shaded by surprisal",
          caption(shown.model, { prompt: "", settings: shown.settings }),
          [{ name: "", prompt: text.prompt, entries: text.painted }],
        ),
    }),
  );
  panel.append(controls, content);

  onChange((changed) => {
    if (changed.has("mode")) showMode();
    for (const button of [generateButton, scoreButton]) button.disabled = !modelOf(state.model);
  });
  showMode();

  function showMode() {
    const isScore = state.mode === "score";
    for (const part of [length, generateButton]) part.hidden = isScore;
    for (const part of [given, scoreButton]) part.hidden = !isScore;
    for (const radio of controls.querySelectorAll("input[type=radio]"))
      radio.checked = radio.value === state.mode;
    stop();
    status.done();
    start("", "");
  }

  /** Empty the view for a new text. */
  function start(prompt, description) {
    shown = { model: modelName(state.model), settings: description };
    text.clear(prompt);
    detail.clear();
    figures.replaceChildren();
    settings.textContent = prompt || description ? `${shown.model}, ${description}` : "";
    content.hidden = !settings.textContent;
  }

  function stop() {
    running?.abort();
  }

  /** Run `work(signal)`; the buttons and the status line follow it. */
  async function run(work) {
    stop();
    const controller = (running = new AbortController());
    stopButton.disabled = false;
    status.done(); // what it said of the text before
    status.loading();
    try {
      const message = await work({
        signal: controller.signal,
        onBusy: (seconds) => status.busy(seconds),
      });
      status.done(message);
    } catch (error) {
      if (controller.signal.aborted) {
        if (running === controller) status.done("Stopped.");
      } else status.error(error);
      content.hidden = text.entries.length === 0;
    }
    if (running === controller) {
      running = null;
      stopButton.disabled = true;
    }
    poll();
  }

  function generate() {
    const { model, prompt, path, seed, max_new_tokens } = state;
    start(prompt + textOf(path), samplingText());
    const body = { model, prompt, path, sampling: sampling(), max_new_tokens, seed };
    return run((options) =>
      generateInto(text, body, options, () => status.done("Writing …")).finally(showGenerated),
    );
  }

  function showGenerated() {
    if (!text.entries.length) return;
    figures.replaceChildren(
      facts([
        {
          name: "New tokens",
          value: formatCount(text.entries.length),
          hint: "How many tokens the model has written.",
        },
        {
          name: "Mean surprisal",
          value: `${formatNumber(text.meanSurprisal)} nats`,
          hint: "How unexpected the text is for the model itself, per token.",
        },
      ]),
    );
  }

  function score() {
    start("", "scored as it is given");
    return run(async (options) => {
      const answer = await post("score", { model: state.model, text: state.text }, options);
      text.append(
        answer.tokens.map(({ surprisal, rank, candidates, ...token }) => ({
          token,
          surprisal,
          rank,
          candidates,
        })),
      );
      figures.replaceChildren(
        facts([
          {
            name: "Loss",
            value: `${formatNumber(answer.loss, 3)} nats`,
            hint: "The mean surprisal of all tokens after the first.",
          },
          {
            name: "Perplexity",
            value: formatNumber(answer.perplexity),
            hint: "e to the power of the loss: the model is as uncertain as among this many equal tokens.",
          },
          {
            name: "Bits per byte",
            value: formatNumber(answer.bits_per_byte, 3),
            hint: "Does not depend on the tokenizer, so it compares models with different ones.",
          },
          {
            name: "Tokens",
            value: formatCount(answer.num_tokens),
            hint: "The length of the text in tokens.",
          },
        ]),
      );
    });
  }
}

/** Generate into a `ShadedText`. Returns what the status line says at the end. */
export async function generateInto(text, body, options, onFirst, onToken) {
  for await (const event of stream("generate", body, options)) {
    if (event.done) text.end();
    if (event.done === "error") throw new Error(event.error);
    if (event.done) {
      return event.done === "stop"
        ? "The model ended the text."
        : `${plural(text.entries.length, "token")} written.`;
    }
    if (text.entries.length === 0) onFirst?.();
    text.append([event]);
    onToken?.();
  }
  throw new Error("The connection ended before the text was complete.");
}

function modeField() {
  const radio = (value, label) =>
    element(
      "label",
      { class: "choice" },
      element("input", {
        type: "radio",
        name: "mode",
        value,
        onchange: () => update({ mode: value }),
      }),
      label,
    );
  return element(
    "fieldset",
    { class: "row" },
    element("legend", { class: "hidden-label" }, "Where the text comes from"),
    radio("generate", "Generate from the prompt"),
    radio("score", "Score a text of yours"),
  );
}

/** A field for the number of new tokens; Text and Side by side share the value. */
export function lengthField() {
  const number = element("input", {
    type: "number",
    min: 1,
    max: 1024,
    step: 1,
    onchange: () => update({ max_new_tokens: Math.max(1, Math.trunc(Number(number.value))) }),
  });
  const show = () => (number.value = state.max_new_tokens);
  onChange((changed) => changed.has("max_new_tokens") && show());
  show();
  return element("label", { class: "inline" }, "New tokens", number);
}

function textField() {
  const area = element("textarea", {
    id: "score-text",
    rows: 5,
    spellcheck: "false",
    placeholder: "Paste a text here.",
    oninput: () => update({ text: area.value }),
  });
  const show = () => document.activeElement === area || (area.value = state.text);
  onChange((changed) => changed.has("text") && show());
  show();
  return element(
    "div",
    { class: "field" },
    element("label", { for: "score-text" }, "Text to score"),
    area,
  );
}
