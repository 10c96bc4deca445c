/** The paths taken after the prompt, as a tree with branches, and two of them compared. */

import { LatestRequest, post } from "./api.js";
import { element, formatNumber, formatProbability, plural, select } from "./elements.js";
import { hasSameVocabulary, modelOf, reloadsOf } from "./models.js";
import { notify, onChange, sampling, state, update } from "./state.js";
import { Status } from "./status.js";
import {
  firstDifference,
  knownTokens,
  remember,
  tokenNodes,
  tokenOf,
  tokenString,
} from "./tokens.js";

const isPrefix = (a, b) => a.length <= b.length && a.every((id, i) => id === b[i]);
const isSame = (a, b) => a.length === b.length && isPrefix(a, b);

/** Take a token after the present path. The branch that goes on is extended; another one is new. */
export function take(id) {
  const path = [...state.path, id];
  update({ path, paths: withPath(state.paths, path) });
}

/** The ends of all branches, with `path` among them or on the way to one of them. */
export function withPath(paths, path) {
  if (path.length === 0 || paths.some((end) => isPrefix(path, end))) return paths;
  const grown = paths.findIndex((end) => isPrefix(end, path));
  if (grown < 0) return [...paths, path];
  return paths.map((end, i) => (i === grown ? path : end));
}

/** Paths as a tree of nodes `{id, path, children}`. */
function treeOf(paths) {
  const root = { id: null, path: [], children: [] };
  for (const path of paths) {
    let node = root;
    for (const [i, id] of path.entries()) {
      let child = node.children.find((candidate) => candidate.id === id);
      if (!child) {
        child = { id, path: path.slice(0, i + 1), children: [] };
        node.children.push(child);
      }
      node = child;
    }
  }
  return root;
}

export function startTree(container, comparison) {
  const branches = element("div", { class: "tree" });
  const clear = element("button", { type: "button", onclick: forget }, "Forget other branches");
  container.append(
    element("div", { class: "heading" }, element("h2", {}, "Your path"), clear),
    branches,
  );
  const compare = startComparison(comparison);

  function show() {
    const root = treeOf(withPath(state.paths, state.path));
    clear.hidden = state.paths.length < 2;
    branches.replaceChildren(
      ...(root.children.length
        ? [element("ul", {}, branch(root))]
        : [
            element(
              "p",
              { class: "hint" },
              "Choose a token to take it. Then walk back and choose another one: both paths stay here.",
            ),
          ]),
    );
  }

  onChange((changed) => {
    learnNames();
    if (["path", "paths", "names"].some((name) => changed.has(name))) show();
    compare();
  });
  show();
}

/** Ask for the texts of the tokens that a link has brought as ids. */
async function learnNames() {
  const ids = [...new Set([...state.path, ...state.paths.flat()])];
  const unknown = ids.filter((id) => !knownTokens.has(id));
  const { model } = state;
  if (unknown.length === 0 || !modelOf(model)) return;
  remember(unknown.map(tokenOf)); // their ids stand for them, so each is asked for once
  try {
    const { tokens } = await post("tokens", { model, prompt: "", path: unknown });
    if (!hasSameVocabulary(model, state.model)) return; // they are of another tokenizer
    remember(tokens);
    notify(["names"]);
  } catch {
    // the view says what is wrong with the path
  }
}

function forget() {
  update({ paths: withPath([], state.path) });
}

/** One item: the tokens up to the next branch in a row, then the branches below it. */
function branch(node) {
  const chain = [node];
  while (chain.at(-1).children.length === 1) chain.push(chain.at(-1).children[0]);
  const { children } = chain.at(-1);
  return element(
    "li",
    {},
    element("div", { class: "chain" }, ...chain.map(step)),
    ...(children.length ? [element("ul", {}, ...children.map(branch))] : []),
  );
}

function step({ id, path }) {
  const isHere = isSame(path, state.path);
  return element(
    "button",
    {
      type: "button",
      class: ["token", isPrefix(path, state.path) && "taken", id === null && "root"]
        .filter(Boolean)
        .join(" "),
      "aria-current": isHere && "step",
      "aria-label": id === null ? "Walk back to the prompt" : `Go to ${tokenString(tokenOf(id))}`,
      onclick: () => update({ path }),
    },
    ...(id === null ? ["prompt"] : tokenNodes(tokenOf(id))),
  );
}

