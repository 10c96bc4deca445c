/** View "Inside": what each layer would say, and which tokens each token looks at. */

import { LatestRequest } from "./api.js";
import { barTrack } from "./bars.js";
import { element, formatNumber, formatProbability, select } from "./elements.js";
import { AttentionMap } from "./attention_map.js";
import { modelName, modelOf, reloadsOf } from "./models.js";
import { makeNavigable } from "./navigation.js";
import { caption, paintMap, paintTable } from "./picture.js";
import { saveButtons } from "./save.js";
import { onChange, state, update } from "./state.js";
import { Status } from "./status.js";
import { tokenNodes, tokenString } from "./tokens.js";

export function startInside(panel) {
  const askLens = startLens(panel);
  const askAttention = startAttention(panel);
  let timer = 0;
  onChange((changed) => {
    clearTimeout(timer);
    timer = setTimeout(
      () => {
        if (state.view !== "inside" || !modelOf(state.model)) return;
        askLens();
        askAttention();
      },
      changed.has("prompt") ? 200 : 0,
    );
  });
}

const input = () => ({ model: state.model, prompt: state.prompt, path: state.path });

// --- logit lens ---

function startLens(panel) {
  const table = element("div", { class: "scroll" });
  const detail = element("aside", { class: "detail", "aria-live": "polite" });
  const content = element("div", { class: "content" });
  const status = new Status(content);
  const positions = select(
    { id: "positions", onchange: () => update({ positions: Number(positions.value) }) },
    [[6], [12], [24], [48]],
  );
  const save = saveButtons("layers", { rows: lensRows, paint: paintLens });
  save.hidden = true;
  let answer = null;
  const request = new LatestRequest("lens", status, (newAnswer) => {
    answer = newAnswer;
    save.hidden = false;
    show();
  });

  content.append(
    element(
      "div",
      { class: "columns" },
      element(
        "div",
        {},
        scale("probability", ["0", "1"], "Shade: the probability of the token in the cell."),
        table,
      ),
      detail,
    ),
    save,
  );
  panel.append(
    element(
      "div",
      { class: "heading" },
      element("h2", {}, "What each layer would say"),
      status.element,
      element("label", { class: "inline" }, "Last tokens", positions),
    ),
    element(
      "p",
      { class: "explanation" },
      "The table reads the model after each layer as if it were the last one (“logit lens”). A cell has the most probable next token after the token above it. Bold: what the last layer says as well.",
    ),
    content,
  );
  onChange((changed) => changed.has("positions") && (positions.value = state.positions));
  positions.value = state.positions;

  function show() {
    const { tokens, layers } = answer;
    const last = layers.at(-1).positions;
    const grid = element(
      "table",
      {
        class: "lens",
        role: "grid",
        "aria-label": "Most probable next token by layer and position",
      },
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          element("th", { scope: "col" }, "after"),
          ...tokens.map((token) =>
            element(
              "th",
              { scope: "col" },
              element("span", { class: "token" }, ...tokenNodes(token)),
            ),
          ),
        ),
      ),
      element(
        "tbody",
        {},
        ...layers.map(({ name, positions: row }, layer) =>
          element(
            "tr",
            {},
            element("th", { scope: "row" }, name),
            ...row.map(({ top }, i) => lensCell(top[0], layer, i, top[0].id === last[i].top[0].id)),
          ),
        ),
      ),
    );
    makeNavigable(grid, "[role=gridcell]", {
      onActive: (cell) => showDetail(Number(cell.dataset.layer), Number(cell.dataset.position)),
    });
    table.replaceChildren(grid);
    table.scrollLeft = table.scrollWidth; // the last token is the one that matters most
    showDetail(layers.length - 1, tokens.length - 1);
  }

  function lensCell(token, layer, position, isFinal) {
    const cell = element(
      "td",
      {
        role: "gridcell",
        class: isFinal && "final",
        "data-layer": layer,
        "data-position": position,
        "aria-label": `${tokenString(token)}, probability ${formatProbability(token.probability)}`,
      },
      element("span", { class: "token" }, ...tokenNodes(token)),
    );
    cell.style.setProperty("--share", `${100 * token.probability}%`);
    return cell;
  }

  function showDetail(layer, position) {
    const { name, positions: row } = answer.layers[layer];
    const { top, entropy } = row[position];
    const maximum = Math.max(1e-6, ...top.map(({ probability }) => probability));
    detail.replaceChildren(
      element("h2", {}, name),
      element(
        "p",
        { class: "hint" },
        "after ",
        element("span", { class: "token" }, ...tokenNodes(answer.tokens[position])),
      ),
      element(
        "ol",
        { class: "candidates" },
        ...top.map((token) =>
          element(
            "li",
            {},
            element("span", { class: "token" }, ...tokenNodes(token)),
            barTrack({ ...token, model_probability: token.probability }, maximum),
            element("span", { class: "figure" }, formatProbability(token.probability)),
          ),
        ),
      ),
      element(
        "p",
        { class: "hint" },
        `Entropy ${formatNumber(entropy)} nats: how uncertain this layer is.`,
      ),
    );
  }

  function lensRows() {
    const header = ["layer", "position", "token", "rank", "id", "text", "probability"];
    const rows = answer.layers.flatMap(({ name, positions: row }) =>
      row.flatMap(({ top }, i) =>
        top.map(({ id, text, probability }, rank) => [
          name,
          i + 1,
          answer.tokens[i].text,
          rank + 1,
          id,
          text,
          probability,
        ]),
      ),
    );
    return [header, ...rows];
  }

  function paintLens() {
    const rows = answer.layers.map(({ name, positions: row }) => ({
      name,
      cells: row.map(({ top }) => ({ token: top[0], probability: top[0].probability })),
    }));
    return paintTable(
      "What each layer would say",
      caption(modelName(state.model), { settings: "" }),
      answer.tokens,
      rows,
    );
  }

  return () => request.send({ ...input(), positions: state.positions }, reloadsOf(state.model));
}

