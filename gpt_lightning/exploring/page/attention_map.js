/** A map of attention weights on a canvas. The mouse or the arrow keys choose a cell and read its value. */

import { element, formatProbability } from "./elements.js";
import { color, forgetColors, shortened } from "./picture.js";
import { tokenString } from "./tokens.js";

const LONGEST_LABEL = 110; // pixels
const LARGEST_CELL = 40;
const LARGEST_MAP = 860;
const SMALLEST_CELL = 3;
const SMALLEST_LABELED_CELL = 11;
const LARGEST_FONT = 13; // pixels
const FONT = 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';

export class AttentionMap {
  #answer = { tokens: [], weights: [] };
  #cell = LARGEST_CELL;
  #labels = 0; // pixels left of and above the map
  #row = -1;
  #column = -1;

  /** `onRead(text)` gets what the chosen cell says. */
  constructor(onRead) {
    this.onRead = onRead;
    this.canvas = element("canvas", {
      tabindex: 0,
      role: "application",
      "aria-label": "Attention map. The arrow keys choose a row and a column.",
    });
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.#point(event));
    this.canvas.addEventListener("keydown", (event) => this.#move(event));
    new ResizeObserver(() => this.#draw()).observe(this.canvas.ownerDocument.body);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    window.addEventListener("theme", () => this.#draw());
  }

  show(answer) {
    this.#answer = answer;
    const last = answer.tokens.length - 1;
    this.#row = Math.min(this.#row < 0 ? last : this.#row, last);
    this.#column = Math.min(this.#column, this.#row);
    this.#draw();
    this.#read();
  }

  /** The weights as a table: one row for each query, one column for each key. */
  get rows() {
    const { tokens, weights } = this.#answer;
    const name = (token, i) => `${i + 1} ${token.text}`;
    return [
      ["query", ...tokens.map(name)],
      ...weights.map((row, i) => [name(tokens[i], i), ...row]),
    ];
  }

  #draw() {
    const { tokens, weights } = this.#answer;
    const available = this.canvas.parentElement?.parentElement?.clientWidth ?? 0;
    if (tokens.length === 0 || available === 0) return;
    this.#fit(Math.min(available, LARGEST_MAP));
    const size = this.#labels + this.#cell * tokens.length + 2;
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(size * scale);
    this.canvas.height = Math.round(size * scale);
    this.canvas.style.width = `${size}px`;
    this.canvas.style.height = `${size}px`;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    forgetColors();
    this.#drawLabels(context);
    this.#drawCells(context, weights);
    this.#drawCursor(context);
  }

  /** Choose the size of the cells and the room for the labels. */
  #fit(available) {
    const { tokens } = this.#answer;
    const cellWith = (labels) => Math.floor((available - labels - 8) / tokens.length);
    const context = this.canvas.getContext("2d");
    context.font = `${LARGEST_FONT}px ${FONT}`;
    const widths = tokens.map((token) => context.measureText(tokenString(token)).width);
    this.#labels = Math.min(LONGEST_LABEL, Math.ceil(Math.max(...widths))) + 12;
    if (cellWith(this.#labels) < SMALLEST_LABELED_CELL) this.#labels = 0;
    this.#cell = Math.max(SMALLEST_CELL, Math.min(LARGEST_CELL, cellWith(this.#labels)));
  }

  #drawCells(context, weights) {
    const cell = this.#cell;
    const gap = cell > 6 ? 1 : 0;
    // colors in 64 steps: one color for each of 65,536 cells takes long
    const shades = Array.from({ length: 65 }, (_, i) =>
      i < 32
        ? color("--attention-half", i / 32)
        : color("--attention", (i - 32) / 32, "--attention-half"),
    );
    weights.forEach((row, i) => {
      for (let j = 0; j <= i; j += 1) {
        context.fillStyle = shades[Math.round(64 * Math.sqrt(row[j]))];
        context.fillRect(this.#labels + j * cell, this.#labels + i * cell, cell - gap, cell - gap);
      }
    });
  }

  #drawLabels(context) {
    const cell = this.#cell;
    const labels = this.#labels;
    if (labels === 0) return;
    const size = Math.min(LARGEST_FONT, cell - 1);
    context.font = `${size}px ${FONT}`;
    context.textBaseline = "middle";
    this.#answer.tokens.forEach((token, i) => {
      const text = shortened(context, tokenString(token), labels - 12);
      const middle = labels + (i + 0.5) * cell;
      context.fillStyle = color(i === this.#row ? "--ink" : "--muted");
      context.textAlign = "right";
      context.fillText(text, labels - 8, middle);
      context.save();
      context.translate(middle, labels - 8);
      context.rotate(-Math.PI / 2);
      context.fillStyle = color(i === this.#column ? "--ink" : "--muted");
      context.textAlign = "left";
      context.fillText(text, 0, 0);
      context.restore();
    });
  }

  #drawCursor(context) {
    if (this.#row < 0 || this.#column < 0) return;
    const cell = this.#cell;
    context.strokeStyle = color("--focus");
    context.lineWidth = 2;
    context.strokeRect(
      this.#labels + this.#column * cell - 0.5,
      this.#labels + this.#row * cell - 0.5,
      cell,
      cell,
    );
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - this.#labels) / this.#cell);
    const row = Math.floor((event.clientY - box.top - this.#labels) / this.#cell);
    if (row < 0 || column < 0 || row >= this.#answer.tokens.length || column > row) return;
    this.#choose(row, column);
  }

  #move(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[
      event.key
    ];
    if (!step) return;
    event.preventDefault();
    const last = this.#answer.tokens.length - 1;
    const row = Math.max(0, Math.min(last, this.#row + step[0]));
    this.#choose(row, Math.max(0, Math.min(row, this.#column + step[1])));
  }

  #choose(row, column) {
    if (row === this.#row && column === this.#column) return;
    this.#row = row;
    this.#column = column;
    this.#draw();
    this.#read();
  }

  #read() {
    const { tokens, weights } = this.#answer;
    const [row, column] = [this.#row, this.#column];
    const name = (i) => `${i + 1} “${tokenString(tokens[i])}”`;
    this.onRead(
      column < 0
        ? "Point at the map, or use the arrow keys, to read a value."
        : `Token ${name(row)} looks at token ${name(column)} with weight ${formatProbability(weights[row][column])}.`,
    );
  }
}
