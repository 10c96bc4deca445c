/** View "Next token": the prompt as tokens, the distribution of the next token, the paths taken. */

import { LatestRequest } from "./api.js";
import { axis, axisMaximum, barLegend, barTrack, setBar } from "./bars.js";
import {
  element,
  facts,
  formatCount,
  formatNumber,
  formatProbability,
  plural,
  select,
} from "./elements.js";
import { modelName, modelOf, reloadsOf } from "./models.js";
import { makeNavigable } from "./navigation.js";
import { caption, paintBars } from "./picture.js";
import { saveButtons } from "./save.js";
import { notify, onChange, sampling, state, update } from "./state.js";
import { Status } from "./status.js";
import { describe, remember, textOf, tokenNodes, tokenString } from "./tokens.js";
import { startTree, take } from "./tree.js";

const MAX_DRAWS = 10_000;

let answer = null; // what the server said last
let sequence = { tokens: [], start: 0, cropped: 0, promptLength: 0 }; // what the strip shows, from token `start` on

export function startNextToken(panel) {
  const strip = element("div", {
    class: "strip",
    role: "listbox",
    "aria-label": "Tokens of the text",
  });
  const detail = element("p", { class: "hint", id: "strip-detail" });
  const bars = element("ol", {
    class: "bars",
    role: "listbox",
    "aria-label": "Next token. Enter takes a token, Backspace walks back.",
  });
  const head = element("div", { class: "bar-row head", "aria-hidden": "true" });
  const rest = element("div", { class: "bar-row rest" });
  const legend = element("div");
  const figures = element("div");
  const chart = element("div", { class: "content" }, legend, head, bars, rest);
  const status = new Status(chart);
  let shownText = ""; // the text in the strip
  const request = new LatestRequest("next", status, show, (body) => ({
    ...body,
    include_tokens: textKey(body) !== shownText, // a slider changes no token
  }));
  const back = element(
    "button",
    { type: "button", disabled: state.path.length === 0, onclick: walkBack },
    "Walk back one token",
  );

  const save = saveButtons("next-token", { rows: table, paint: picture });
  for (const part of [chart, save]) part.hidden = true; // until the first answer
  const tree = element("div");
  const comparison = element("div");
  panel.append(
    element(
      "div",
      { class: "block" },
      element("div", { class: "heading" }, element("h2", {}, "The text as tokens"), back),
      strip,
      detail,
    ),
    element(
      "div",
      { class: "columns" },
      element(
        "div",
        {},
        element(
          "div",
          { class: "heading" },
          element("h2", {}, "What comes next"),
          status.element,
          barCount(),
          drawsField(),
        ),
        chart,
        save,
      ),
      element("aside", {}, figures, tree),
    ),
    comparison,
  );
  startTree(tree, comparison);

  makeNavigable(strip, "[role=option]", {
    onActive: (item) => (detail.textContent = detailOf(Number(item.dataset.index))),
    onChoose: (item) => walkTo(Number(item.dataset.length)),
    onBack: walkBack,
  });
  makeNavigable(bars, "[role=option]", {
    onChoose: (item) => take(Number(item.dataset.token)),
    onBack: walkBack,
  });

  let timer = 0;
  onChange((changed) => {
    back.disabled = state.path.length === 0;
    if (changed.has("path")) markPath();
    clearTimeout(timer);
    // typing sends one request for several keys
    if (changed.has("prompt")) timer = setTimeout(ask, 150);
    else ask();
  });

  function ask() {
    if (state.view !== "next" || !modelOf(state.model)) return;
    const { model, prompt, path, seed, draws } = state;
    request.send(
      { model, prompt, path, sampling: sampling(), draws, seed, bars: state.bars },
      reloadsOf(model),
    );
  }

  function show(newAnswer, body) {
    answer = newAnswer;
    for (const part of [chart, save]) part.hidden = false;
    const isNew = remember([...(answer.tokens ?? []), ...answer.bars]);
    if (answer.tokens) showStrip(body);
    const active = strip.querySelector(".active");
    if (active) detail.textContent = detailOf(Number(active.dataset.index));
    showBars();
    showFacts();
    if (isNew) notify(["names"]); // the tree may have tokens whose text was unknown
  }

  function showStrip(body) {
    shownText = textKey(body);
    const { tokens, num_tokens, cropped } = answer;
    const pathLength = body.path.length;
    const start = num_tokens - tokens.length;
    const promptLength = num_tokens - pathLength;
    sequence = { tokens, start, cropped, promptLength };
    strip.replaceChildren(
      ...(start ? [element("span", { class: "hint" }, `${formatCount(start)} more …`)] : []),
      ...tokens.map((token, k) => {
        const i = start + k;
        return element(
          "span",
          {
            role: "option",
            class: ["token", i >= promptLength && "taken", i < cropped && "cropped"]
              .filter(Boolean)
              .join(" "),
            title: describe(token),
            "aria-label": `${tokenString(token)}, ${describe(token)}`,
            "data-index": i,
            "data-length": Math.max(0, i + 1 - promptLength),
          },
          ...tokenNodes(token),
        );
      }),
    );
    detail.textContent = [
      plural(num_tokens, "token"),
      pathLength && `${formatCount(pathLength)} of them chosen by you`,
      cropped && `the model cannot read the first ${formatCount(cropped)}: its context is full`,
    ]
      .filter(Boolean)
      .join(", ");
  }

  /** What is known of token `i` of the text. */
  function detailOf(i) {
    const { tokens, start, cropped, promptLength } = sequence;
    const name = `Token ${formatCount(i + 1)}: ${describe(tokens[i - start])}`;
    if (i < cropped) return `${name}; too far back, the model does not read it`;
    const step = answer.path[i - promptLength];
    if (!step || step.rank === null) return name;
    return `${name}; the model gave it ${formatProbability(step.model_probability)}, after your settings ${formatProbability(step.probability)}`;
  }

  function markPath() {
    if (state.view === "next") chart.classList.add("stale");
  }

  /** Rows that show the same tokens stay, so the bars move and the focus is kept. */
  function showBars() {
    const { draws } = answer;
    const maximum = axisMaximum(answer.bars, draws);
    const ids = answer.bars.map(({ id }) => id).join();
    if (bars.dataset.ids !== ids) {
      bars.dataset.ids = ids;
      bars.replaceChildren(...answer.bars.map((bar) => row(bar)));
      bars.removeAttribute("aria-activedescendant");
    }
    answer.bars.forEach((bar, i) => fill(bars.children[i], bar, maximum));
    bars.closest(".columns").classList.toggle("has-draws", draws > 0);
    legend.replaceChildren(barLegend(draws > 0));
    head.replaceChildren(
      element("span", { class: "rank" }, "#"),
      element("span", {}, "Token"),
      axis(maximum),
      element("span", { class: "figure model" }, "Model"),
      element("span", { class: "figure" }, "After"),
      element("span", { class: "figure drawn-count" }, "Drawn"),
    );
    const { count, model_probability, probability, drawn } = answer.rest;
    rest.hidden = count === 0;
    rest.replaceChildren(
      element("span", { class: "rank" }),
      element("span", { class: "rest-name" }, `${formatCount(count)} other tokens`),
      element("span"),
      element("span", { class: "figure model" }, formatProbability(model_probability)),
      element("span", { class: "figure" }, formatProbability(probability)),
      element("span", { class: "figure drawn-count" }, formatCount(drawn)),
    );
  }

  function row(bar) {
    return element(
      "li",
      {
        role: "option",
        class: "bar-row",
        "data-token": bar.id,
        title: `${describe(bar)}; logit ${formatNumber(bar.logit, 3)}`,
      },
      element("span", { class: "rank" }, String(bar.rank)),
      element("span", { class: "token" }, ...tokenNodes(bar)),
      barTrack(bar, 1),
      element("span", { class: "figure model" }),
      element("span", { class: "figure" }),
      element("span", { class: "figure drawn-count" }),
    );
  }

  function fill(item, bar, maximum) {
    const [, , track, model, after, drawn] = item.children;
    const isCut = bar.probability === 0;
    setBar(track, bar, maximum, answer.draws);
    model.textContent = formatProbability(bar.model_probability);
    after.textContent = isCut ? "cut off" : formatProbability(bar.probability);
    drawn.textContent = formatCount(bar.drawn);
    item.classList.toggle("cut", isCut);
    item.setAttribute(
      "aria-label",
      `${tokenString(bar)}, probability ${after.textContent}, of the model ${model.textContent}`,
    );
  }

  function showFacts() {
    const { num_kept, entropy, effective_vocabulary, model_entropy, model_effective_vocabulary } =
      answer;
    const all = answer.bars.length + answer.rest.count;
    figures.replaceChildren(
      facts([
        {
          name: "Tokens kept",
          value: `${formatCount(num_kept)} of ${formatCount(all)}`,
          hint: "How many tokens can be drawn after your settings.",
        },
        {
          name: "Entropy",
          value: `${formatNumber(entropy)} nats`,
          hint: `How uncertain the choice is; 0 is certain. The model itself: ${formatNumber(model_entropy)}.`,
        },
        {
          name: "Effective vocabulary",
          value: `${formatNumber(effective_vocabulary, 1)} tokens`,
          hint: `A choice among this many equal tokens is as uncertain. The model itself: ${formatNumber(model_effective_vocabulary, 1)}.`,
        },
      ]),
    );
  }
}