/** The comparison of two branches. Returns the function that brings it up to date. */
function startComparison(container) {
  const chosen = [0, 1];
  const answers = [null, null];
  const content = element("div", { class: "content scroll" });
  const status = new Status(content);
  const lists = ["First path", "Second path"].map((label, i) =>
    select({ "aria-label": label, onchange: (event) => choose(i, Number(event.target.value)) }, []),
  );
  const requests = chosen.map(
    (_, i) =>
      new LatestRequest("next", status, (answer) => {
        answers[i] = answer;
        remember(answer.path);
        show();
      }),
  );
  container.hidden = true;
  container.append(
    element(
      "div",
      { class: "heading" },
      element("h2", {}, "Two paths compared"),
      status.element,
      ...lists,
    ),
    content,
  );

  function choose(i, value) {
    chosen[i] = value;
    ask();
  }

  function ask() {
    const { paths, model, prompt, seed } = state;
    container.hidden = paths.length < 2;
    if (container.hidden || state.view !== "next" || !modelOf(model)) return;
    lists.forEach((list, i) => {
      chosen[i] = Math.min(chosen[i], paths.length - 1);
      list.replaceChildren(
        ...paths.map((path, value) => element("option", { value }, nameOf(path))),
      );
      list.value = chosen[i];
      requests[i].send(
        {
          ...{ model, prompt, path: paths[chosen[i]], sampling: sampling(), draws: 0, seed },
          bars: 0,
          include_tokens: false,
        },
        reloadsOf(model),
      );
    });
  }

  function show() {
    if (answers.includes(null)) return;
    const [a, b] = answers.map((answer) => answer.path);
    const differs = firstDifference([a, b].map((path) => path.map(({ id }) => id)));
    const same = differs < 0 ? Math.min(a.length, b.length) : differs;
    const rows = Array.from({ length: Math.max(a.length, b.length) }, (_, i) =>
      element(
        "tr",
        { class: i === differs ? "differs" : i < same && "same" },
        element("th", { scope: "row" }, String(i + 1)),
        ...[a[i], b[i]].flatMap(cells),
        element("td", { class: "hint" }, i === differs ? "first difference" : ""),
      ),
    );
    content.replaceChildren(
      element(
        "table",
        { class: "comparison" },
        element(
          "thead",
          {},
          element(
            "tr",
            {},
            element("th", { scope: "col" }, "#"),
            ...["First path", "Second path"].flatMap((name) => [
              element("th", { scope: "col" }, name),
              element("th", { scope: "col", class: "figure" }, "Model"),
              element("th", { scope: "col", class: "figure" }, "After"),
            ]),
            element("th"),
          ),
        ),
        element("tbody", {}, ...rows),
        element("tfoot", {}, total("All tokens together", a, b), mean(a, b)),
      ),
      element(
        "p",
        { class: "hint" },
        "Model: the probability that the model gives the token. After: its probability after your settings. The path's probability is the product of its tokens'.",
      ),
    );
  }

  return ask;
}

function cells(token) {
  if (!token) return [element("td"), element("td"), element("td")];
  return [
    element("td", {}, element("span", { class: "token" }, ...tokenNodes(token))),
    element("td", { class: "figure" }, formatProbability(token.model_probability)),
    element(
      "td",
      { class: "figure" },
      token.probability === 0 ? "cut off" : formatProbability(token.probability),
    ),
  ];
}

/** The product of the tokens' probabilities; null if one of them is unknown. */
function product(tokens, name) {
  if (tokens.some((token) => token[name] === null)) return null;
  return tokens.reduce((p, token) => p * token[name], 1);
}

function total(label, ...paths) {
  return element(
    "tr",
    {},
    element("th"),
    ...paths.flatMap((tokens) => [
      element("th", { scope: "row" }, label),
      element("td", { class: "figure" }, formatProbability(product(tokens, "model_probability"))),
      element("td", { class: "figure" }, formatProbability(product(tokens, "probability"))),
    ]),
    element("td"),
  );
}

function mean(...paths) {
  const loss = (tokens) => {
    const p = product(tokens, "model_probability");
    return p === null ? null : -Math.log(p) / tokens.length;
  };
  return element(
    "tr",
    {},
    element("th"),
    ...paths.flatMap((tokens) => [
      element("th", { scope: "row" }, "Mean surprisal"),
      element("td", { class: "figure" }, `${formatNumber(loss(tokens))} nats`),
      element("td"),
    ]),
    element("td"),
  );
}

function nameOf(path) {
  const text = path.map((id) => tokenString(tokenOf(id))).join("");
  return `${text.length > 40 ? `${text.slice(0, 40)}…` : text} (${plural(path.length, "token")})`;
}