/** A scale of colors with values at equal distances, and what it means. */
function scale(kind, values, hint) {
  return element(
    "div",
    { class: "scale" },
    element(
      "div",
      {},
      element("span", { class: `ramp ${kind}`, "aria-hidden": "true" }),
      element("span", { class: "axis" }, ...values.map((value) => element("span", {}, value))),
    ),
    element("span", { class: "hint" }, hint),
  );
}

// --- attention ---

function startAttention(panel) {
  const layer = select({ id: "layer", onchange: () => update({ layer: Number(layer.value) }) }, [
    [0, "1"],
  ]);
  const head = select(
    { id: "head", onchange: () => update({ head: head.value === "" ? null : Number(head.value) }) },
    [["", "mean of all"]],
  );
  const readout = element("p", { class: "readout", role: "status" });
  const map = new AttentionMap((text) => (readout.textContent = text));
  const content = element("div", { class: "content" });
  const status = new Status(content);
  const cropped = element("p", { class: "hint" });
  const save = saveButtons("attention", { rows: () => map.rows, paint: paintAttention });
  save.hidden = true;
  const request = new LatestRequest("attention", status, (answer) => {
    save.hidden = false;
    map.show(answer);
    cropped.textContent = answer.cropped
      ? `Only the last ${answer.tokens.length} tokens are shown; ${answer.cropped} before them are not.`
      : "";
    showLists(); // the model has been loaded, so its layers and heads are known
  });

  content.append(
    scale(
      "attention",
      ["0", "0.25", "1"],
      "Weight. The color grows with its square root, so small weights are visible.",
    ),
    readout,
    element("div", { class: "scroll" }, map.canvas),
    cropped,
    save,
  );
  panel.append(
    element(
      "div",
      { class: "heading" },
      element("h2", {}, "Which tokens each token looks at"),
      status.element,
      element("label", { class: "inline" }, "Layer", layer),
      element("label", { class: "inline" }, "Head", head),
    ),
    element(
      "p",
      { class: "explanation" },
      "A row is a token that looks; a column is a token that it looks at (“attention”). A row sums to 1, and no token looks ahead.",
    ),
    content,
  );
  onChange((changed) => {
    if (["model", "model list", "layer", "head", "reloaded"].some((name) => changed.has(name)))
      showLists();
  });

  function paintAttention() {
    const head = state.head === null ? "mean of all heads" : `head ${state.head + 1}`;
    const title = `Attention: layer ${state.layer + 1}, ${head}`;
    return paintMap(title, caption(modelName(state.model), { settings: "" }), map.canvas);
  }

  function showLists() {
    const model = modelOf(state.model);
    if (!model?.is_loaded) return;
    fill(
      layer,
      Array.from({ length: model.n_layers }, (_, i) => [i, String(i + 1)]),
    );
    fill(head, [
      ["", "mean of all"],
      ...Array.from({ length: model.n_heads }, (_, i) => [i, String(i + 1)]),
    ]);
    layer.value = state.layer;
    head.value = state.head ?? "";
    // another model may have fewer layers and heads
    const fits = state.layer < model.n_layers && (state.head ?? 0) < model.n_heads;
    if (!fits) update({ layer: 0, head: null });
  }

  return () =>
    request.send({ ...input(), layer: state.layer, head: state.head }, reloadsOf(state.model));
}

function fill(list, options) {
  if (list.options.length === options.length) return;
  list.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
}