const textKey = ({ model, prompt, path }) =>
  JSON.stringify([model, reloadsOf(model), prompt, path]);

function walkTo(length) {
  update({ path: state.path.slice(0, length) });
}

function walkBack() {
  if (state.path.length) walkTo(state.path.length - 1);
}

function barCount() {
  const list = select({ id: "bars", onchange: () => update({ bars: Number(list.value) }) }, [
    [10],
    [20],
    [40],
    [100],
  ]);
  const show = () => (list.value = state.bars);
  onChange((changed) => changed.has("bars") && show());
  show();
  return element("label", { class: "inline" }, "Bars", list);
}

function drawsField() {
  const number = element("input", {
    type: "number",
    id: "draws",
    min: 0,
    max: MAX_DRAWS,
    step: 100,
    title:
      "The server draws this many tokens, so you can see how well the draws follow the probabilities.",
    oninput: () => number.value !== "" && update({ draws: Math.trunc(Number(number.value)) }),
  });
  const show = () => document.activeElement === number || (number.value = state.draws);
  onChange((changed) => changed.has("draws") && show());
  show();
  return element("label", { class: "inline" }, "Draws", number);
}

function table() {
  const header = ["rank", "id", "text", "logit", "model_probability", "probability", "drawn"];
  return [header, ...answer.bars.map((bar) => header.map((name) => bar[name]))];
}

function picture() {
  const { bars, draws } = answer;
  return paintBars(
    "Next token",
    caption(modelName(state.model), { prompt: state.prompt + textOf(state.path) }),
    [
      {
        name: `Outline: model. Fill: after the settings.${draws ? " Thin bar: share of the draws." : ""}`,
        bars,
        draws,
      },
    ],
    axisMaximum(bars, draws),
  );
}
