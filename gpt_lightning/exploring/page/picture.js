/** Pictures of the views, painted on a canvas in the page's colors. */

import { axisLabel } from "./bars.js";
import { formatProbability } from "./elements.js";
import { samplingText, state } from "./state.js";
import { tokenString } from "./tokens.js";

const WIDTH = 1200;
const MARGIN = 40;
const SCALE = 2; // pixels of the file for one pixel here
const MAX_PIXELS = 32_000; // of a height; browsers have no larger canvas
const TEXT = '14px -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif';
const BOLD = `600 ${TEXT}`;
const CODE = '14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace';
const SMALL = TEXT.replace("14px", "12px");

let colors = new Map();

/** A color of style.css as the browser computes it, for example `color("--ink")`; `share` mixes it with another. */
export function color(name, share = 1, other = "--paper") {
  const key = `${name} ${share} ${other}`;
  if (!colors.has(key)) colors.set(key, computedColor(name, share, other));
  return colors.get(key);
}

/** Forget the computed colors, because the user has changed from light to dark. */
export function forgetColors() {
  colors = new Map();
}

function computedColor(name, share, other) {
  const probe = document.createElement("span");
  probe.style.color =
    share === 1
      ? `var(${name})`
      : `color-mix(in oklab, var(${name}) ${100 * share}%, var(${other}))`;
  document.body.append(probe);
  const computed = getComputedStyle(probe).color;
  probe.remove();
  return computed;
}

/** A canvas with a title, a caption with model, prompt and settings, and what `paint(context, y)` adds. */
function canvasOf(title, caption, height, paint, width = WIDTH) {
  forgetColors();
  const canvas = document.createElement("canvas");
  const top = 100;
  const scale = Math.min(SCALE, MAX_PIXELS / (top + height + MARGIN));
  canvas.width = width * scale;
  canvas.height = (top + height + MARGIN) * scale;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.fillStyle = color("--paper");
  context.fillRect(0, 0, width, top + height + MARGIN);
  context.textBaseline = "middle";
  write(context, title, MARGIN, 44, { font: BOLD.replace("14px", "20px") });
  write(context, caption, MARGIN, 72, { font: SMALL, ink: "--muted", maximum: width - 2 * MARGIN });
  paint(context, top);
  return canvas;
}

function write(context, text, x, y, { font = TEXT, ink = "--ink", align = "left", maximum } = {}) {
  context.font = font;
  context.fillStyle = color(ink);
  context.textAlign = align;
  context.fillText(maximum ? shortened(context, text, maximum) : text, x, y);
}

/** The text, or its beginning with "…", in the font of `context`; at most `maximum` pixels wide. */
export function shortened(context, text, maximum) {
  if (context.measureText(text).width <= maximum) return text;
  let end = text.length;
  while (end > 0 && context.measureText(`${text.slice(0, end)}…`).width > maximum) end -= 1;
  return `${text.slice(0, end)}…`;
}

/** "Model, prompt, settings" below the title of a picture. */
export function caption(model, { prompt = state.prompt, settings = samplingText() } = {}) {
  return [model, prompt && JSON.stringify(prompt), settings].filter(Boolean).join("   ·   ");
}

/** Groups of bars, one column for each group: `{name, bars, draws}`, with rows in the same order. */
export function paintBars(title, text, groups, maximum) {
  const rows = Math.max(...groups.map(({ bars }) => bars.length));
  const line = 26;
  return canvasOf(title, text, (rows + 2) * line, (context, top) => {
    const labels = 170;
    const width = (WIDTH - 2 * MARGIN - labels) / groups.length;
    groups.forEach(({ name, bars, draws = 0 }, column) => {
      const left = MARGIN + labels + column * width;
      const numbers = 80;
      const length = width - numbers - 24;
      write(context, name, left, top + 6, { font: BOLD, maximum: width - 16 });
      for (const value of [0, maximum / 2, maximum]) {
        const x = left + (length * value) / maximum;
        write(context, axisLabel(value), x, top + line + 4, {
          font: SMALL,
          ink: "--muted",
          align: "center",
        });
        context.fillStyle = color("--line");
        context.fillRect(x, top + line + 14, 1, rows * line);
      }
      bars.forEach((bar, row) => {
        const y = top + (row + 2) * line;
        if (column === 0) {
          write(context, tokenString(bar), MARGIN, y, { font: CODE, maximum: labels - 16 });
        }
        paintBar(context, bar, draws, left, y, length / maximum);
        write(context, formatProbability(bar.probability), left + length + 16, y, { font: SMALL });
      });
    });
  });
}

