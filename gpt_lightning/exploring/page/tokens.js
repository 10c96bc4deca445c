/** Tokens as text: spaces, line breaks and bytes that are no complete character become visible. */

import { element } from "./elements.js";

const VISIBLE = { " ": "·", "\n": "↵", "\t": "→", "\r": "␍" };
const HIDDEN = /[ \n\t\r]/;

const bytesOf = (token) => token.bytes.match(/../g) ?? [];

/** Whether the token has bytes of a character whose other bytes are in another token. */
export function isIncomplete(token) {
  return token.text.includes("\ufffd") && !token.bytes.includes("efbfbd");
}

/** The token in one line, for a canvas, a table or a label. */
export function tokenString(token) {
  if (isIncomplete(token)) return `⟨${bytesOf(token).join(" ")}⟩`;
  return [...token.text].map((c) => VISIBLE[c] ?? c).join("") || "⟨empty⟩";
}

/** The token as nodes; the signs for spaces are less dark than the text. */
export function tokenNodes(token) {
  if (isIncomplete(token) || token.text === "") {
    return [element("span", { class: "sign" }, tokenString(token))];
  }
  return token.text
    .split(/([ \n\t\r])/)
    .filter((part) => part !== "")
    .map((part) => (HIDDEN.test(part) ? element("span", { class: "sign" }, VISIBLE[part]) : part));
}

/** What a hover over a token says. */
export function describe(token) {
  return `id ${token.id}, bytes ${bytesOf(token).join(" ")}`;
}

/** Decoder of the tokens of one text. A character of several tokens appears at its last one. */
export class TokenDecoder {
  #decoder = new TextDecoder();

  text(token) {
    const bytes = Uint8Array.from(bytesOf(token), (hex) => parseInt(hex, 16));
    return this.#decoder.decode(bytes, { stream: true });
  }

  /** What the text ends with: U+FFFD if its last character is incomplete, else nothing. */
  end() {
    return this.#decoder.decode();
  }
}

/** Every token that the server has named, by id: the tree of paths shows their texts. */
export const knownTokens = new Map();

/** Keep the texts of tokens. Returns whether one of them is new. */
export function remember(tokens) {
  const isNew = tokens.some(({ id, text }) => knownTokens.get(id)?.text !== text);
  for (const { id, text, bytes } of tokens) knownTokens.set(id, { id, text, bytes });
  return isNew;
}

/** The first position at which the lists that reach it are not all equal; -1: none. */
export function firstDifference(lists) {
  const length = Math.max(0, ...lists.map((list) => list.length));
  for (let i = 0; i < length; i += 1) {
    if (new Set(lists.filter((list) => list.length > i).map((list) => list[i])).size > 1) return i;
  }
  return -1;
}

/** The text of a path, as far as it is known. */
export const textOf = (path) => path.map((id) => tokenOf(id).text).join("");

/** The known token with this id. Its text is the id until the server has named it. */
export function tokenOf(id) {
  return knownTokens.get(id) ?? { id, text: `#${id}`, bytes: "" };
}