function paintBar(context, bar, draws, x, y, scale) {
  context.fillStyle = color("--blue");
  context.fillRect(x, y - 7, bar.probability * scale, draws ? 9 : 14);
  if (draws) {
    context.fillStyle = color("--orange");
    context.fillRect(x, y + 3, (bar.drawn / draws) * scale, 4);
  }
  context.strokeStyle = color("--muted");
  context.strokeRect(x + 0.5, y - 7.5, bar.model_probability * scale, 15);
  // the line beside the right edge keeps it visible inside a longer fill
  context.fillStyle = color("--paper");
  context.fillRect(x + 1 + bar.model_probability * scale, y - 7, 1, 14);
}

/** Texts as shaded tokens: `{name, prompt, entries}`; an entry has `text`, `shade` (0 to 1) and `isMarked`. */
export function paintTexts(title, text, texts) {
  const scratch = document.createElement("canvas").getContext("2d");
  const column = (WIDTH - 2 * MARGIN - 32 * (texts.length - 1)) / texts.length;
  const layouts = texts.map(({ prompt, entries }) =>
    layoutOf(scratch, [{ text: prompt, shade: 0, ink: "--muted" }, ...entries], column),
  );
  const height = Math.max(...layouts.map((layout) => layout.height)) + 40;
  return canvasOf(title, text, height, (context, top) => {
    texts.forEach(({ name }, i) => {
      const left = MARGIN + i * (column + 32);
      write(context, name, left, top + 6, { font: BOLD, maximum: column });
      for (const { piece, x, y, width, shade, ink, isMarked } of layouts[i].pieces) {
        if (shade > 0) {
          context.fillStyle = color("--surprise", shade);
          context.fillRect(left + x, top + 28 + y, width, 24);
        }
        if (isMarked) {
          context.fillStyle = color("--blue");
          context.fillRect(left + x, top + 28 + y + 22, width, 3);
        }
        write(context, piece, left + x, top + 40 + y, { font: CODE, ink });
      }
    });
  });
}

/** Positions of tokens that are broken into lines at spaces and line breaks. */
function layoutOf(context, entries, maximum) {
  const line = 28;
  const pieces = [];
  let [x, y] = [0, 0];
  context.font = CODE;
  for (const { text, shade, ink = "--ink", isMarked = false } of entries) {
    for (const piece of text.split(/(\n)|(?<=\S)(?=[ \t])/).filter(Boolean)) {
      if (piece === "\n") {
        [x, y] = [0, y + line];
        continue;
      }
      const width = context.measureText(piece).width;
      if (x > 0 && x + width > maximum) [x, y] = [0, y + line];
      pieces.push({ piece, x, y, width, shade, ink, isMarked });
      x += width;
    }
  }
  return { pieces, height: y + line };
}

/** A table of tokens, shaded by probability: `rows` of `{name, cells: [{token, probability}]}`. */
export function paintTable(title, text, columns, rows) {
  const labels = 110;
  const cell = 96;
  const line = 30;
  const width = Math.max(600, 2 * MARGIN + labels + cell * columns.length);
  return canvasOf(
    title,
    text,
    line * (rows.length + 1),
    (context, top) => {
      columns.forEach((token, i) =>
        write(context, tokenString(token), MARGIN + labels + i * cell + 8, top + 12, {
          font: CODE,
          ink: "--muted",
          maximum: cell - 12,
        }),
      );
      rows.forEach(({ name, cells }, row) => {
        const y = top + line * (row + 1);
        write(context, name, MARGIN, y + 13, { font: SMALL, ink: "--muted" });
        cells.forEach(({ token, probability }, i) => {
          const x = MARGIN + labels + i * cell;
          context.fillStyle = color("--probability", probability);
          context.fillRect(x, y, cell - 2, line - 2);
          write(context, tokenString(token), x + 8, y + 14, { font: CODE, maximum: cell - 14 });
        });
      });
    },
    width,
  );
}

/** A map that is on the page already, with a title and a caption. */
export function paintMap(title, text, map) {
  const width = Math.max(600, map.clientWidth + 2 * MARGIN);
  return canvasOf(
    title,
    text,
    map.clientHeight,
    (context, top) => {
      context.drawImage(map, MARGIN, top, map.clientWidth, map.clientHeight);
    },
    width,
  );
}
